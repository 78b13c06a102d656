"""A figure laid out in inches from its top left corner, so that nothing is clipped and no state is shared.

Figures are built without pyplot: they need no display, and a notebook shows what a function returns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minimoe.colours import expert_colour, ink

INK, FAINT, RULE = "#1b1b1b", "#6b6b6b", "#d8d8d8"
MARGIN = 0.42  # inches around everything
MONO = "DejaVu Sans Mono"  # ships with matplotlib; one character is 0.602 of the font size wide
CHARACTER = 0.602 / 72  # inches per point of font size

_STYLE: Any = {
    "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE,
    "axes.linewidth": 0.6, "xtick.color": INK, "ytick.color": INK, "text.usetex": False, "text.parse_math": False,
}  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


class Page(Figure):
    """A figure of a given size, in inches."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=150, facecolor="white")

    def box(self, left: float, top: float, width: float, height: float, frame: bool = True) -> Axes:
        """Add axes at a place, without ticks."""
        W, H = self.get_size_inches()
        axes = self.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))
        axes.tick_params(length=0, labelsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        if not frame:
            axes.set_axis_off()
        return axes

    def write(self, left: float, top: float, text: str, size: float = 9, **style: Any) -> None:
        """Write text whose first line's upper edge is `top`."""
        W, H = self.get_size_inches()
        self.text(left / W, 1 - top / H, text, fontsize=size, va="top", **style)

    def chips(self, right: float, top: float, experts: Sequence[int], room: float) -> float:
        """Draw the legend of experts, one square each, up to `right`, in at most `room`; return where it begins."""
        pitch = min(0.24, room / max(len(experts), 1))
        size = 0.84 * pitch
        width = (len(experts) - 1) * pitch + size
        axes = self.box(right - width, top, width, 0.2, frame=False)
        axes.set_xlim(0, width)
        axes.set_ylim(0, 0.2)
        for i, expert in enumerate(experts):
            colour = expert_colour(expert)
            axes.add_patch(Rectangle((i * pitch, 0), size, 0.2, facecolor=colour, edgecolor="none"))
            if pitch > 0.15:
                x = i * pitch + size / 2
                axes.text(x, 0.094, str(expert), ha="center", va="center", fontsize=7.5, color=ink(colour))
        return right - width

    def _repr_png_(self) -> bytes:
        """What a notebook shows, whatever its backend."""
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in our style, whatever the user's settings, which stay as they are; texts are never read as mathematics."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn
