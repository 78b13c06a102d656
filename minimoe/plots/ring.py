"""The rolling key/value cache as a ring: which position each slot holds, what the window covers, what is written next.

Position p lives in slot p mod R, R = min(W, longest sequence). Source: Jiang et al., Mistral 7B, arXiv 2310.06825,
section 2 and figure 2 (rolling buffer cache).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Wedge

from minimoe.colours import ink
from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, styled
from minimoe.shapes import Array

_SIZE, _OUTER, _INNER = 4.6, 1.0, 0.66
_NEXT = "#d55e00"


@styled
def cache_ring(
    positions: Int[Array, " R"],
    next_position: int,
    *,
    window: int | None = None,
    title: str = "The cache as a ring",
) -> Page:
    """Draw the slots of one sequence's cache around a circle, slot 0 at the top, clockwise.

    Parameters
    ----------
    positions : (R,) the position each slot holds, -1 = empty: `cache.positions[b]`
    next_position : the position of the next token
    window : W, or None
    title : above all
    """
    positions = np.asarray(positions)
    _check(positions, next_position)
    R, slot = len(positions), next_position % len(positions)
    age = next_position - positions
    seen = (positions >= 0) & (age > 0) & (age < (math.inf if window is None else window))
    size = "one slot" if R == 1 else f"{R} slots"
    limit = "no window" if window is None else f"window {window}"
    told = (
        f"{size}, {limit}. Inside, the position that a slot holds, the later the darker; outside, the slot's number. "
        f"Hatched: no longer in the window of position {next_position}; white: empty."
    )
    head = Head(title, told, _SIZE)
    page = Page(_SIZE + 2 * MARGIN, 2 * MARGIN + head.height + _SIZE)
    top = head.draw(page)
    axes = page.box(MARGIN, top, _SIZE, _SIZE, frame=False)
    axes.set_xlim(-1.22, 1.22)
    axes.set_ylim(-1.22, 1.22)
    newest = max(int(positions.max()), 0)
    for i in range(R):
        _draw_slot(axes, i, R, int(positions[i]), bool(seen[i]), newest, i == slot)
    _draw_next(axes, slot, R, next_position, int(positions[slot]), window)
    return page


def _check(positions: Array, next_position: int) -> None:
    if positions.ndim != 1 or not positions.size or not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"positions must be integers of shape (R,), those of one sequence, not {positions.shape}")
    if next_position < 0:
        raise ValueError(f"next_position must be at least 0, not {next_position}")
    R, held = len(positions), positions >= 0
    if (positions[held] % R != np.flatnonzero(held)).any():
        raise ValueError(f"position p must be in slot p mod {R}, which {positions.tolist()[:8]} … are not")


def _angles(slot: int, R: int) -> tuple[float, float]:
    """Begin and end of a slot, which are counted clockwise from the top, in degrees counterclockwise from the right."""
    return 90 - 360 * (slot + 1) / R, 90 - 360 * slot / R


def _draw_slot(axes: Axes, slot: int, R: int, position: int, seen: bool, newest: int, is_next: bool) -> None:
    low, high = _angles(slot, R)
    if position < 0:
        colour = "#ffffff"
    elif seen:
        colour = to_hex(colormaps["Blues"](0.85 - 0.65 * (newest - position) / max(R - 1, 1)))
    else:
        colour = "#e6e6e6"
    wedge = Wedge((0, 0), _OUTER, low, high, width=_OUTER - _INNER, facecolor=colour, linewidth=0.8,
                  edgecolor="#9a9a9a" if position < 0 or seen else "#b5b5b5", gid=f"slot-{slot}",
                  hatch="" if position < 0 or seen else "////")  # fmt: skip
    axes.add_patch(wedge)
    if is_next:
        frame = {"fill": False, "edgecolor": _NEXT, "linewidth": 2.6, "zorder": 4}
        axes.add_patch(Wedge((0, 0), _OUTER, low, high, width=_OUTER - _INNER, **frame))
    every = math.ceil(R / 32)
    if slot % every and not is_next:
        return
    angle = math.radians((low + high) / 2)
    size = 9 if R <= 16 else 7
    if position >= 0 and R <= 32:
        x, y = ((_OUTER + _INNER) / 2 * turn(angle) for turn in (math.cos, math.sin))
        weight = "bold" if seen else "normal"
        axes.text(x, y, str(position), fontsize=size, ha="center", va="center", color=ink(colour), weight=weight,
                  gid=f"position-{slot}")  # fmt: skip
    if not (every > 1 and is_next and slot % every):
        axes.text(1.1 * math.cos(angle), 1.1 * math.sin(angle), str(slot), fontsize=7.5, ha="center", va="center",
                  color=FAINT)  # fmt: skip


def _draw_next(axes: Axes, slot: int, R: int, next_position: int, held: int, window: int | None) -> None:
    angle = math.radians(sum(_angles(slot, R)) / 2)
    x, y = math.cos(angle), math.sin(angle)
    arrow = FancyArrowPatch(
        (0.49 * x, 0.49 * y), (0.645 * x, 0.645 * y), arrowstyle="-|>", mutation_scale=13, color=_NEXT, linewidth=1.8
    )
    axes.add_patch(arrow)
    lines = [f"position {next_position}", f"→ slot {next_position} mod {R} = {slot}"]
    if held >= 0:
        gone = window is not None and next_position - held >= window
        lines.append(f"replaces {held}," if gone else f"replaces {held}")
        lines += ["which left the window"] if gone else []
    for i, line in enumerate(lines):
        axes.text(0, 0.07 * len(lines) - 0.07 - 0.14 * i, line, fontsize=8 if i else 9, ha="center", va="center",
                  color=FAINT if i else INK, weight="normal" if i else "bold")  # fmt: skip
