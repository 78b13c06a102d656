"""Share of assignments per expert and layer, one panel per domain: figure 7 of arXiv 2401.04088, all layers at once."""

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
from minimoe.plots.page import FAINT, MARGIN, RULE, Page, styled
from minimoe.shapes import Array

# Purple is less than the even share, white is even, orange is more: told apart in any colour deficiency.
_COLOURS = LinearSegmentedColormap.from_list(
    "shares", ["#2d1e60", "#6a5aa8", "#b3abd4", "#ffffff", "#fdc878", "#e0861a", "#8f4a05"]
)
_SCALE = Normalize(-2, 2)  # log2 of share / even share: from a quarter to four times
_ROW = 0.25  # inches
_GAP, _HEAD, _FOOT, LEFT = 0.3, 0.26, 0.18, 0.36
_KEY = 0.5  # height of the key below the panels


@dataclass(frozen=True)
class SharesBlock:
    """The panels, as a block of a page."""

    shares: Float[Array, "G L E"]
    names: Sequence[str]
    columns: int = 3

    def height(self) -> float:
        """Inches that the block takes."""
        return math.ceil(len(self.names) / self.columns) * self._panel_height() + _KEY

    def draw(self, page: Page, left: float, top: float, width: float) -> None:
        """Draw the block on a page, in inches."""
        panel = (width - _GAP * (self.columns - 1)) / self.columns
        for i, name in enumerate(self.names):
            row, column = divmod(i, self.columns)
            x, y = left + column * (panel + _GAP), top + row * self._panel_height()
            page.write(x + LEFT, y, _shortened(name, panel - LEFT), 10, weight="bold")
            axes = page.box(x + LEFT, y + _HEAD, panel - LEFT, self._cells_height())
            _draw_panel(axes, np.asarray(self.shares[i]), panel - LEFT)
        _draw_key(page, left + LEFT, top + self.height() - _KEY + 0.04, self.shares.shape[2])

    def _cells_height(self) -> float:
        return _ROW * (int(self.shares.shape[1]) + 0.9)

    def _panel_height(self) -> float:
        return _HEAD + self._cells_height() + _FOOT


def _shortened(name: str, width: float) -> str:
    """Keep the end of a name, which tells files apart, at about a tenth of an inch per letter."""
    letters = max(int(width / 0.1), 8)
    return name if len(name) <= letters else "…" + name[1 - letters :]


def _draw_panel(axes: Axes, shares: Float[Array, "L E"], width: float) -> None:
    L, E = shares.shape
    with np.errstate(divide="ignore"):
        ratio = np.log2(shares * E)
    axes.imshow(np.clip(ratio, -2, 2), cmap=_COLOURS, norm=_SCALE, aspect="auto", extent=(-0.5, E - 0.5, L - 0.5, -0.5))
    axes.set_ylim(L - 0.5, -1.4)
    axes.spines[:].set_visible(False)
    axes.set_yticks([-0.95, *range(L)], ["layer", *map(str, range(L))], color=FAINT)
    for e in range(E):  # the heads, in the experts' own colours
        colour = expert_colour(e)
        axes.add_patch(Rectangle((e - 0.46, -1.3), 0.92, 0.68, facecolor=colour, edgecolor="none"))
        if width / E > 0.16:
            axes.text(e, -0.97, str(e), ha="center", va="center", fontsize=7.5, color=ink(colour))
    for line in range(1, E):
        axes.plot([line - 0.5] * 2, [-0.5, L - 0.5], color="white", linewidth=1)
    for line in range(1, L):
        axes.plot([-0.5, E - 0.5], [line - 0.5] * 2, color="white", linewidth=1)
    axes.add_patch(Rectangle((-0.5, -0.5), E, L, fill=False, edgecolor=RULE, linewidth=0.6))
    if width / E > 0.22:
        _write_numbers(axes, shares, np.clip(ratio, -2, 2))


def _write_numbers(axes: Axes, shares: Float[Array, "L E"], ratio: Float[Array, "L E"]) -> None:
    for (layer, e), share in np.ndenumerate(shares):
        if not np.isnan(share):
            red, green, blue = (round(255 * part) for part in _COLOURS(_SCALE(ratio[layer, e]))[:3])
            axes.text(
                e, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, gid=f"share-{layer}-{e}",
                color=ink(f"#{red:02x}{green:02x}{blue:02x}"),
            )  # fmt: skip


def _draw_key(page: Page, left: float, top: float, num_experts: int) -> None:
    """The scale from a quarter of the even share to four times of it."""
    axes = page.box(left + 0.3, top, 2.4, 0.13)
    axes.imshow(np.linspace(-2, 2, 128)[None], cmap=_COLOURS, norm=_SCALE, aspect="auto", extent=(-2, 2, 0, 1))
    axes.set_xticks([-2, -1, 0, 1, 2], ["¼ or less", "½", "even", "2×", "4× or more"], fontsize=8)
    axes.spines[:].set_color(RULE)
    text = f"Percent of a layer's assignments; even is {100 / num_experts:.3g}."
    page.write(left + 3.6, top - 0.01, text, 8.5, color=FAINT)


@styled
def expert_shares(
    shares: Float[Array, "G L E"], names: Sequence[str], *, title: str | None = None, columns: int = 3
) -> Page:
    """Draw the share of assignments per expert and layer, one panel per domain.

    Parameters
    ----------
    shares : (G, L, E) rows sum to 1; see `routing_statistics.shares`
    names : G names, the titles of the panels
    title : above all
    columns : panels side by side, at most
    """
    shares = np.asarray(shares)
    if shares.ndim != 3 or len(shares) != len(names):
        raise ValueError(f"shares must have shape (G, L, E) with G = {len(names)} names, not {shares.shape}")
    columns = min(columns, len(names))
    block = SharesBlock(shares, names, columns)
    panel = min(12.0 / columns, max(2.9, 0.3 * shares.shape[2] + LEFT))
    width = max(columns * panel + (columns - 1) * _GAP, 9.0 if columns > 1 else 8.4)
    head = 0.42 if title else 0.0
    page = Page(width + 2 * MARGIN, head + block.height() + 2 * MARGIN - 0.2)
    if title:
        page.write(MARGIN + LEFT, MARGIN, title, 13, weight="bold")
    block.draw(page, MARGIN, MARGIN + head, width if columns > 1 else panel)
    return page
