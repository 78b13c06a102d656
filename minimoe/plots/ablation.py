"""What it costs each domain to switch an expert off: causal evidence beside the shares, which are correlation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Normalize

from minimoe.ablation import Ablation
from minimoe.plots.heat import GAP, HeatBlock, HeatPanel, draw_key
from minimoe.plots.page import FAINT, MARGIN, Head, Page, styled
from minimoe.shapes import Array

_LEFT = 0.36


@styled
def switched_off(ablation: Ablation, *, columns: int = 3, title: str = "What it costs to switch an expert off") -> Page:
    """Draw the rise of the loss for every expert of every layer, a panel per domain.

    Parameters
    ----------
    ablation : from `ablation.switch_off`
    columns : panels side by side, at most
    title : above all
    """
    G, L, E = ablation.costs.shape
    if np.isnan(ablation.costs).all():
        raise ValueError("no expert was switched off: there is nothing to draw")
    columns = min(columns, G)
    most = float(np.nanquantile(np.abs(ablation.costs), 0.99)) or 1e-3
    norm = Normalize(-most, most)
    rows = [str(layer) for layer in range(L)]
    sure = np.abs(ablation.costs) > 2 * ablation.errors
    panels = [
        HeatPanel(f"{name} ({ablation.losses[g]:.2f})", np.clip(ablation.costs[g], -most, most), rows,
                  _hundredths(ablation.costs[g]), sure[g])
        for g, name in enumerate(ablation.names)
    ]  # fmt: skip
    panel = min(12.0 / columns, max(3.1, 0.34 * E + _LEFT))
    width = max(columns * panel + (columns - 1) * GAP, 7.6)
    block = HeatBlock(panels, "cost", columns=columns, left=_LEFT, norm=norm)
    told = (
        "By how many hundredths of a nat per token the loss rises when the gate of one layer may not choose one "
        "expert. In brackets the domain's loss with all experts."
    )
    sure_told = " Bold: further than two standard errors from zero." if block.numbered(panel) else ""
    head = Head(title, told + sure_told, width)
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + block.height() + 0.4)
    top = head.draw(page)
    block.draw(page, MARGIN, top, columns * panel + (columns - 1) * GAP)
    y = top + block.height() + 0.04
    ticks = [-most, -most / 2, 0, most / 2, most]
    draw_key(page, MARGIN + _LEFT + 0.2, y, ticks, [f"{100 * tick:.2g}".replace("-", "−") for tick in ticks], norm)
    page.write(MARGIN + _LEFT + 2.95, y - 0.01, "hundredths of a nat per token", 8.5, color=FAINT)
    return page


def _hundredths(costs: Float[Array, "L E"]) -> list[list[str]]:
    return [["" if np.isnan(cost) else _rounded(100 * float(cost)) for cost in row] for row in costs]


def _rounded(value: float) -> str:
    """A whole number, with a real minus, and no -0."""
    whole = round(value)
    return str(whole) if whole >= 0 else f"−{-whole}"
