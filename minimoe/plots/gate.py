"""One token's gate, step by step with its numbers: logits, the top k, their softmax, the weighted sum.

Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1 and figure 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from minimoe.colours import expert_colour, ink
from minimoe.plots.heat import DIVERGING
from minimoe.plots.page import EDGE, FAINT, INK, MARGIN, RULE, Head, Page, styled
from minimoe.plots.tokens import drawable_piece
from minimoe.shapes import Array

_CAPTION = (
    "The router gives each expert a logit; only the largest go on, and share the token by their softmax; the "
    "outputs of their experts are added with these weights."
)
_LOGITS, _CHOICE, _WEIGHTS, _SUM, _GAP = 2.7, 0.75, 2.5, 3.0, 0.4  # inches


@styled
def gate_steps(
    logits: Float[Array, " E"],
    ids: Int[Array, " k"],
    weights: Float[Array, " k"],
    slots: Float[Array, "k D"] | None = None,
    *,
    piece: str | None = None,
    layer: int | None = None,
    title: str = "How the gate decides",
) -> Page:
    """Draw what one layer's gate does with one token.

    Parameters
    ----------
    logits : (E,) of the router
    ids, weights : (k,) the experts chosen, first choice first, and their gate weights
    slots : (k, D) what these experts computed, `trace["layers.0.experts.slots"][n]`; None leaves the sum out
    piece, layer : of which token and layer this is, for the title
    title : above all
    """
    logits, ids, weights = (np.asarray(x) for x in (logits, ids, weights))
    _check(logits, ids, weights)
    E, k = len(logits), len(ids)
    of = "" if piece is None else f" for “{drawable_piece(piece)[:24]}”"
    of += "" if layer is None else f" in layer {layer}"
    width = _LOGITS + _CHOICE + _WEIGHTS + (0 if slots is None else _SUM + _GAP)
    head = Head(title + of, _CAPTION, width)
    row = float(np.clip(3.6 / E, 0.07, 0.27))
    tall = max(E * row, 0.95 * (k + (slots is not None)))
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.3 + tall)
    top = head.draw(page)
    steps = ["1  logits", f"2  top {k}, softmax", *([] if slots is None else ["3  weighted sum"])]
    lefts = [MARGIN, MARGIN + _LOGITS + _CHOICE, MARGIN + _LOGITS + _CHOICE + _WEIGHTS + _GAP]
    for left, step in zip(lefts, steps, strict=False):
        page.write(left, top, step, 10, weight="bold")
    rows = (np.arange(E) + 0.5) * row + (tall - E * row) / 2
    lines = (np.arange(k) + 0.5) * tall / (k + (slots is not None))
    axes = page.box(MARGIN, top + 0.3, width, tall, frame=False)
    axes.set_xlim(0, width)
    axes.set_ylim(tall, 0)
    _draw_logits(axes, logits, ids, rows, row)
    for slot in range(k):
        _draw_arrow(axes, _LOGITS - 0.05, rows[ids[slot]], _LOGITS + _CHOICE - 0.1, lines[slot], int(ids[slot]))
    _draw_weights(axes, logits[ids], ids, weights, lines)
    if slots is not None:
        _draw_sum(axes, np.asarray(slots, np.float64), ids, weights.astype(np.float64), lines, tall)
    return page


def signed(value: float) -> str:
    """Two decimals, with a real minus.

    >>> signed(-1.5)
    '−1.50'
    """
    return f"{value:.2f}".replace("-", "−")


def _check(logits: Array, ids: Array, weights: Array) -> None:
    if logits.ndim != 1 or ids.ndim != 1 or ids.shape != weights.shape or not ids.size:
        raise ValueError(
            f"one token has logits (E,), ids (k,) and weights (k,), not {logits.shape}, {ids.shape}, {weights.shape}"
        )
    if ids.min() < 0:
        raise ValueError("this token was not routed: there is nothing to draw")
    if ids.max() >= len(logits):
        raise ValueError(f"ids {ids.tolist()} do not name experts of {len(logits)} logits")
    if not (np.isfinite(logits).all() and np.isfinite(weights).all()):
        raise ValueError("logits and weights must be finite: softmax has no meaning with NaN or Inf")


def _draw_logits(axes: Axes, logits: Float[Array, " E"], ids: Int[Array, " k"], rows: Array, row: float) -> None:
    """Draw bars to the left and right of zero; those not chosen are pale."""
    low, high = min(float(logits.min()), 0.0), max(float(logits.max()), 0.0)
    left, right = 0.75 if low < 0 else 0.4, _LOGITS - 0.55
    scale = (right - left) / max(high - low, 1e-9)
    zero = left - low * scale
    for e, logit in enumerate(logits):
        chosen, colour = e in ids, expert_colour(e)
        x = zero + float(logit) * scale
        axes.add_patch(
            Rectangle((min(x, zero), rows[e] - 0.4 * row), abs(x - zero), 0.8 * row, facecolor=colour, edgecolor=EDGE,
                      linewidth=0.4, alpha=1.0 if chosen else 0.35, gid=f"logit-{e}")
        )  # fmt: skip
        if row > 0.13 or chosen:
            _chip(axes, 0.12, rows[e], e, min(0.21, max(0.8 * row, 0.14)))
            end, side = (x + 0.05, "left") if logit >= 0 else (x - 0.05, "right")
            axes.text(end, rows[e], signed(float(logit)), fontsize=8, ha=side, va="center_baseline",
                      color=INK if chosen else FAINT, weight="bold" if chosen else "normal",
                      gid=f"logit-text-{e}")  # fmt: skip
    axes.plot([zero, zero], [rows[0] - row / 2, rows[-1] + row / 2], color=FAINT, linewidth=0.6)


def _chip(axes: Axes, x: float, y: float, expert: int, size: float = 0.24) -> None:
    colour = expert_colour(expert)
    box = Rectangle(
        (x - 0.12, y - size / 2), 0.24, size, facecolor=colour, edgecolor=EDGE, linewidth=0.4, clip_on=False
    )
    axes.add_patch(box)
    axes.text(x, y, str(expert), fontsize=min(8, 50 * size), ha="center", va="center", color=ink(colour))


def _draw_arrow(axes: Axes, x0: float, y0: float, x1: float, y1: float, expert: int) -> None:
    middle = (x0 + x1) / 2
    path = Path([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Path.MOVETO, *[Path.CURVE4] * 3])
    axes.add_patch(PathPatch(path, fill=False, edgecolor=expert_colour(expert), linewidth=2.2, capstyle="butt"))
    head = Path([(x1, y1 - 0.06), (x1 + 0.09, y1), (x1, y1 + 0.06), (x1, y1 - 0.06)])
    axes.add_patch(PathPatch(head, facecolor=expert_colour(expert), edgecolor="none"))


def _draw_weights(axes: Axes, chosen: Array, ids: Array, weights: Array, lines: Array) -> None:
    """Write exp(logit - largest) / sum = weight for every choice, with a bar as long as the weight."""
    left, largest = _LOGITS + _CHOICE, float(chosen.max())
    total = float(np.exp(chosen.astype(np.float64) - largest).sum())
    for slot, (expert, weight, y) in enumerate(zip(ids.tolist(), weights.tolist(), lines, strict=True)):
        _chip(axes, left + 0.12, y - 0.14, expert)
        difference = float(chosen[slot]) - largest
        axes.text(
            left + 0.34, y - 0.14, f"exp({signed(difference)}) / {total:.2f} =", fontsize=8.5, va="center", color=FAINT
        )
        axes.text(left + _WEIGHTS, y - 0.14, f"{weight:.3f}", fontsize=10, va="center", ha="right", weight="bold",
                  gid=f"weight-text-{slot}")  # fmt: skip
        axes.add_patch(Rectangle((left, y + 0.06), _WEIGHTS, 0.12, facecolor="#f0f0f0", edgecolor="none"))
        colour = expert_colour(expert)
        bar = Rectangle((left, y + 0.06), _WEIGHTS * weight, 0.12, facecolor=colour, linewidth=0, gid=f"weight-{slot}")
        axes.add_patch(bar)


def _draw_sum(axes: Axes, slots: Array, ids: Array, weights: Array, lines: Array, tall: float) -> None:
    """Draw each expert's output as a strip of D cells, and their weighted sum below a rule."""
    left, strip = _LOGITS + _CHOICE + _WEIGHTS + _GAP, _SUM - 0.75
    total = (weights[:, None] * slots).sum(axis=0)
    most = float(np.abs(np.concatenate([slots, total[None]])).max()) or 1.0
    last = tall - (tall - float(lines[-1])) * 0.5
    signs = ["  " + f"{weights[0]:.2f} ×", *(f"+ {w:.2f} ×" for w in weights[1:]), "="]
    for i, (y, sign) in enumerate(zip([*lines, last], signs, strict=True)):
        values, name = (slots[i], f"expert {ids[i]}'s output") if i < len(ids) else (total, "their sum")
        axes.text(left + 0.68, y, sign, fontsize=9, ha="right", va="center")
        axes.imshow(values[None], cmap=DIVERGING, norm=Normalize(-most, most), aspect="auto", interpolation="nearest",
                    extent=(left + 0.75, left + 0.75 + strip, y + 0.13, y - 0.13), gid=f"strip-{i}")  # fmt: skip
        axes.add_patch(Rectangle((left + 0.75, y - 0.13), strip, 0.26, fill=False, edgecolor=RULE, linewidth=0.6))
        axes.text(left + 0.75, y + 0.17, name, fontsize=7.5, va="top", color=FAINT)
    axes.text(left + 0.75 + strip, last + 0.17, f"±{most:.2g}: purple to brown", fontsize=7.5, va="top", ha="right",
              color=FAINT)  # fmt: skip
    rule = (float(lines[-1]) + last) / 2 + 0.05
    axes.plot([left, left + _SUM], [rule, rule], color=INK, linewidth=0.8)
    axes.set_xlim(0, left + _SUM)
    axes.set_ylim(tall, 0)
