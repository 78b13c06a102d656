"""What kind of token a piece of text is: the start of a word, its continuation, a digit, an indent, …

The kinds are coarse on purpose: they are what a router could tell without understanding the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from minimoe.shapes import Array

TYPES = (
    "word start", "word continued", "digit", "space, indent", "line end", "punctuation", "operator, bracket",
    "control", "other",
)  # fmt: skip

_CONTROL = frozenset({"<s>", "</s>", "<unk>", "<pad>"})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_OPERATORS = frozenset("+-*/%=<>&|^~@!")


def token_types(pieces: Sequence[str]) -> Int[Array, " N"]:
    """Return the kind of each piece of a text, as an index into `TYPES`.

    A piece is judged by its first character that is no space; one of white space alone is a line end if it holds
    one. Letters and underscores continue a word where the character before them is a letter, digit or underscore. A
    byte of a character that the tokenizer does not know is "other".

    Parameters
    ----------
    pieces : N texts in reading order, as `Tokenizer.pieces` gives them

    Examples
    --------
    >>> [TYPES[i] for i in token_types(["<s>", " def", "ine", "(", " 12", ",", "\\n", "    "])]
    ['control', 'word start', 'word continued', 'operator, bracket', 'digit', 'punctuation', 'line end',
     'space, indent']
    """
    kinds, before = [], ""
    for piece in pieces:
        control, byte = piece in _CONTROL, _BYTE.fullmatch(piece)
        if byte is not None:
            code = int(byte[1], 16)
            piece = chr(code) if code < 128 else "\ufffd"
        kinds.append(TYPES.index("control" if control else _kind(piece, before)))
        before = "" if control else piece[-1:]
    return np.array(kinds, np.int64)


def _kind(piece: str, before: str) -> str:
    text = piece.lstrip()
    if not text:
        return "line end" if "\n" in piece or "\r" in piece else "space, indent" if piece else "other"
    first = text[0]
    if first.isalpha() or first == "_":
        joined = text == piece and (before.isalnum() or before == "_")
        return "word continued" if joined else "word start"
    if first.isnumeric():
        return "digit"
    category = unicodedata.category(first)
    if first in _OPERATORS or category in ("Ps", "Pe", "Sm"):
        return "operator, bracket"
    return "punctuation" if category[0] == "P" or first in "`$" else "other"
