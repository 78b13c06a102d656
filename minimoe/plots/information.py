"""What a router's first choice tells about token and text, layer by layer, against shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, styled
from minimoe.shapes import Array

_WIDE, _TALL, _GAP, _LEFT = 2.35, 1.9, 0.3, 0.45


@styled
def choice_information(
    bits: Mapping[str, tuple[Float[Array, " L"], Float[Array, "R L"]]],
    num_experts: int,
    *,
    title: str = "What the first choice tells",
) -> Page:
    """Draw a panel per question: the information in bits, a dot per layer, and what R shuffles gave as a grey band.

    Parameters
    ----------
    bits : what it is told about -> (measured (L,), shuffled (R, L))
    num_experts : E; a choice can tell log2(E) bits at most
    title : above all
    """
    if not bits:
        raise ValueError("no information was measured: there is nothing to draw")
    n = len(bits)
    width = max(_LEFT + n * _WIDE + (n - 1) * _GAP, 6.0)
    head = Head(
        title, f"Bits per layer, at most {np.log2(num_experts):.3g}. Grey: between the least and the most of the "
        "shuffles, whose mean is dashed.", width,
    )  # fmt: skip
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.3 + _TALL + 0.4)
    top = head.draw(page)
    highest = max(max(float(np.max(x)) for x in pair) for pair in bits.values())
    for i, (name, (seen, shuffled)) in enumerate(bits.items()):
        left = MARGIN + _LEFT + i * (_WIDE + _GAP)
        page.write(left, top - 0.02, name, 10, weight="bold")
        axes = page.chart(left, top + 0.3, _WIDE, _TALL)
        _draw_panel(axes, np.asarray(seen), np.asarray(shuffled), f"bits-{i}")
        axes.set_ylim(-0.03 * max(highest, 0.1), 1.08 * max(highest, 0.1))
        axes.set_xlabel("layer", fontsize=8, color=FAINT)
        if i:
            axes.set_yticklabels([])
    return page


def _draw_panel(axes: Axes, seen: Float[Array, " L"], shuffled: Float[Array, "R L"], gid: str) -> None:
    layers = np.arange(len(seen))
    low, high = shuffled.min(axis=0), shuffled.max(axis=0)
    x = layers if len(layers) > 1 else np.array([-0.3, 0.3])  # a band of one layer would have no width
    low, high, mean = (np.broadcast_to(part, x.shape) for part in (low, high, shuffled.mean(axis=0)))
    axes.fill_between(x, low, high, color="#c4c4c4", linewidth=0.8, gid=f"{gid}-band")
    axes.plot(x, mean, color="#8c8c8c", linewidth=0.9, linestyle=(0, (4, 2)))
    axes.plot(layers, seen, color="#12436d", linewidth=1.4, marker="o", markersize=4.2, markeredgecolor=INK,
              markeredgewidth=0.4, gid=f"{gid}-seen")  # fmt: skip
    axes.set_xlim(-0.4, max(len(seen) - 0.6, 0.4))
    every = -(-len(seen) // 8)
    axes.set_xticks(layers[::every], [str(i) for i in layers[::every]])
