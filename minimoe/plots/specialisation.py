"""Which kinds of tokens an expert gets: words, digits, indents, brackets, against what its share would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from minimoe.plots.heat import (
    GAP,
    LEAST,
    HeatBlock,
    HeatPanel,
    draw_ratio_key,
    draw_unknown_key,
    log_ratio,
)  # fmt: skip
from minimoe.plots.page import MARGIN, Head, Page, checked_layers, styled
from minimoe.plots.shares import percents
from minimoe.plots.tokens import middle_layers
from minimoe.routing_pairs import independent, specialisation
from minimoe.routing_statistics import routed_ids
from minimoe.shapes import Array
from minimoe.token_types import TYPES

_LEFT = 1.62


@styled
def token_type_specialisation(
    ids: Int[Array, "L N k"],
    types: Int[Array, " N"],
    num_experts: int,
    *,
    names: Sequence[str] = TYPES,
    layers: Sequence[int] | None = None,
    title: str = "What kinds of tokens each expert gets",
) -> Page:
    """Draw a row per kind of token and a column per expert, a panel per layer.

    Parameters
    ----------
    ids : (L, N, k)
    types : (N,) kind of each token, as `token_types.token_types(pieces)` gives it; -1 is left out
    num_experts : E
    names : of the kinds; those that do not occur are not drawn
    layers : which to show; None shows the first, the middle and the last
    title : above all
    """
    ids = routed_ids(ids)
    layers = checked_layers(layers, len(ids), middle_layers(len(ids)))
    seen = specialisation(ids[layers], types, num_experts, len(names))
    expected = independent(seen)
    tokens = np.bincount(np.asarray(types)[np.asarray(types) >= 0], minlength=len(names))
    kept = np.flatnonzero(seen.sum(axis=(0, 2)))
    rows = [f"{names[y]} ({tokens[y]:,})" for y in kept.tolist()]
    totals = seen.sum(axis=2, keepdims=True)
    share = np.divide(seen, totals, out=np.full(seen.shape, np.nan), where=totals > 0)
    panels = [
        HeatPanel(f"layer {layer}", log_ratio(seen[i], expected[i], LEAST)[kept], rows, percents(share[i][kept]))
        for i, layer in enumerate(layers)
    ]
    columns = min(2, len(layers)) if num_experts <= 16 else 1
    panel = min(10.5, max(3.9, 0.27 * num_experts + _LEFT))
    width = max(columns * panel + (columns - 1) * GAP, 6.6)
    block = HeatBlock(panels, "type", "tokens", columns, _LEFT)
    numbers = "Percent of each kind's assignments, a row adds up to 100. " if block.numbered(panel) else ""
    told = "Colours: compared with the share of all tokens that the expert gets in this layer."
    head = Head(title, numbers + told, width)
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + block.height() + 0.3)
    top = head.draw(page)
    block.draw(page, MARGIN, top, columns * panel + (columns - 1) * GAP)
    draw_ratio_key(page, MARGIN + 0.3, top + block.height() + 0.04)
    draw_unknown_key(page, MARGIN + 3.5, top + block.height() + 0.04)
    return page
