"""The roofline: how fast each op runs, against what the machine's memory and arithmetic allow.

attainable(intensity) = min(peak, bandwidth · intensity). Source: Williams, Waterman and Patterson, Communications of
the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from minimoe.colours import ink
from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, shortened, styled
from minimoe.plots.training import SERIES
from minimoe.shapes import Array

_WIDE, _TALL, _LEFT, _TABLE, _ROW = 6.2, 4.4, 0.55, 3.9, 0.19
_MARKS = "osD^vP"
_TOUCH = 0.21  # inches between points whose numbers would hide each other, inside them or beside
_LETTER, _LINE = 0.058, 0.11  # inches that a letter and a line of those numbers take


def attainable(intensity: Float[Array, " n"], bandwidth: float, peak: float) -> Float[Array, " n"]:
    """Return the floating-point operations per second that memory and arithmetic allow.

    >>> attainable(np.array([1.0, 100.0]), bandwidth=30e9, peak=350e9).tolist()
    [30000000000.0, 350000000000.0]
    """
    reached: Array = np.minimum(peak, bandwidth * np.asarray(intensity, np.float64))
    return reached


@styled
def roofline(
    intensity: Float[Array, " n"],
    speed: Float[Array, " n"],
    labels: Sequence[str],
    backends: Sequence[str],
    *,
    bandwidth: Mapping[str, float],
    peak: Mapping[str, float],
    title: str = "The roofline of each backend",
) -> Page:
    """Draw measured ops under the roofs of their backends, and list them beside the picture.

    Parameters
    ----------
    intensity : (n,) floating-point operations per byte that must be moved, > 0
    speed : (n,) floating-point operations per second, > 0
    labels : n names of what was measured
    backends : n names of the backend of each
    bandwidth, peak : backend -> bytes per second, floating-point operations per second; backends on one machine that
        have the same roof share one line, in ink
    title : above all
    """
    x, y = np.asarray(intensity, np.float64), np.asarray(speed, np.float64)
    _check(x, y, labels, backends, bandwidth, peak)
    width = _LEFT + _WIDE + 0.4 + _TABLE
    told = "Each point is an op. Memory limits the slope, arithmetic the flat part; above the slope a cache was read."
    head = Head(title, told, width)
    tall = max(_TALL, _ROW * (len(x) + 3.2 * len(bandwidth)))
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + tall + 0.5)
    top = head.draw(page)
    axes = page.chart(MARGIN + _LEFT, top, _WIDE, tall, grid="both")
    axes.set_xscale("log")
    axes.set_yscale("log")
    names = list(bandwidth)
    low, high = _limits(x, y, bandwidth, peak)
    roofs = [(bandwidth[name], peak[name]) for name in names]
    for i, (name, roof) in enumerate(zip(names, roofs, strict=True)):
        colour = SERIES[i % len(SERIES)] if roofs.count(roof) == 1 else INK
        _draw_roof(axes, *roof, (low, high), colour, name)
    axes.set_xlim(low, high)
    _draw_points(axes, x, y, [names.index(backend) for backend in backends])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g}"))
    axes.set_xlabel("operations per byte", fontsize=8.5, color=FAINT)
    axes.set_ylabel("GFLOP/s", fontsize=8.5, color=FAINT)
    _draw_table(page, MARGIN + _LEFT + _WIDE + 0.4, top, x, y, labels, backends, names, bandwidth, peak)
    return page


def _draw_points(axes: Axes, x: Array, y: Array, which: Sequence[int]) -> None:
    """Draw the points, each numbered; where they lie upon each other, all their numbers stand beside them."""
    for n in range(len(x)):
        look: Any = {"markersize": 10.5, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": ""}
        marker, colour = _MARKS[which[n] % len(_MARKS)], SERIES[which[n] % len(SERIES)]
        axes.plot([x[n]], [y[n]], marker=marker, color=colour, gid=f"point-{n}", zorder=3, **look)
    axes.get_ylim()  # settles the limits
    places = axes.transData.transform(np.stack([x, y], axis=1)) / axes.figure.dpi
    frame = np.array([axes.bbox.min, axes.bbox.max]) / axes.figure.dpi
    inches: Any = axes.figure.dpi_scale_trans
    taken = [np.stack([place - _TOUCH / 3, place + _TOUCH / 3]) for place in places]
    for group in _heaps(places):
        numbers = ", ".join(str(n + 1) for n in group)
        if len(group) == 1:
            n = group[0]
            own = ink(SERIES[which[n] % len(SERIES)])
            axes.text(x[n], y[n], numbers, fontsize=6.5, color=own, ha="center", va="center_baseline", zorder=4)
        else:
            box = _free_box(places[group], _LETTER * len(numbers), frame, taken)
            taken.append(box)
            at: Any = box.mean(0)
            place: Any = {"transform": inches, "ha": "center", "va": "center_baseline", "fontsize": 7, "color": INK}
            halo = [withStroke(linewidth=2.5, foreground="white")]  # a roof may pass behind
            axes.text(at[0], at[1], numbers, zorder=4, path_effects=halo, **place)


def _free_box(
    group: Float[Array, "n 2"], width: float, frame: Float[Array, "2 2"], taken: Sequence[Float[Array, "2 2"]]
) -> Float[Array, "2 2"]:
    """Return the corners of the place for a heap's numbers that hides the least: right, left, below or above it."""
    (left, bottom), (right, top) = group.min(0), group.max(0)
    middle, away, size = (group.min(0) + group.max(0)) / 2, 0.6 * _TOUCH, np.array([width, _LINE])
    beside = [(right + away, middle[1] - _LINE / 2), (left - away - width, middle[1] - _LINE / 2)]
    edges = (middle[0] - width / 2, left - away / 2, right + away / 2 - width)  # centred, or in line with either edge
    corners = [*beside, *((edge, line) for line in (bottom - away - _LINE, top + away) for edge in edges)]
    boxes = [np.stack([np.array(corner), corner + size]) for corner in corners]

    def hidden(box: Array) -> int:
        outside = (box[0] < frame[0]).any() or (box[1] > frame[1]).any()
        over = sum(bool((box[0] < other[1]).all() and (other[0] < box[1]).all()) for other in taken)
        return over + (len(taken) + 1) * int(outside)

    return min(boxes, key=hidden)


