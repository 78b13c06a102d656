"""The paths of tokens through the layers, as bands between the experts they choose first (an alluvial diagram)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.path import Path

from minimoe.colours import expert_colour, ink
from minimoe.plots.page import EDGE, FAINT, MARGIN, Head, Page, checked_layers, styled
from minimoe.routing_pairs import independent, transitions
from minimoe.routing_statistics import routed_ids
from minimoe.shapes import Array

_TALL, _BAR, _SPACE = 4.6, 0.3, 0.25  # inches; inches; share of the height that is left white between experts
_MOST = 8  # layers that are shown unless others are asked for


@styled
def token_paths(
    ids: Int[Array, "L N k"],
    num_experts: int,
    *,
    layers: Sequence[int] | None = None,
    notable: float = 1.5,
    title: str = "Paths of tokens through the layers",
) -> Page:
    """Draw a column of experts per layer, and between them bands as wide as the number of tokens that go that way.

    Parameters
    ----------
    ids : (L, N, k); the first choices are followed
    num_experts : E
    layers : which to show, in order; None shows all, or 8 spread evenly where there are more
    notable : a band this many times as wide as independent layers would give is coloured, the others are grey
    title : above all
    """
    ids = routed_ids(ids)
    L = len(ids)
    spread = np.unique(np.linspace(0, L - 1, min(L, _MOST)).round().astype(int)).tolist()
    layers = checked_layers(layers, L, spread)
    counts = transitions(ids, num_experts, layers)
    expected = independent(counts)
    width = max(1.35 * (len(layers) - 1) + _BAR, 5.0)
    tokens = "one token" if ids.shape[1] == 1 else f"{ids.shape[1]:,} tokens"
    told = (
        f"First choices of {tokens}. Coloured, like the expert they come from, are bands at least {notable:g} "
        "times as wide as if layers were independent, and beyond counting noise."
    )
    head = Head(title, told, width)
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + 0.26 + _TALL)
    top = head.draw(page)
    axes = page.box(MARGIN, top + 0.26, width, _TALL, frame=False)
    axes.set_xlim(0, width)
    axes.set_ylim(1, 0)
    pitch = (width - _BAR) / max(len(layers) - 1, 1)
    space = _SPACE / max(num_experts - 1, 1)
    shares = _shares(ids[layers, :, 0], num_experts)
    starts = _starts(shares, space)
    for i, layer in enumerate(layers):
        page.write(MARGIN + i * pitch + _BAR / 2, top, f"layer {layer}", 9, ha="center", color=FAINT)
        _draw_column(axes, i * pitch, shares[i], starts[i], layer)
    for i in range(len(layers) - 1):
        x = (i * pitch + _BAR, (i + 1) * pitch)
        strong = stands_out(counts[i], expected[i], notable)
        _draw_bands(axes, x, counts[i], strong, starts[i], starts[i + 1], f"paths-{i}")
    return page


def stands_out(counts: Int[Array, "E E"], expected: Float[Array, "E E"], notable: float) -> Bool[Array, "E E"]:
    """Say which counts are `notable` times the expected ones and four standard deviations (Poisson) above them."""
    wide: Array = (counts >= notable * expected) & (counts - expected > 4 * np.sqrt(expected)) & (counts >= 5)
    return wide


def _shares(first: Int[Array, "l N"], num_experts: int) -> Float[Array, "l E"]:
    """Return how high each expert's bar is: its share of the tokens, the space between the bars taken off."""
    counts = np.array([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in first], np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * (1 - _SPACE)


def _starts(shares: Float[Array, "l E"], space: float) -> Float[Array, "l E"]:
    """Return where each bar begins, from above."""
    E = shares.shape[1]
    starts: Array = np.cumsum(shares, axis=1) - shares + space * np.arange(E)
    return starts


def _draw_column(axes: Axes, x: float, shares: Float[Array, " E"], starts: Float[Array, " E"], layer: int) -> None:
    for e, (share, start) in enumerate(zip(shares, starts, strict=True)):
        if not share:
            continue
        colour = expert_colour(e)
        axes.add_patch(
            Rectangle((x, start), _BAR, share, facecolor=colour, edgecolor=EDGE, linewidth=0.4, gid=f"bar-{layer}-{e}")
        )
        if share * _TALL > 0.13:
            axes.text(x + _BAR / 2, start + share / 2, str(e), ha="center", va="center", fontsize=8, color=ink(colour))


def _draw_bands(
    axes: Axes,
    x: tuple[float, float],
    counts: Int[Array, "E E"],
    strong: Bool[Array, "E E"],
    left: Float[Array, " E"],
    right: Float[Array, " E"],
    gid: str,
) -> None:
    """Fill bands between two columns; from above, each bar's bands go and come in the order of the experts."""
    unit = (1 - _SPACE) / max(counts.sum(), 1)
    heights = counts * unit
    leave = left[:, None] + np.cumsum(heights, axis=1) - heights
    arrive = right[None, :] + np.cumsum(heights, axis=0) - heights
    bands, colours = [], []
    order = np.argsort(strong, axis=None, kind="stable")  # grey ones below
    for a, b in zip(*np.unravel_index(order, counts.shape), strict=True):
        if counts[a, b]:
            bands.append(_band(x, leave[a, b], arrive[a, b], heights[a, b]))
            colours.append((*to_rgb(expert_colour(int(a))), 0.8) if strong[a, b] else (0.45, 0.45, 0.45, 0.16))
    axes.add_collection(PathCollection(bands, facecolors=colours, linewidths=0, gid=gid), autolim=False)


def _band(x: tuple[float, float], leave: float, arrive: float, height: float) -> Path:
    """Close two cubic Bézier curves, level at both ends, into a band."""
    (x0, x1), middle = x, (x[0] + x[1]) / 2
    corners = [
        (x0, leave), (middle, leave), (middle, arrive), (x1, arrive), (x1, arrive + height),
        (middle, arrive + height), (middle, leave + height), (x0, leave + height), (x0, leave),
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return Path(corners, codes)
