"""Share of tokens per expert, a row of panels per domain and a column per layer: figure 7 of arXiv 2401.04088."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from minimoe.colours import expert_colour
from minimoe.plots.page import EDGE, FAINT, INK, MARGIN, Head, Page, checked_layers, shortened, styled
from minimoe.plots.shares import checked_shares
from minimoe.plots.tokens import middle_layers
from minimoe.shapes import Array

_NAME, _WIDE, _TALL, _GAP = 1.5, 2.9, 0.85, 0.3


@styled
def domain_shares(
    shares: Float[Array, "G L E"],
    names: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    title: str = "Share of each domain that every expert gets",
) -> Page:
    """Draw a bar per expert against the even share 1/E, for some layers.

    Parameters
    ----------
    shares : (G, L, E) rows sum to 1; see `routing_statistics.shares`
    names : G domains
    layers : which to show; None shows the first, the middle and the last, as the paper does
    title : above all
    """
    shares = checked_shares(shares, names)
    G, L, E = shares.shape
    layers = checked_layers(layers, L, middle_layers(L))
    if np.isnan(shares[:, list(layers)]).all():
        raise ValueError("all shares are NaN: no token was routed, there is nothing to draw")
    wide = _WIDE if len(layers) <= 3 else max(1.4, 9.3 / len(layers))
    width = max(_NAME + len(layers) * (wide + _GAP) - _GAP, 6.0)
    head = Head(title, f"Percent of a layer's assignments. Dashed: the even share, {100 / E:.3g}.", width)
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.3 + G * (_TALL + 0.16) + 0.12)
    top = head.draw(page)
    highest = 1.22 * max(float(np.nanmax(shares[:, list(layers)])), 1 / E)
    for j, layer in enumerate(layers):
        left = MARGIN + _NAME + j * (wide + _GAP)
        page.write(left, top, f"layer {layer}", 10, weight="bold")
        for g, name in enumerate(names):
            y = top + 0.3 + g * (_TALL + 0.16)
            if j == 0:
                page.write(MARGIN, y + _TALL - 0.3, shortened(name, _NAME - 0.35, 0.085), 9.5)
            axes = page.chart(left, y, wide, _TALL, grid="")
            _draw_bars(axes, shares[g, layer], wide, highest, f"share-{g}-{layer}", ticks=j == 0, last=g == G - 1)
    return page


def _draw_bars(
    axes: Axes, shares: Float[Array, " E"], width: float, highest: float, gid: str, ticks: bool, last: bool
) -> None:
    E = len(shares)
    axes.set_xlim(-0.6, E - 0.4)
    axes.set_ylim(0, 100 * highest)
    axes.spines[["left"]].set_visible(False)
    for e, share in enumerate(shares):
        if np.isnan(share):
            continue
        axes.bar([e], [100 * share], 0.82, color=expert_colour(e), edgecolor=EDGE, linewidth=0.4, gid=f"{gid}-{e}")
        if width / E > 0.24:
            crossed = share < 1 / E < share + 0.17 * highest  # the dashed line would strike the number through
            y = 100 * max(share, 1 / E if crossed else 0) + 2 * highest
            axes.text(e, y, f"{100 * share:.0f}", ha="center", va="bottom", fontsize=7)
    if np.isnan(shares).all():
        axes.text(0, 10 * highest, "nothing was routed", fontsize=8, color=FAINT)
    axes.axhline(100 / E, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_yticks([0, 100 / E] if ticks and highest < 5 / E else [0] if ticks else [])
    axes.yaxis.set_major_formatter("{x:.3g}")
    every = max(1, round(0.22 * E / width))
    every = every if every < 3 else 8 * math.ceil(0.3 * E / width / 8)
    axes.set_xticks(range(0, E, every), [str(e) for e in range(0, E, every)] if last else [])
