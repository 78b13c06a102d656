"""Panels of coloured cells, an expert each column: what several pictures of shares and ratios are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from minimoe.colours import expert_colour, ink
from minimoe.plots.page import FAINT, RULE, Page, shortened
from minimoe.shapes import Array

UNKNOWN = "#e4e4e4"  # cells without a value

# Purple is less than expected, white is as expected, orange is more: told apart in any colour deficiency.
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#2d1e60", "#6a5aa8", "#b3abd4", "#ffffff", "#fdc878", "#e0861a", "#8f4a05"]
).with_extremes(bad=UNKNOWN)
RATIOS = Normalize(-2, 2)  # log2 of what was seen / what was expected: from a quarter to four times
ROW, GAP, HEAD, FOOT = 0.25, 0.3, 0.26, 0.18  # inches


LEAST = 5  # a count that is expected to be smaller says nothing about a ratio (the usual rule for tables)


def log_ratio(seen: Array, expected: Array, least: float = 0.0) -> Array:
    """Return log2(seen / expected), held between -2 and 2; NaN where nothing, or less than `least`, was expected."""
    seen, expected = np.broadcast_arrays(np.asarray(seen, np.float64), np.asarray(expected, np.float64))
    with np.errstate(divide="ignore"):
        ratio = np.divide(seen, expected, out=np.full(seen.shape, np.nan), where=(expected > 0) & (expected >= least))
        return np.clip(np.log2(ratio), -2, 2)


@dataclass(frozen=True)
class HeatPanel:
    """One panel.

    Attributes
    ----------
    title : above it
    values : (R, E) in the units of the norm
    rows : R labels
    numbers : (R, E) texts for the cells, "" for none
    sure : (R, E) whether the number is written in bold; None is nowhere
    """

    title: str
    values: Float[Array, "R E"]
    rows: Sequence[str]
    numbers: Sequence[Sequence[str]] = ()
    sure: Array | None = None


@dataclass(frozen=True)
class HeatBlock:
    """Panels side by side, as a block of a page.

    Attributes
    ----------
    gid : the numbers carry the ids `gid-row-column`
    corner : what the rows are
    left : inches for the rows' labels
    row : inches of one row
    experts_down : whether the rows, too, are experts
    """

    panels: Sequence[HeatPanel]
    gid: str
    corner: str = "layer"
    columns: int = 3
    left: float = 0.36
    norm: Normalize = RATIOS
    row: float = ROW
    experts_down: bool = False

    def height(self) -> float:
        """Inches that the block takes."""
        return math.ceil(len(self.panels) / self.columns) * self._panel_height()

    def draw(self, page: Page, left: float, top: float, width: float) -> None:
        """Draw the block on a page, in inches."""
        panel = (width - GAP * (self.columns - 1)) / self.columns
        for i, one in enumerate(self.panels):
            line, column = divmod(i, self.columns)
            x, y = left + column * (panel + GAP) + self.left, top + line * self._panel_height()
            page.write(x, y, shortened(one.title, panel - self.left), 10, weight="bold")
            axes = page.box(x, y + HEAD, panel - self.left, self._cells_height())
            self._draw_panel(axes, one, panel - self.left)

    def numbered(self, panel_width: float) -> bool:
        """Say whether the cells of panels this wide have room for their numbers."""
        longest = max((len(text) for panel in self.panels for row in panel.numbers for text in row), default=0)
        cell = (panel_width - self.left) / self.panels[0].values.shape[1]
        return longest > 0 and cell > 0.09 + 0.065 * longest and self.row >= 0.17

    def _cells_height(self) -> float:
        return self.row * len(self.panels[0].rows) + 0.9 * ROW

    def _panel_height(self) -> float:
        return HEAD + self._cells_height() + FOOT

    def _draw_panel(self, axes: Axes, panel: HeatPanel, width: float) -> None:
        R, E = panel.values.shape
        axes.imshow(
            panel.values, cmap=DIVERGING, norm=self.norm, aspect="auto", extent=(-0.5, E - 0.5, R - 0.5, -0.5),
            interpolation="nearest",
        )  # fmt: skip
        rows_above = 0.9 * ROW / self.row  # the heads' height, in rows
        axes.set_ylim(R - 0.5, -0.5 - rows_above)
        axes.set_xlim(-0.5, E - 0.5)
        axes.spines[:].set_visible(False)
        self._label_rows(axes, panel.rows, rows_above)
        for e in range(E):  # the heads, in the experts' own colours
            colour, y = expert_colour(e), -0.5 - 0.9 * rows_above
            axes.add_patch(Rectangle((e - 0.46, y), 0.92, 0.76 * rows_above, facecolor=colour, edgecolor="none"))
            if width / E > 0.16:
                axes.text(
                    e, y + 0.37 * rows_above, str(e), ha="center", va="center", fontsize=7.5, color=ink(colour)
                )  # fmt: skip
        if width / E <= 0.16:
            every = 8 * math.ceil(0.3 * E / width / 8)
            axes.set_xticks(range(0, E, every), [str(e) for e in range(0, E, every)], color=FAINT)
        if self.row >= 0.1:
            _draw_lines(axes, R, E)
        axes.add_patch(Rectangle((-0.5, -0.5), E, R, fill=False, edgecolor=RULE, linewidth=0.6))
        if self.numbered(width + self.left):
            self._write_numbers(axes, panel)

    def _label_rows(self, axes: Axes, rows: Sequence[str], rows_above: float) -> None:
        every = math.ceil(0.14 / self.row)  # labels must not touch
        shown = [i for i in range(len(rows)) if i % every == 0]
        places, labels = [-0.5 - 0.5 * rows_above, *shown], [self.corner, *(rows[i] for i in shown)]
        axes.set_yticks(places, labels, color=FAINT)
        if not self.experts_down:
            return
        for i, label in enumerate(axes.get_yticklabels()[1:]):
            colour = expert_colour(shown[i])
            label.set(color=ink(colour), fontsize=7.5)
            label.set_bbox({"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"})

    def _write_numbers(self, axes: Axes, panel: HeatPanel) -> None:
        for (row, e), value in np.ndenumerate(panel.values):
            red, green, blue = (round(255 * part) for part in DIVERGING(self.norm(value))[:3])
            colour, sure = ink(f"#{red:02x}{green:02x}{blue:02x}"), panel.sure is None or panel.sure[row, e]
            if not sure and min(red, green, blue) > 200:
                colour = FAINT
            if panel.numbers[row][e]:
                axes.text(
                    e, row, panel.numbers[row][e], ha="center", va="center", fontsize=8, gid=f"{self.gid}-{row}-{e}",
                    color=colour, weight="bold" if sure and panel.sure is not None else "normal",
                )  # fmt: skip


def _draw_lines(axes: Axes, R: int, E: int) -> None:
    for line in range(1, E):
        axes.plot([line - 0.5] * 2, [-0.5, R - 0.5], color="white", linewidth=1)
    for line in range(1, R):
        axes.plot([-0.5, E - 0.5], [line - 0.5] * 2, color="white", linewidth=1)


def draw_key(
    page: Page, left: float, top: float, ticks: Sequence[float], labels: Sequence[str], norm: Normalize
) -> None:
    """Draw the scale of the colours, 2.4 inches wide, with its labels below."""
    axes = page.box(left, top, 2.4, 0.13)
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    axes.imshow(
        np.linspace(low, high, 128)[None], cmap=DIVERGING, norm=norm, aspect="auto", extent=(low, high, 0, 1)
    )  # fmt: skip
    axes.set_xticks(list(ticks), list(labels), fontsize=8)
    axes.spines[:].set_color(RULE)


def draw_ratio_key(page: Page, left: float, top: float, middle: str = "as expected") -> None:
    """Draw the scale from a quarter of what was expected to four times of it, 3 inches with its labels."""
    draw_key(page, left, top, [-2, -1, 0, 1, 2], ["¼ or less", "½", middle, "2×", "4× or more"], RATIOS)


def draw_unknown_key(page: Page, left: float, top: float, text: str = f"fewer than {LEAST} expected") -> None:
    """Explain the grey cells."""
    axes = page.box(left, top, 0.2, 0.13, frame=False)
    axes.add_patch(Rectangle((0, 0), 1, 1, facecolor=UNKNOWN, edgecolor="none"))
    page.write(left + 0.27, top - 0.01, text, 8.5, color=FAINT)