def _heaps(places: Float[Array, "n 2"]) -> list[list[int]]:
    """Group the points, given in inches, that touch each other, directly or by way of others."""
    groups: list[list[int]] = []
    for n, place in enumerate(places):
        near = [g for g in groups if np.hypot(*(places[g] - place).T).min() < _TOUCH]
        groups = [g for g in groups if g not in near] + [sorted([n, *(m for g in near for m in g)])]
    return groups


def _check(
    x: Array, y: Array, labels: Sequence[str], backends: Sequence[str], bandwidth: Mapping[str, float],
    peak: Mapping[str, float],
) -> None:  # fmt: skip
    if x.ndim != 1 or not len(x) == len(y) == len(labels) == len(backends) or not len(x):
        raise ValueError(
            f"{len(labels)} labels need as many points and backends, not {x.shape}, {y.shape}, {len(backends)}"
        )
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError("intensity and speed must be positive and finite: the axes are logarithmic")
    if missing := sorted(set(backends) - (set(bandwidth) & set(peak))):
        raise ValueError(f"bandwidth and peak must name every backend; {', '.join(missing)} is missing")


def _limits(x: Array, y: Array, bandwidth: Mapping[str, float], peak: Mapping[str, float]) -> tuple[float, float]:
    """Show all points, and the ridge of every roof."""
    ridges = [peak[name] / bandwidth[name] for name in bandwidth]
    return min(x.min(), *ridges) / 3, max(x.max(), *ridges) * 4


def _draw_roof(axes: Axes, bandwidth: float, peak: float, limits: tuple[float, float], colour: str, name: str) -> None:
    ridge = peak / bandwidth
    x = np.array([limits[0], ridge, limits[1]])
    axes.plot(x, attainable(x, bandwidth, peak), color=colour, linewidth=1.8, gid=f"roof-{name}")


def _draw_table(
    page: Page, left: float, top: float, x: Array, y: Array, labels: Sequence[str], backends: Sequence[str],
    names: Sequence[str], bandwidth: Mapping[str, float], peak: Mapping[str, float],
) -> None:  # fmt: skip
    """List the points by backend, with their speed and what part of the roof it is."""
    for i, name in enumerate(names):
        page.write(left, top, name, 9, weight="bold", color=SERIES[i % len(SERIES)])
        page.write(left + 3.1, top + 0.01, "GFLOP/s", 7.5, color=FAINT, ha="right")
        page.write(left + _TABLE, top + 0.01, "of roof", 7.5, color=FAINT, ha="right")
        roof_told = f"roof {peak[name] / 1e9:,.3g} GFLOP/s, {bandwidth[name] / 1e9:,.3g} GB/s"
        page.write(left, top + 0.18, roof_told, 7.5, color=FAINT)
        top += 0.4
        for n in [n for n in range(len(x)) if backends[n] == name]:
            roof = float(attainable(x[n : n + 1], bandwidth[name], peak[name])[0])
            page.write(left + 0.2, top, str(n + 1), 8, color=FAINT, ha="right")
            page.write(left + 0.3, top, shortened(labels[n], 2.1, 0.075), 8, color=INK)
            page.write(left + 3.1, top, f"{y[n] / 1e9:,.3g}", 8, ha="right")
            page.write(left + _TABLE, top, f"{100 * y[n] / roof:.0f}%", 8, ha="right", gid=f"of-roof-{n}")
            top += _ROW
        top += 0.16
