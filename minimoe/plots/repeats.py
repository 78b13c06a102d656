"""How often consecutive tokens get the same expert, against chance, beside the paper's own figures: table 5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from minimoe.plots.page import FAINT, INK, MARGIN, Head, Page, checked_layers, shortened, styled
from minimoe.plots.tokens import middle_layers
from minimoe.repetition import KINDS, RepeatTable, mixtral_repeats

_NAME, _WIDE, _ROW, _GAP = 1.75, 3.9, 0.36, 0.35
_MARKS = "osD^vPXp"
# Dark to light, all told apart from each other by lightness; experts' colours are not used, as no expert is meant.
_SHADES = ("#12436d", "#2f7fb8", "#8fc1e3")
_TITLES = {"first": "Same first choice", "any": "Any choice in common"}


@styled
def repeated_assignments(
    table: RepeatTable,
    *,
    layers: Sequence[int] | None = None,
    beside: RepeatTable | None = mixtral_repeats(),  # noqa: B008 (frozen)
    title: str = "Consecutive tokens with the same expert",
) -> Page:
    """Draw a row per domain and a mark per layer, with intervals, against chance.

    Parameters
    ----------
    table : from `repetition.repeat_table`
    layers : which to show; None shows the first, the middle and the last
    beside : another table, drawn below; by default what the paper reports for Mixtral 8x7B; None for none
    title : above all
    """
    L = len(table.layers)
    layers = checked_layers(layers, max(table.layers) + 1, [table.layers[i] for i in middle_layers(L)])
    tables = [table.of(layers), *([] if beside is None else [beside])]
    width = _NAME + 2 * _WIDE + _GAP
    head = Head(
        title, "Percent of pairs. Dashed: experts chosen evenly and independently. Small grey bars: the same tokens in "
        "shuffled order, which keeps how often each expert is chosen.", width,
    )  # fmt: skip
    heights = [0.62 + _ROW * len(one.rows) for one in tables]
    page = Page(width + 2 * MARGIN, 2 * MARGIN + head.height + sum(heights) + 0.3)
    top = head.draw(page)
    limits = {kind: _limit(tables, kind) for kind in KINDS}
    for kind_at, kind in enumerate(KINDS):
        page.write(MARGIN + _NAME + kind_at * (_WIDE + _GAP), top - 0.02, _TITLES[kind], 10, weight="bold")
    for i, (one, height) in enumerate(zip(tables, heights, strict=True)):
        page.write(MARGIN, top + 0.24, shortened(one.title, _NAME - 0.1, 0.09), 9.5, weight="bold")
        told = f"Lines: {one.intervals}" if one.intervals else one.source
        page.write(MARGIN + _NAME, top + 0.25, told, 8.5, color=FAINT)
        for row, name in enumerate(one.rows):
            y = top + 0.5 + _ROW * (row + 0.5) - 0.07
            page.write(MARGIN, y, shortened(name, _NAME - 0.15, 0.085), 9)
        _draw_legend(page, MARGIN + _NAME + 2 * _WIDE + _GAP, top + 0.24, one.layers)
        for kind_at, kind in enumerate(KINDS):
            left = MARGIN + _NAME + kind_at * (_WIDE + _GAP)
            axes = page.chart(left, top + 0.5, _WIDE, _ROW * len(one.rows), grid="x")
            _draw_rows(axes, one, kind, f"repeats-{i}-{kind}")
            axes.set_xlim(*limits[kind])
            if i < len(tables) - 1:
                axes.set_xticklabels([])
        top += height
    return page


def _limit(tables: Sequence[RepeatTable], kind: str) -> tuple[float, float]:
    """From below the smallest to above the largest of all tables, in percent."""
    every = [one.chance[kind] for one in tables]
    for table in tables:
        for row in table.rows.values():
            parts = (row[kind].rate, row[kind].low, row[kind].high, row[kind].shuffled)
            every += [float(x) for part in parts if part is not None for x in part if not np.isnan(x)]
    low, high = 100 * min(every), 100 * max(every)
    return max(low - 0.06 * (high - low) - 1, -2), min(high + 0.06 * (high - low) + 1, 102)


def _draw_rows(axes: Axes, table: RepeatTable, kind: str, gid: str) -> None:
    """Draw each domain's layers one below the other, so that their intervals do not hide each other."""
    n, names = len(table.layers), list(table.rows)
    for i in range(n):
        place = np.arange(len(names)) + (i - (n - 1) / 2) * 0.7 / n
        rows = [table.rows[name][kind] for name in names]
        rate = 100 * np.array([row.rate[i] for row in rows])
        low, high = (100 * np.array([getattr(row, end)[i] for row in rows]) for end in ("low", "high"))
        colour, mark = mark_of(i, n)
        if np.isfinite(low).any():
            axes.hlines(place, low, high, color=colour, linewidth=1.3, gid=f"{gid}-interval-{i}")
        if rows[0].shuffled is not None:
            shuffled = 100 * np.array([np.nan if row.shuffled is None else row.shuffled[i] for row in rows])
            axes.plot(shuffled, place, linestyle="", marker="|", markersize=5, color="#8c8c8c", markeredgewidth=1.4,
                      gid=f"{gid}-shuffled-{i}")  # fmt: skip
        axes.plot(rate, place, linestyle="", marker=mark, markersize=4.6, color=colour, markeredgecolor=INK,
                  markeredgewidth=0.5, gid=f"{gid}-rate-{i}")  # fmt: skip
    axes.axvline(100 * table.chance[kind], color=INK, linewidth=0.9, linestyle=(0, (4, 2)), gid=f"{gid}-chance")
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def mark_of(i: int, n: int) -> tuple[str, str]:
    """Return colour and marker of the i-th of n series: lighter from first to last."""
    shade = _SHADES[round(i * (len(_SHADES) - 1) / max(n - 1, 1))]
    return shade, _MARKS[i % len(_MARKS)]


def _draw_legend(page: Page, right: float, top: float, layers: Sequence[int]) -> None:
    """Name the marks in one line that ends at `right`."""
    pitch = min(0.75, (_WIDE - 0.1) / len(layers))
    axes = page.box(right - pitch * len(layers), top, pitch * len(layers), 0.16, frame=False)
    axes.set_xlim(0, pitch * len(layers))
    axes.set_ylim(0, 1)
    for i, layer in enumerate(layers):
        colour, mark = mark_of(i, len(layers))
        axes.plot([i * pitch + 0.08], [0.45], marker=mark, markersize=5, color=colour, markeredgecolor=INK,
                  markeredgewidth=0.5)  # fmt: skip
        text = f"layer {layer}" if pitch > 0.6 else str(layer)
        axes.text(i * pitch + 0.17, 0.45, text, fontsize=8, va="center_baseline", color=FAINT)
