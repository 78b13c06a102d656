"""Which experts work on the same token: pairs, seen against what independent experts would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from minimoe.plots.heat import GAP, LEAST, ROW, HeatBlock, HeatPanel, draw_ratio_key, draw_unknown_key, log_ratio
from minimoe.plots.page import FAINT, MARGIN, Head, Page, checked_layers, styled
from minimoe.plots.tokens import middle_layers
from minimoe.routing_pairs import coactivation, independent_coactivation
from minimoe.routing_statistics import routed_ids
from minimoe.shapes import Array

_LEFT = 0.5
_NUMBERED = (
    "Percent of tokens that two experts share: below the diagonal as seen, above it as experts chosen this often, but "
    "independently, would. Colours compare the two."
)
_COLOURED = "How often two experts share a token, compared with experts that are chosen this often, but independently."


@styled
def expert_pairs(
    ids: Int[Array, "L N k"],
    num_experts: int,
    *,
    layers: Sequence[int] | None = None,
    title: str = "Experts that work together",
) -> Page:
    """Draw how often each pair of experts serves one token, a panel per layer.

    Below the diagonal stands what was seen, coloured by its ratio to what experts that do not care for each other would
    give; that expectation stands above the diagonal.

    Parameters
    ----------
    ids : (L, N, k), k at least 2
    num_experts : E
    layers : which to show; None shows the first, the middle and the last
    title : above all
    """
    ids = routed_ids(ids)
    L, _, k = ids.shape
    if k < 2:
        raise ValueError("each token has one expert only: there are no pairs")
    layers = checked_layers(layers, L, middle_layers(L))
    columns = min(3, len(layers))
    seen = coactivation(ids[layers], num_experts)
    expected = independent_coactivation(seen)
    tokens = (ids[layers, :, 0] >= 0).sum(axis=1)
    rows = [str(e) for e in range(num_experts)]
    panels = [
        HeatPanel(f"layer {layer}", _lower(log_ratio(seen[i], expected[i], LEAST)), rows,
                  _numbers(100 * seen[i] / max(tokens[i], 1), 100 * expected[i] / max(tokens[i], 1)))
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    panel = min(12.0 / columns, max(3.3, 0.36 * num_experts + _LEFT))
    width = max(columns * panel + (columns - 1) * GAP, 6.6)
    row = min(ROW, (panel - _LEFT) / num_experts)
    block = HeatBlock(panels, "pair", "", columns, _LEFT, row=row, experts_down=True)
    head = Head(title, _NUMBERED if block.numbered(panel) else _COLOURED, width)
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + block.height() + 0.6)
    top = head.draw(page)
    block.draw(page, MARGIN, top, columns * panel + (columns - 1) * GAP)
    draw_ratio_key(page, MARGIN + _LEFT + 0.3, top + block.height() + 0.04)
    even = 100 * k * (k - 1) / (num_experts * (num_experts - 1))
    text = f"With even use every pair would share {even:.3g} percent."
    y = top + block.height() + 0.04
    draw_unknown_key(page, MARGIN + _LEFT + 0.3, y + 0.36)
    page.write(MARGIN + _LEFT + 2.1, y + 0.35, text, 8.5, color=FAINT)
    return page


def _lower(ratio: Array) -> Array:
    """Colour the lower triangle: white elsewhere, grey on the diagonal, where no pair can be."""
    E = len(ratio)
    shown = np.where(np.tri(E, k=-1) > 0, ratio, 0.0)
    shown[np.arange(E), np.arange(E)] = np.nan
    return shown


def _numbers(seen: Array, expected: Array) -> list[list[str]]:
    E = len(seen)
    return [
        ["" if i == j else _short(seen[i, j]) if i > j else _short(expected[i, j]) for j in range(E)] for i in range(E)
    ]


def _short(percent: float) -> str:
    return f"{percent:.1f}" if percent < 9.95 else f"{percent:.0f}"
