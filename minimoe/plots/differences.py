"""Where two models, or one model in two dtypes, choose different experts: per layer, and against the margin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, checked_routing, styled
from minimoe.routing_statistics import chance_of_difference, choice_differences
from minimoe.shapes import Array, Routing

_BARS, _CURVE, _TALL, _GAP = 4.2, 4.8, 2.7, 0.75
_BAR, _LINE = "#6f9fc2", "#12436d"


@styled
def routing_differences(
    a: Routing | None,
    b: Routing | None,
    *,
    names: Sequence[str] = ("the first", "the second"),
    bins: int = 24,
    title: str = "Tokens whose experts differ",
) -> Page:
    """Draw the share of tokens whose set of experts differs: per layer, and by the margin that the first model had.

    Parameters
    ----------
    a, b : routing of the same tokens; `a` with logits
    names : what they are
    bins : of the margin, equally many tokens in each
    title : above all
    """
    a, b = checked_routing(a, logits=True), checked_routing(b)
    different = choice_differences(a.ids, b.ids)  # (L, N)
    routed = (np.asarray(a.ids)[..., 0] >= 0) & (np.asarray(b.ids)[..., 0] >= 0)
    margins = np.asarray(a.margins, np.float64)
    if np.isnan(margins[routed]).any():
        raise ValueError(f"the router's logits of {names[0]} hold NaN: there is no margin")
    E, k = np.asarray(a.logits).shape[-1], a.ids.shape[-1]
    count, total = int(different[routed].sum()), int(routed.sum())
    width = _BARS + _GAP + _CURVE
    head = Head(
        f"{title}: {names[0]}, {names[1]}", f"{count:,} of {total:,} choices ({100 * count / max(total, 1):.3g}%); "
        f"routers that choose evenly and independently would differ in {100 * chance_of_difference(E, k):.3g}%.", width,
    )  # fmt: skip
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.35 + _TALL + 0.42)
    top = head.draw(page)
    page.write(MARGIN, top, "By layer", 10, weight="bold")
    page.write(MARGIN + 0.85, top + 0.015, "percent of tokens", 8.5, color=FAINT)
    _draw_layers(page.chart(MARGIN + 0.4, top + 0.35, _BARS - 0.4, _TALL), different & routed, routed)
    left = MARGIN + _BARS + _GAP
    page.write(left, top, "By margin", 10, weight="bold")
    page.write(left + 1.0, top + 0.015, "percent of tokens; each step holds equally many tokens", 8.5, color=FAINT)
    axes = page.chart(left + 0.1, top + 0.35, _CURVE - 0.1, _TALL)
    _draw_margins(axes, margins[routed], different[routed], bins)
    return page


def _draw_layers(axes: Axes, different: Bool[Array, "L N"], routed: Bool[Array, "L N"]) -> None:
    counts = routed.sum(axis=1)
    share = np.divide(different.sum(axis=1), counts, out=np.full(len(counts), np.nan), where=counts > 0)
    L = len(share)
    for layer, value in enumerate(100 * share):
        if not np.isnan(value):
            axes.bar([layer], [value], 0.72, color=_BAR, gid=f"differs-{layer}")
            if L <= 12:
                axes.annotate(f"{value:.2g}", (layer, value), (0, 2), textcoords="offset points", fontsize=7.5,
                              ha="center", va="bottom", color=FAINT if value == 0 else INK)  # fmt: skip
    axes.set_xlim(-0.6, L - 0.4)
    axes.set_ylim(0, max(1.12 * 100 * float(np.nanmax(share)), 1e-3))
    every = 1 if L <= 12 else 4
    axes.set_xticks(range(0, L, every))
    axes.set_xlabel("layer", fontsize=8.5, color=FAINT)


def margin_bins(
    margins: Float[Array, " M"], different: Bool[Array, " M"], bins: int
) -> tuple[Float[Array, " bins+1"], Float[Array, " bins"]]:
    """Split choices into bins of equally many by their margin; return the edges, and the share that differs in each."""
    order = np.argsort(margins, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    edges = np.array([*(margins[part[0]] for part in parts), margins[order[-1]]])
    return edges, np.array([different[part].mean() for part in parts])


def _draw_margins(axes: Axes, margins: Float[Array, " M"], different: Bool[Array, " M"], bins: int) -> None:
    """Draw steps over the margin, and one tick below for every choice that differs."""
    if not np.isfinite(margins).all():  # k = E: nothing to choose, margins are infinite
        axes.text(0.5, 0.5, "every token uses all experts: there is no margin", transform=axes.transAxes, ha="center",
                  fontsize=9, color=FAINT)  # fmt: skip
        axes.set_xticks([])
        return
    edges, share = margin_bins(margins, different, bins)
    low = max(float(edges[1]) / 30, float(margins[margins > 0].min(initial=np.inf)) if (margins > 0).any() else 1e-6)
    axes.set_xscale("log")
    axes.stairs(100 * share, np.maximum(edges, low), fill=True, color=_BAR, gid="by-margin")
    found = np.maximum(margins[different], low)
    highest = max(1.12 * 100 * float(share.max()), 1e-3)
    axes.plot(found, np.full(len(found), -0.05 * highest), linestyle="", marker="|", markersize=6, color=_LINE,
              markeredgewidth=0.7, alpha=0.7, gid="differing")  # fmt: skip
    axes.set_ylim(-0.1 * highest, highest)
    axes.set_xlim(0.8 * low, 1.05 * float(edges[-1]))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("margin in logits; a tick for each choice that differs", fontsize=8.5, color=FAINT)
