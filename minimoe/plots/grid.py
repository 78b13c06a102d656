"""Every token of a short text in every layer: its experts, the gate weight as opacity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from minimoe.colours import expert_colour, ink
from minimoe.plots.page import CHARACTER, FAINT, MARGIN, MONO, RULE, Head, Page, checked_layers, checked_routing, styled
from minimoe.plots.tokens import drawable_piece
from minimoe.shapes import Array, Routing

_ROW, _SIZE, _LABELS = 0.19, 7.5, 14  # inches, points, characters of a token that are shown
_WIDEST, _GAP = 12.0, 0.35


@styled
def token_grid(
    pieces: Sequence[str],
    routing: Routing | None,
    *,
    layers: Sequence[int] | None = None,
    max_tokens: int = 48,
    title: str = "Every token in every layer",
) -> Page:
    """Draw a row per token and a column per layer; each cell shows the k experts, first choice on the left.

    Parameters
    ----------
    pieces : N texts, as `Tokenizer.pieces` gives them
    routing : ids and weights (L, N, k), as `model.trace(text).routing` has them; None is refused: a dense model
    layers : which to show; None is all
    max_tokens : later ones are left out, and the caption says so
    title : above all
    """
    routing = checked_routing(routing, len(pieces), weights=True)
    layers = checked_layers(layers, len(routing.ids), range(len(routing.ids)))
    ids, weights = routing.ids[layers, :max_tokens], np.asarray(routing.weights)[layers, :max_tokens]
    L, n, k = ids.shape
    part = min(0.15 if ids.max() < 10 else 0.185, (_WIDEST - 1.2) / (L * k))
    wide = _LABELS * CHARACTER * _SIZE + 0.1 + L * k * part
    blocks = max(1, min(math.ceil(n / 12), int((_WIDEST + _GAP) / (wide + _GAP))))
    rows = math.ceil(n / blocks)
    width = max(blocks * (wide + _GAP) - _GAP, 5.0)
    cut = f" The first {n} of {len(pieces)} tokens." if n < len(pieces) else ""
    head = Head(
        title, f"Each cell shows the {k} experts of a token in a layer, first choice left; the stronger the colour, "
        f"the larger its weight.{cut}", width,
    )  # fmt: skip
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.6 + _ROW * rows)
    top = head.draw(page)
    experts = sorted({int(e) for e in ids.flat if e >= 0})
    begin = page.chips(MARGIN + width, top - 0.04, experts, room=width - 0.6)
    page.write(begin - 0.08, top - 0.02, "expert", 8, color=FAINT, ha="right")
    for b in range(blocks):
        shown = slice(b * rows, min((b + 1) * rows, n))
        left = MARGIN + b * (wide + _GAP)
        if shown.start < n:
            _draw_labels(page, left, top + 0.6, pieces[shown])
            x, tall = left + wide - L * k * part, 0.22 + _ROW * (shown.stop - shown.start)
            page.write(x - 0.1, top + 0.435, "layer", 7.5, color=FAINT, ha="right")
            axes = page.box(x, top + 0.38, L * k * part, tall, frame=False)
            _draw_cells(axes, ids[:, shown], weights[:, shown], layers, part, f"grid-{b}")
    return page


def _draw_labels(page: Page, left: float, top: float, pieces: Sequence[str]) -> None:
    for i, piece in enumerate(pieces):
        text = drawable_piece(piece)
        text = text if len(text) <= _LABELS else text[: _LABELS - 1] + "…"
        x = left + (_LABELS - len(text)) * CHARACTER * _SIZE
        page.write(x, top + _ROW * i + 0.035, text, _SIZE, family=MONO)


def _draw_cells(
    axes: Axes,
    ids: Int[Array, "L n k"],
    weights: Float[Array, "L n k"],
    layers: Sequence[int],
    part: float,
    gid: str,
) -> None:
    """Draw one box per (token, layer, slot), in inches; a token that was not routed has none."""
    L, n, k = ids.shape
    axes.set_xlim(0, L * k * part)
    axes.set_ylim(_ROW * n, -0.22)
    boxes, colours = [], []
    for t in range(n):
        for i in range(L):
            for slot in range(k):
                expert, weight = int(ids[i, t, slot]), float(np.clip(weights[i, t, slot], 0, 1))
                if expert < 0 or np.isnan(weight):
                    continue
                x, y = (i * k + slot) * part, _ROW * t
                left = x + (0.02 if slot == 0 else 0)
                boxes.append(
                    [(left, y + 0.01), (x + part, y + 0.01), (x + part, y + _ROW - 0.01), (left, y + _ROW - 0.01)]
                )
                colours.append((*to_rgb(expert_colour(expert)), weight))
                if part >= 0.13:
                    axes.text((left + x + part) / 2, y + _ROW / 2, str(expert), ha="center", va="center", fontsize=6.5,
                              color=_ink(expert, weight))  # fmt: skip
    axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0, gid=gid), autolim=False)
    every = math.ceil(0.2 / (k * part))
    for i in range(0, L, every):
        axes.text((i + 0.5) * k * part, -0.1, str(layers[i]), ha="center", va="center", fontsize=7.5, color=FAINT)
    axes.plot([0.02, L * k * part], [-0.01, -0.01], color=RULE, linewidth=0.6)


def _ink(expert: int, weight: float) -> str:
    """Black or white on the colour as it shows through on white."""
    shown = [round(255 * (weight * part + 1 - weight)) for part in to_rgb(expert_colour(expert))]
    return ink("#" + "".join(f"{part:02x}" for part in shown))
