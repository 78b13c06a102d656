"""Where each head looks: attention probabilities as small multiples, with what it may not see told apart from zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

from minimoe.plots.page import CHARACTER, FAINT, MARGIN, MONO, RULE, Head, Page, styled
from minimoe.plots.tokens import drawable_piece
from minimoe.shapes import Array

_SCALE = PowerNorm(0.5, 0, 1)  # colours go with the square root, so that small probabilities show
_SIZE, _LABELS, _GAP, _HEAD = 6.5, 10, 0.28, 0.26
_MOST_LABELS = 32


@styled
def attention_maps(
    probs: Float[Array, "H T S"],
    pieces: Sequence[str] | None = None,
    *,
    window: int | None = None,
    q_pos: Int[Array, " T"] | None = None,
    k_pos: Int[Array, " S"] | None = None,
    num_kv_heads: int | None = None,
    columns: int = 4,
    title: str = "Where each head looks",
) -> Page:
    """Draw one panel per head: a row per query, a column per key.

    Parameters
    ----------
    probs : (H, T, S), of one sequence: `trace["layers.0.attention.probs"][0]`
    pieces : S texts of the keys; they label rows and columns where T = S and there are at most 32
    window : W, or None
    q_pos, k_pos : (T,), (S,) positions, -1 for padding and empty slots; by default both count from 0 and end together
    num_kv_heads : K, to name the key/value head that each head reads
    columns : panels side by side, at most
    title : above all
    """
    probs = np.asarray(probs, np.float64)
    visible = _visible(probs, window, q_pos, k_pos)
    H, T, S = probs.shape
    columns = min(columns, H)
    labelled = pieces is not None and T == S <= _MOST_LABELS
    panel = max(float(np.clip(9.6 / columns, 1.6, 3.2)), 0.108 * T * labelled)
    tall = panel * min(max(T / S, 0.25), 1.0)
    left, below = (_LABELS * CHARACTER * _SIZE + 0.08,) * 2 if labelled else (0.3, 0.25)
    width = max(left + columns * (panel + _GAP) - _GAP, 5.0)
    unseen = "later ones" if window is None else f"later ones, and those outside the window of {window}"
    head = Head(title, f"A row per query, a column per key. Hatched: keys it may not see ({unseen}).", width)
    lines, line_tall = math.ceil(H / columns), _HEAD + tall + below
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + lines * line_tall + 0.42)
    top = head.draw(page)
    for h in range(H):
        line, column = divmod(h, columns)
        x, y = MARGIN + left + column * (panel + _GAP), top + line * line_tall
        reads = "" if num_kv_heads is None else f", keys {h // (H // num_kv_heads)}"
        page.write(x, y, f"head {h}{reads}", 9, weight="bold")
        axes = page.box(x, y + _HEAD, panel, tall)
        _draw_map(axes, probs[h], visible, h)
        if labelled and pieces is not None:
            _label(axes, pieces, queries=column == 0)
        elif column == 0:
            places = sorted({0, (T - 1) // 2, T - 1})
            axes.set_yticks(places, [str(place) for place in places], color=FAINT)
    _draw_key(page, MARGIN + left, top + lines * line_tall + 0.05)
    return page


def _visible(
    probs: Array, window: int | None, q_pos: Int[Array, " T"] | None, k_pos: Int[Array, " S"] | None
) -> Bool[Array, "T S"]:
    """Which keys each query may see: k_pos >= 0 and 0 <= q_pos - k_pos < W."""
    if probs.ndim != 3 or not probs.size:
        raise ValueError(f"probs must have shape (H, T, S), those of one sequence, not {probs.shape}")
    if not np.isfinite(probs).all():
        raise ValueError("the attention probabilities hold NaN or Inf")
    _, T, S = probs.shape
    q = np.arange(S - T, S) if q_pos is None else np.asarray(q_pos)
    k = np.arange(S) if k_pos is None else np.asarray(k_pos)
    if q.shape != (T,) or k.shape != (S,):
        raise ValueError(f"q_pos and k_pos must be ({T},) and ({S},), not {q.shape} and {k.shape}")
    distance = q[:, None] - k[None, :]
    visible: Array = (
        (k >= 0) & (q >= 0)[:, None] & (distance >= 0) & (distance < (math.inf if window is None else window))
    )
    if (probs * ~visible).any():
        raise ValueError(f"some probabilities are not zero where nothing is visible: is window = {window} right?")
    return visible


def _draw_map(axes: Axes, probs: Float[Array, "T S"], visible: Bool[Array, "T S"], head: int) -> None:
    T, S = probs.shape
    axes.add_patch(
        Rectangle((-0.5, -0.5), S, T, facecolor="#e6e6e6", edgecolor="#c2c2c2", linewidth=0, hatch="//////", zorder=0)
    )
    axes.imshow(
        np.ma.masked_array(probs, ~visible), cmap=colormaps["Blues"], norm=_SCALE, aspect="auto",
        interpolation="nearest", extent=(-0.5, S - 0.5, T - 0.5, -0.5), gid=f"head-{head}", zorder=1,
    )  # fmt: skip
    axes.spines[:].set_color(RULE)


def _label(axes: Axes, pieces: Sequence[str], queries: bool) -> None:
    """Name every column and, of the leftmost panels, every row."""
    texts = [drawable_piece(piece) for piece in pieces]
    texts = [text if len(text) <= _LABELS else text[: _LABELS - 1] + "…" for text in texts]
    axes.set_xticks(range(len(texts)), texts, rotation=90, family=MONO, fontsize=_SIZE)
    if queries:
        axes.set_yticks(range(len(texts)), texts, family=MONO, fontsize=_SIZE)


def _draw_key(page: Page, left: float, top: float) -> None:
    axes = page.box(left, top, 1.9, 0.13)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=colormaps["Blues"], norm=_SCALE, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([0, 0.1, 0.25, 0.5, 1], ["0", "0.1", "¼", "½", "1"], fontsize=8)
    axes.spines[:].set_color(RULE)
    page.write(left + 2.1, top, "probability", 8.5, color=FAINT)
