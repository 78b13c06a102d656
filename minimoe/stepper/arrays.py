"""Arrays as small heat maps in HTML, with their numbers on demand."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np

from minimoe.plots.thumbnail import thumbnail
from minimoe.shapes import Array

_PIXELS = (200, 100)  # numbers of one map, at most: columns and rows; larger arrays are averaged over tiles
_SHOWN = (400, 120)  # room for one map on the page
_CELL = 14  # of a small one
_ROWS, _COLUMNS = 12, 10  # numbers shown


def array_html(name: str, array: Array, letters: str, tokens: Sequence[str] | None = None) -> str:
    """Show one array: name, shape in letters and numbers, type, range, a heat map, and the first numbers folded away.

    Rows of an array that has one per token (its letters begin with N) are headed by `tokens`.
    """
    x = np.asarray(array)
    x = x.astype(np.float64) if x.dtype.kind not in "iub" else x
    flat, said = as_matrix(x)
    shape = " × ".join(map(str, x.shape)) or "a number"
    low, high = _range(flat)
    image = base64.b64encode(thumbnail(flat, _PIXELS)).decode()
    rows, columns = flat.shape
    width, height = min(columns * _CELL, _SHOWN[0]), min(rows * _CELL, _SHOWN[1])
    heads = tokens if letters.startswith("N ") and x.ndim == 2 else None
    return (
        '<div style="display:inline-block;vertical-align:top;margin:0 1.2em 0.8em 0">'
        f'<div><code>{html.escape(name)}</code> <span style="opacity:.65">({html.escape(letters)}) {shape}, '
        f"{np.asarray(array).dtype}</span></div>"
        f'<img alt="heat map of {html.escape(name)}" width="{width}" height="{height}" '
        f'style="image-rendering:pixelated;border:1px solid #8884" src="data:image/png;base64,{image}">'
        f'<div style="opacity:.65;font-size:90%">{low} … {high}{html.escape(said)}</div>'
        '<details><summary>numbers</summary><pre style="overflow-x:auto">'
        f"{html.escape(numbers(flat, heads))}</pre></details></div>"
    )


def as_matrix(x: Array) -> tuple[Array, str]:
    """Lay an array out in two axes: rows stay, further leading axes are stacked below one another."""
    if x.ndim <= 1:
        return x.reshape(1, -1), ""
    if x.ndim == 2:
        return x, ""
    return x.reshape(-1, x.shape[-1]), f"; its {x.ndim} axes laid out as rows of the last one"


def numbers(matrix: Array, heads: Sequence[str] | None = None) -> str:
    """Return the first rows and columns as text, each row after its head, and say what is left out."""
    rows, columns = matrix.shape
    shown = matrix[:_ROWS, :_COLUMNS]
    texts = [[f"{v:d}" if matrix.dtype.kind in "iub" else f"{v:.4g}" for v in row] for row in shown.tolist()]
    width = max((len(text) for row in texts for text in row), default=1)
    names = [repr(head)[1:-1] for head in heads or ()][:_ROWS]
    room = max(map(len, names), default=0)
    before = [f"{name.ljust(room)} | " for name in names] or [""] * len(texts)
    lines = [head + "  ".join(text.rjust(width) for text in row) for head, row in zip(before, texts, strict=True)]
    if rows > _ROWS or columns > _COLUMNS:
        lines.append(f"first {len(shown)} of {rows} rows, {shown.shape[1]} of {columns} columns")
    return "\n".join(lines)


def _range(matrix: Array) -> tuple[str, str]:
    finite = matrix[np.isfinite(matrix)]
    if not finite.size:
        return "–", "–"
    return f"{finite.min():.4g}", f"{finite.max():.4g}"
