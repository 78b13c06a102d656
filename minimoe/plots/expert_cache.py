"""How often the expert touched would still be in a cache, against the size of the cache."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from minimoe.expert_traffic import Traffic
from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, styled

_WIDE, _TALL, _LEFT = 6.6, 3.0, 0.45
_PALE, _DARK, _ONE = "#8fc1e3", "#12436d", "#b5541c"


@styled
def expert_cache(traffic: Traffic, *, seed: int = 0, title: str = "Experts found in a cache") -> Page:
    """Draw the hit rate of least-recently-used caches against the number of experts that they hold.

    Parameters
    ----------
    traffic : of a generation, from `expert_traffic.Watch`
    seed : of the choices that chance makes
    title : above all
    """
    L, E = traffic.expert_bytes.shape
    caches = traffic.layer_caches()
    if not caches.touches.any():
        raise ValueError("no expert was touched: there is nothing to draw")
    head = Head(
        title, "Percent of the reads of an expert that find it in a cache which drops the least recently used. Pale: "
        "each layer. Dark: all layers. Orange: one cache of as many experts in all, shared by the layers. Dashed: "
        "experts chosen evenly and independently. The first read of an expert always misses.", _WIDE,
    )  # fmt: skip
    page = Page(_WIDE + 2 * MARGIN, 2 * MARGIN + head.height + 0.1 + _TALL + 0.35)
    top = head.draw(page) + 0.1
    axes = page.chart(MARGIN + _LEFT, top, _WIDE - _LEFT, _TALL)
    for i in range(L):
        _draw(axes, caches.hit_rate[i], f"layer-{i}", color=_PALE, linewidth=0.9)
    _draw(axes, traffic.one_cache().hit_rate[L - 1 :: L], "one-cache", color=_ONE, linewidth=1.4)
    _draw(axes, traffic.chance(seed=seed), "chance", color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    _draw(axes, caches.together.hit_rate, "all", color=_DARK, linewidth=2.0)
    axes.set_ylim(0, 103)
    axes.set_xlim(1 - 0.5 * (E == 1), max(E, 1.5))
    axes.xaxis.set_major_locator(FixedLocator(range(1, E + 1)) if E <= 10 else MaxNLocator(10, integer=True))
    page.write(MARGIN + _WIDE, top + _TALL + 0.3, f"experts per layer that the cache holds, of {E}", 8.5, color=FAINT,
               ha="right")  # fmt: skip
    return page


def _draw(axes: Axes, rate: np.ndarray, gid: str, **style: object) -> None:
    """Draw one curve, with marks where there are few sizes."""
    few = len(rate) <= 16
    axes.plot(np.arange(1, len(rate) + 1), 100 * rate, gid=gid, clip_on=False, marker="o" if few else "", markersize=3,
              **style)  # type: ignore[arg-type]  # fmt: skip
