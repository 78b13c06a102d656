"""A text whose tokens are coloured by their first-choice expert, layer by layer: figure 8 of arXiv 2401.04088."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.font_manager import FontProperties, findfont, get_font

from minimoe.colours import expert_colour, ink
from minimoe.display import RETURN, shown_piece
from minimoe.plots.page import CHARACTER, MARGIN, MONO, Page, checked_layers, styled
from minimoe.shapes import Array

_SIZE = 8.0  # points
_LINE = _SIZE * 1.62 / 72  # inches
_HEAD, _GAP = 0.24, 0.3


@dataclass(frozen=True)
class Cell:
    """A run of characters of one token in one line."""

    token: int
    line: int
    column: int
    text: str


def layout(pieces: Sequence[str], columns: int, max_lines: int | None = None) -> list[Cell]:
    """Place tokens in lines of so many characters.

    A line end is shown by an arrow; a token that does not fit starts a new line, and one longer than a line is broken.
    Tokens beyond `max_lines` are left out.
    """
    cells: list[Cell] = []
    line = column = 0
    for token, piece in enumerate(pieces):
        parts = [_drawable(part) for part in shown_piece(piece).expandtabs(4).split("\n")]
        for i, part in enumerate(parts):
            if i:
                line, column = line + 1, 0
            text = part + RETURN if i < len(parts) - 1 else part
            while text:
                room = columns - column
                if len(text) > room and column and len(text) <= columns:
                    line, column, room = line + 1, 0, columns
                cells.append(Cell(token, line, column, text[:room]))
                column += len(text[:room])
                text = text[room:]
                if column >= columns:
                    line, column = line + 1, 0
    return [cell for cell in cells if max_lines is None or cell.line < max_lines]


@dataclass(frozen=True)
class TokensBlock:
    """One panel per layer, as a block of a page.

    Attributes
    ----------
    pieces : text of each token
    first : (L, N) expert of each token
    layers : those to show
    width : inches for all panels
    """

    pieces: Sequence[str]
    first: Int[Array, "L N"]
    layers: Sequence[int]
    width: float
    columns: int = 3
    max_lines: int | None = None

    @property
    def _panel(self) -> float:
        return (self.width - _GAP * (self.columns - 1)) / self.columns

    @property
    def _characters(self) -> int:
        return max(int(self._panel / (CHARACTER * _SIZE)), 8)

    def height(self) -> float:
        """Inches that the block takes."""
        cells = layout(self.pieces, self._characters, self.max_lines)
        lines = 1 + max((cell.line for cell in cells), default=0)
        return math.ceil(len(self.layers) / self.columns) * (_HEAD + lines * _LINE + 0.15)

    def draw(self, page: Page, left: float, top: float) -> None:
        """Draw the block on a page, in inches."""
        cells = layout(self.pieces, self._characters, self.max_lines)
        lines = 1 + max((cell.line for cell in cells), default=0)
        for i, layer in enumerate(self.layers):
            row, column = divmod(i, self.columns)
            x, y = left + column * (self._panel + _GAP), top + row * (_HEAD + lines * _LINE + 0.15)
            page.write(x, y, f"layer {layer}", 10, weight="bold")
            width = self._characters * CHARACTER * _SIZE
            axes = page.box(x, y + _HEAD, width, lines * _LINE, frame=False)
            axes.set_xlim(0, self._characters)
            axes.set_ylim(lines, 0)
            _draw_cells(axes, cells, self.first[layer], layer)


def _draw_cells(axes: Axes, cells: Sequence[Cell], first: Int[Array, " N"], layer: int) -> None:
    """Draw one box per cell; of the letters, which are many, one text per line and ink."""
    experts = [int(first[cell.token]) for cell in cells]
    colours = [expert_colour(e) if e >= 0 else "#ffffff" for e in experts]
    boxes = [_corners(cell.column + 0.04, cell.line + 0.05, len(cell.text) - 0.08, 0.9) for cell in cells]
    axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0, gid=f"tokens-{layer}"), autolim=False)
    lines: dict[tuple[int, str], str] = {}
    for cell, colour in zip(cells, colours, strict=True):
        key = cell.line, ink(colour)
        lines[key] = lines.get(key, "").ljust(cell.column) + cell.text
    for (line, colour), text in lines.items():
        axes.text(0, line + 0.5, text, family=MONO, fontsize=_SIZE, color=colour, va="center_baseline", ha="left")


def _corners(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


@cache
def _characters_of_font() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=MONO))).get_charmap())


def _drawable(text: str) -> str:
    """Replace characters that the font does not have by a box."""
    return "".join(c if ord(c) in _characters_of_font() else "□" for c in text)


def drawable_piece(piece: str) -> str:
    """Show one token on one line: line ends and tabs as arrows, a space as a low bracket.

    >>> drawable_piece(" a\\n")
    '␣a↵'
    """
    return _drawable(shown_piece(piece).replace("\t", "→").replace("\n", RETURN).replace(" ", "␣"))


def middle_layers(num_layers: int) -> list[int]:
    """Return the first, the middle and the last layer, as the paper's figures show them (0, 15 and 31 of 32).

    >>> middle_layers(32), middle_layers(6), middle_layers(1)
    ([0, 15, 31], [0, 2, 5], [0])
    """
    return sorted({0, (num_layers - 1) // 2, num_layers - 1})


@styled
def token_colours(
    pieces: Sequence[str],
    ids: Int[Array, "L N *k"],
    *,
    layers: Sequence[int] | None = None,
    title: str | None = None,
    num_experts: int | None = None,
    max_lines: int | None = None,
) -> Page:
    """Draw a text with every token coloured by its first-choice expert, one panel per layer.

    Parameters
    ----------
    pieces : N texts, as `Tokenizer.pieces` gives them
    ids : (L, N) experts, or (L, N, k) with the first choice in slot 0
    layers : which to show; None shows the first, the middle and the last
    title : above all
    num_experts : for the legend; None shows the experts that occur
    max_lines : longer texts are cut
    """
    ids = np.asarray(ids)
    first = ids[..., 0] if ids.ndim == 3 else ids
    if first.ndim != 2 or first.shape[1] != len(pieces) or not len(pieces):
        raise ValueError(f"ids must have shape (L, N) or (L, N, k) with N = {len(pieces)} pieces, not {ids.shape}")
    layers = checked_layers(layers, len(first), middle_layers(len(first)))
    columns = min(3, len(layers))
    width = 3.1 * columns + _GAP * (columns - 1) if columns > 1 else 6.0
    block = TokensBlock(pieces, first, layers, width, columns, max_lines)
    head = 0.42 if title and columns == 1 else 0.0  # where there is room, the legend stands beside the title
    page = Page(width + 2 * MARGIN, head + 0.5 + block.height() + 2 * MARGIN - 0.15)
    if title:
        page.write(MARGIN, MARGIN, title, 13, weight="bold")
    experts = range(num_experts) if num_experts is not None else sorted({int(e) for e in first.flat if e >= 0})
    draw_legend(page, MARGIN + width, MARGIN + head, experts)
    block.draw(page, MARGIN, MARGIN + head + 0.5)
    return page


def draw_legend(page: Page, right: float, top: float, experts: Sequence[int]) -> None:
    """Name the colours in one line that ends at `right`."""
    left = page.chips(right, top, experts, room=4.5)
    page.write(left - 0.08, top + 0.02, "first choice: expert", 9, ha="right")
