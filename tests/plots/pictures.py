"""What the tests of pictures share: routings to draw, artists by their ids, and whether a page is whole."""

import itertools

import numpy as np
from matplotlib.text import Text

from minimoe.shapes import Routing

PIECES = [
    "def", " add", "(", "a", ",", " b", ")", ":", "\n    ", "return", " a$x_1$", "+", "世", "\n\n", "x" * 50, "\t!",
]  # fmt: skip


def random_ids(L, N, E, k=2, seed=0):
    return np.argsort(np.random.default_rng(seed).random((L, N, E)), axis=-1)[..., :k]


def random_routing(L, N, E, k=2, seed=0):
    """Free choices of random logits, as a gate makes them; computed here, not by the package."""
    logits = np.random.default_rng(seed).normal(size=(L, N, E))
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    exps = np.exp(np.take_along_axis(logits, ids, axis=-1))
    return Routing(ids, exps / exps.sum(axis=-1, keepdims=True), logits)


def artists(page, prefix):
    """{gid: artist} of those whose gid begins so."""
    return {a.get_gid(): a for a in page.findobj(lambda a: (a.get_gid() or "").startswith(prefix))}


def written(page):
    """All texts of a page, the figure's own and its axes'."""
    return [t.get_text() for t in page.findobj(Text) if t.get_text().strip() and t.get_visible()]


def hidden_ticks(page):
    """Labels of ticks beyond the ends of their axis, which are not drawn."""
    hidden = set()
    for axes in page.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return hidden


def assert_whole(page, inside=True):
    """No text leaves the figure, and no two texts overlap; `inside` looks at those of the same axes, too."""
    page.draw_without_rendering()
    renderer = page._get_renderer()
    hidden = hidden_ticks(page)
    shown = [t for t in page.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    placed = [(t, t.get_window_extent(renderer)) for t in shown]
    width, height = page.get_size_inches() * page.dpi
    for text, box in placed:
        assert box.x0 >= 2 and box.y0 >= 2 and box.x1 <= width - 2 and box.y1 <= height - 2, text.get_text()
        assert text.get_fontsize() >= 6, text.get_text()
    for (one, a), (other, b) in itertools.combinations(placed, 2):
        if inside or one.axes is not other.axes or one.axes is None:
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2
            assert not overlap, f"{one.get_text()!r} over {other.get_text()!r}"
