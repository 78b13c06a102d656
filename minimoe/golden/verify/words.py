"""Small pieces of text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def similar(name: str, known: Sequence[str]) -> str:
    """Suggest the nearest of the known names, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; is {near[0]!r} meant?" if near else ""


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return cut(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def cut(text: str, width: int) -> str:
    """Shorten a text that is too long for its line."""
    return text if len(text) <= width else text[: width - 1] + "…"


def number(value: object) -> str:
    """Show a number; nine digits tell any two float32 apart."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)
