"""Text in a terminal, every token coloured by an expert, or numbered where there is no colour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, TextIO

from minimoe.colours import expert_colour, ink, xterm256
from minimoe.tokenizer import Tokenizer

How = Literal["colour", "superscript", "ascii"]

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_RESET = "\x1b[0m"
RETURN = "↵"


def capability(stream: TextIO) -> How:
    """Say how a stream can show experts: colours in a terminal, unless $NO_COLOR forbids it; else numbers."""
    forced = bool(os.environ.get("FORCE_COLOR"))
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    if (terminal or forced) and not os.environ.get("NO_COLOR"):
        return "colour"
    try:
        "⁰↵‖".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return "ascii"
    return "superscript"


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """Show the tokens of a text one by one, without BOS and without the space that encoding puts before the first."""
    pieces = tokenizer.pieces(tokens)
    return [pieces[0].removeprefix(" "), *pieces[1:]] if pieces else []


def tokens_by_expert(pieces: Sequence[str], experts: Iterable[int], how: How) -> str:
    """Join pieces of text, each marked with its expert.

    Parameters
    ----------
    pieces : text of each token, as `Tokenizer.pieces` gives it
    experts : expert of each token
    how : background colours, `def³ add¹`, or `def{3} add{1}`
    """
    marked = (_mark(shown_piece(piece), expert, how) for piece, expert in zip(pieces, experts, strict=True))
    return "".join(marked)


def legend(num_experts: int, how: How) -> str:
    """One line that says which mark is which expert."""
    if how == "colour":
        return "expert " + "".join(_paint(f" {e} ", e) for e in range(num_experts))
    example = _mark("def", 3 % num_experts, how)
    quoted = "'def'" if how == "ascii" else "“def”"
    return f"{example} = the first choice for the token {quoted} was expert {3 % num_experts}"


def shown_piece(piece: str) -> str:
    """Replace control characters, which would move the cursor or ring the bell; line ends and tabs stay.

    >>> shown_piece("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece)


def _mark(piece: str, expert: int, how: How) -> str:
    """A line end is shown by an arrow, which carries the mark, and the text goes on in the next line."""
    arrow = RETURN if how != "ascii" else "~"
    lines = piece.split("\n")
    if how == "colour":
        ends = [_paint(line + arrow, expert) for line in lines[:-1]]
        return "\n".join([*ends, _paint(lines[-1], expert) if lines[-1] else ""])
    number = str(expert).translate(_SUPERSCRIPTS) if how == "superscript" else f"{{{expert}}}"
    if len(lines) == 1:
        return piece + number
    return arrow.join(lines[:1] + [""] * (len(lines) - 1)) + number + "\n" * (len(lines) - 1) + lines[-1]


def _paint(text: str, expert: int) -> str:
    colour = expert_colour(expert)
    foreground = 16 if ink(colour) == "#000000" else 231
    return f"\x1b[48;5;{xterm256(colour)};38;5;{foreground}m{text}{_RESET}"
