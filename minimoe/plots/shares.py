"""Share of assignments per expert and layer, one panel per domain: figure 7 of arXiv 2401.04088, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from minimoe.plots.heat import GAP, HeatBlock, HeatPanel, draw_ratio_key, log_ratio
from minimoe.plots.page import FAINT, MARGIN, Page, styled
from minimoe.shapes import Array

LEFT = 0.36
_KEY = 0.5  # height of the key below the panels


@dataclass(frozen=True)
class SharesBlock:
    """The panels, as a block of a page."""

    shares: Float[Array, "G L E"]
    names: Sequence[str]
    columns: int = 3

    def height(self) -> float:
        """Inches that the block takes."""
        return self._panels().height() + _KEY

    def draw(self, page: Page, left: float, top: float, width: float) -> None:
        """Draw the block on a page, in inches."""
        panels = self._panels()
        panels.draw(page, left, top, width)
        even = 100 / int(self.shares.shape[2])
        y = top + panels.height() + 0.04
        draw_ratio_key(page, left + LEFT + 0.3, y, "even")
        text = f"Percent of a layer's assignments; even is {even:.3g}."
        page.write(left + LEFT + 3.6, y - 0.01, text, 8.5, color=FAINT)

    def _panels(self) -> HeatBlock:
        G, L, E = self.shares.shape
        values = log_ratio(self.shares, np.where(np.isnan(self.shares), 0, 1 / E))  # NaN: nothing was routed
        rows = [str(layer) for layer in range(L)]
        panels = [HeatPanel(self.names[g], values[g], rows, percents(self.shares[g])) for g in range(G)]
        return HeatBlock(panels, "share", columns=self.columns, left=LEFT)


def percents(shares: Float[Array, "R E"]) -> list[list[str]]:
    """Write shares as whole percents; nothing where they are not known."""
    return [["" if np.isnan(x) else f"{100 * x:.0f}" for x in row] for row in np.asarray(shares)]


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
    shares = checked_shares(shares, names)
    columns = min(columns, len(names))
    block = SharesBlock(shares, names, columns)
    panel = min(12.0 / columns, max(2.9, 0.3 * shares.shape[2] + LEFT))
    width = max(columns * panel + (columns - 1) * GAP, 9.0 if columns > 1 else 8.4)
    head = 0.42 if title else 0.0
    page = Page(width + 2 * MARGIN, head + block.height() + 2 * MARGIN - 0.2)
    if title:
        page.write(MARGIN + LEFT, MARGIN, title, 13, weight="bold")
    block.draw(page, MARGIN, MARGIN + head, width if columns > 1 else panel)
    return page


def checked_shares(shares: Float[Array, "G L E"], names: Sequence[str]) -> Float[Array, "G L E"]:
    """Return shares as an array, if there is one table (L, E) for each name."""
    shares = np.asarray(shares, np.float64)
    if shares.ndim != 3 or len(shares) != len(names) or not shares.size:
        raise ValueError(f"shares must have shape (G, L, E) with G = {len(names)} names, not {shares.shape}")
    return shares
