"""Arrays as small heat maps in HTML, with their numbers on demand."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np

from minimoe.plots.thumbnail import thumbnail
from minimoe.shapes import Array

_PIXELS = (128, 64)  # numbers of one map, at most: columns and rows; larger arrays are averaged over tiles
_SHOWN = (340, 104)  # room for one map on the page
_CELL = 14  # of a small one
_NARROWEST = 185  # column that holds a map, its name and its range
_ROWS, _LAST, _COLUMNS = 12, 4, 10  # numbers shown; so many of the rows are the last ones, where not all are shown
_SHORT = 4  # rows that are read at a glance

# The colours of all maps; see `thumbnail`.
KEY = (
    '<div style="font-size:90%;margin-bottom:.5em"><span style="display:inline-block;width:90px;height:10px;'
    'border:1px solid #8884;background:linear-gradient(90deg,#08306b,#5a9bd4,#fff,#f5a742,#7f2704)"></span> '
    '<span style="opacity:.7">in every map blue is negative, white zero, orange positive, up to the largest magnitude '
    "in it; grey is minus infinity or not a number</span></div>"
)


def array_html(
    name: str, array: Array, letters: str, tokens: Sequence[str] | None = None, unfolded: bool = False
) -> str:
    """Show one array: name, shape in letters and numbers, type, range, a heat map, and some numbers folded away.

    Rows of an array that has one per token (its letters begin with N) are headed by `tokens`. Where such rows are short
    enough to be read whole, as the choices of a gate, the numbers stand open.
    """
    x = np.asarray(array)
    x = x.astype(np.float64) if x.dtype.kind not in "iub" else x
    flat = as_matrix(x)
    said = f"; a row for each {letters.rpartition(' ')[0]}" if x.ndim > 2 else ""
    shape = " × ".join(map(str, x.shape)) or "a number"
    low, high = _range(flat)
    image = base64.b64encode(thumbnail(flat, _PIXELS)).decode()
    rows, columns = flat.shape
    width, height = min(columns * _CELL, _SHOWN[0]), min(rows * _CELL, _SHOWN[1])
    heads = tokens if letters.startswith("N ") and x.ndim == 2 else None
    opened = " open" if unfolded or (heads is not None and columns <= _SHORT) else ""
    return (
        f'<div style="flex:1 1 {max(width, _NARROWEST)}px;min-width:0;max-width:{_SHOWN[0]}px;margin-bottom:.7em">'
        f'<div style="overflow-wrap:anywhere"><code>{html.escape(name)}</code></div>'
        f'<div style="opacity:.7;font-size:90%">({html.escape(letters)}) {shape} {np.asarray(array).dtype}'
        f": {low} … {high}{html.escape(said)}</div>"
        f'<img alt="heat map of {html.escape(name)}" width="{width}" height="{height}" '
        f'style="display:block;max-width:100%;box-sizing:border-box;image-rendering:pixelated;border:1px solid #8884" '
        f'src="data:image/png;base64,{image}">'
        f'<details{opened}><summary>numbers</summary><pre style="overflow-x:auto;white-space:pre;font-size:12px;'
        f'line-height:1.35;margin:.2em 0">{html.escape(numbers(flat, heads))}</pre></details></div>'
    )


def as_matrix(x: Array) -> Array:
    """Lay an array out in two axes: rows stay, further leading axes are stacked below one another."""
    return x.reshape(1, -1) if x.ndim <= 1 else x.reshape(-1, x.shape[-1])


def numbers(matrix: Array, heads: Sequence[str] | None = None) -> str:
    """Return the first and the last rows as text, each after its head, and say what is left out."""
    rows, columns = matrix.shape
    which = list(range(rows) if rows <= _ROWS else [*range(_ROWS - _LAST), *range(rows - _LAST, rows)])
    shown = matrix[which, :_COLUMNS]
    texts = [[f"{v:d}" if matrix.dtype.kind in "iub" else f"{v:.4g}" for v in row] for row in shown.tolist()]
    width = max((len(text) for row in texts for text in row), default=1)
    names = [repr(heads[i])[1:-1] for i in which] if heads else []
    room = max(map(len, names), default=0)
    before = [f"{name.ljust(room)} | " for name in names] or [""] * len(texts)
    lines = [head + "  ".join(text.rjust(width) for text in row) for head, row in zip(before, texts, strict=True)]
    if rows > _ROWS:
        lines.insert(_ROWS - _LAST, "⋮")
    if rows > _ROWS or columns > _COLUMNS:
        some = f"the first {_ROWS - _LAST} and the last {_LAST}" if rows > _ROWS else "all"
        lines.append(f"{some} of {rows} rows, {shown.shape[1]} of {columns} columns")
    return "\n".join(lines)


def _range(matrix: Array) -> tuple[str, str]:
    finite = matrix[np.isfinite(matrix)]
    if not finite.size:
        return "–", "–"
    return f"{finite.min():.4g}", f"{finite.max():.4g}"
