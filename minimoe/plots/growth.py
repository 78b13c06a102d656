"""How the cost of a decoding step grows: four curves, measured beside predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, styled
from minimoe.plots.training import SERIES

_WIDE, _TALL, _LEFT, _GAP = 3.5, 1.9, 0.45, 0.75
_PANELS = {
    "experts": ("Experts", "E, of which a token chooses as many as ever: flat"),
    "chosen": ("Chosen experts", "k: linear, each is read once"),
    "context": ("Context", "tokens in the cache: linear, and small"),
    "batch": ("Batch", "sequences; beside each point the experts touched"),
}


@styled
def cost_growth(points: Sequence[Mapping[str, Any]], *, title: str = "What a decoding step costs") -> Page:
    """Draw the time of a decoding step against experts, chosen experts, context and batch.

    Parameters
    ----------
    points : as `minimoe bench --growth` measures them, each with "axis" (experts, chosen, context or batch), "value",
        "seconds", "predicted" (seconds that the machine's limits allow), "touched" (experts of a layer a step reads)
    title : above all
    """
    by_axis = {axis: [point for point in points if point["axis"] == axis] for axis in _PANELS}
    if empty := [axis for axis, own in by_axis.items() if not own]:
        raise ValueError(f"points must have some of every axis; there are none of {', '.join(empty)}")
    width = 2 * (_LEFT + _WIDE) + 0.4
    head = Head(
        title, "Milliseconds of a step: points were measured; the line is what the machine's limits allow.", width
    )
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 2 * (0.45 + _TALL + _GAP) - 0.2)
    top = head.draw(page)
    for i, (axis, (name, told)) in enumerate(_PANELS.items()):
        left, above = MARGIN + (i % 2) * (_LEFT + _WIDE + 0.4), top + (i // 2) * (0.45 + _TALL + _GAP)
        page.write(left, above, name, 10, weight="bold")
        page.write(left, above + 0.2, told, 8.5, color=FAINT)
        _draw(page.chart(left + _LEFT, above + 0.48, _WIDE, _TALL, grid="y"), axis, by_axis[axis])
    return page


def _draw(axes: Axes, axis: str, points: Sequence[Mapping[str, Any]]) -> None:
    x = [point["value"] for point in points]
    measured, predicted = ([1e3 * point[name] for point in points] for name in ("seconds", "predicted"))
    axes.plot(x, predicted, color=SERIES[1], linewidth=1.6, gid=f"predicted-{axis}")
    axes.plot(x, measured, color=SERIES[0], marker="o", markersize=5, linestyle="", gid=f"measured-{axis}")
    axes.set_ylim(0, 1.25 * max(*measured, *predicted))
    axes.margins(x=0.08)
    axes.set_xticks(x if axis != "context" else [x[0], *x[2:]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if axis == "batch":
        for at, time, point in zip(x, measured, points, strict=True):
            axes.annotate(f"{point['touched']:.3g}", (at, time), xytext=(0, 6), textcoords="offset points",
                          ha="center", fontsize=7.5, color=INK, gid=f"touched-{at}")  # fmt: skip
