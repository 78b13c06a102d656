"""A figure laid out in inches from its top left corner, so that nothing is clipped and no state is shared.

Figures are built without pyplot: they need no display, and a notebook shows what a function returns.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from minimoe.colours import expert_colour, ink
from minimoe.routing_statistics import routed_ids
from minimoe.shapes import Routing

INK, FAINT, RULE, GRID = "#1b1b1b", "#6b6b6b", "#d8d8d8", "#ececec"
EDGE = "#0000003c"  # around areas, so that the palest expert shows on white
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

    def chart(self, left: float, top: float, width: float, height: float, grid: str = "y") -> Axes:
        """Add axes for curves, bars or dots: two quiet spines, ticks, and light lines along `grid` ("x", "y", "")."""
        axes = self.box(left, top, width, height)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelsize=8, labelcolor=INK, pad=3)
        axes.set_axisbelow(True)
        if grid:
            axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
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


@dataclass(frozen=True)
class Head:
    """Title and caption of a picture, as wide as it is; the caption says how to read it."""

    title: str
    caption: str
    width: float

    @property
    def height(self) -> float:
        """Inches that it takes, with the space below."""
        return 0.42 + 0.17 * len(self._lines)

    @property
    def _lines(self) -> list[str]:
        return textwrap.wrap(self.caption, max(int(self.width / 0.0755), 20))

    def draw(self, page: Page, left: float = MARGIN, top: float = MARGIN) -> float:
        """Write it; return where the picture may begin."""
        page.write(left, top, shortened(self.title, self.width, 0.125), 13, weight="bold")
        for i, line in enumerate(self._lines):
            page.write(left, top + 0.28 + 0.17 * i, line, 9, color=FAINT)
        return top + self.height


def checked_routing(routing: Routing | None, num_tokens: int | None = None, **needed: bool) -> Routing:
    """Return the routing if there is something to draw.

    Parameters
    ----------
    routing : None is what a dense model has
    num_tokens : how many there must be
    needed : `weights=True`, `logits=True`: what it must carry besides the ids
    """
    if routing is not None and not isinstance(routing, Routing):
        raise ValueError(f"routing must be a minimoe.Routing, such as model.trace(text).routing, not {type(routing)}")
    ids = routed_ids(None if routing is None else routing.ids)
    assert routing is not None
    if num_tokens is not None and ids.shape[1] != num_tokens:
        raise ValueError(f"routing is of {ids.shape[1]} tokens, beside {num_tokens} pieces of text")
    for name in needed:
        if getattr(routing, name) is None:
            raise ValueError(f"this picture needs the router's {name}, which this Routing does not carry")
    return routing


def checked_layers(layers: Sequence[int] | None, num_layers: int, default: Sequence[int]) -> list[int]:
    """Return the layers to show."""
    chosen = list(default if layers is None else layers)
    if not chosen or not all(0 <= layer < num_layers for layer in chosen):
        raise ValueError(f"layers must name some of the {num_layers} layers from 0, not {chosen}")
    return chosen


def shortened(text: str, width: float, letter: float = 0.1) -> str:
    """Keep the end of a text, which tells files apart, that fits into so many inches."""
    letters = max(int(width / letter), 8)
    return text if len(text) <= letters else "…" + text[1 - letters :]


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in our style, whatever the user's settings, which stay as they are; texts are never read as mathematics."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn
