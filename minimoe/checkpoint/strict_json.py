"""JSON as checkpoints use it, read strictly: an object, each key once, real numbers, bounded depth and size.

Bytes alone do not bound what parsing takes: `[],` is three in a file, and 64 in memory. So the marks that every value
has one of are counted first.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from typing import Any, NoReturn

from minimoe.checkpoint.errors import DamagedFileError, shown

_MAX_MARKS = 650_000  # 13 for each of 50,000 tensors; parsing so many takes less than a second


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Return the object that `data` holds.

    Parameters
    ----------
    data : bytes
        UTF-8 text.
    where : str
        What to call it in a message.

    Raises
    ------
    DamagedFileError
        If it is not one JSON object, repeats a key, holds NaN or Infinity, or very many values.
    """
    if (marks := sum(map(data.count, (b",", b":", b"[", b"{")))) > _MAX_MARKS:
        raise DamagedFileError(f"{where}: {marks:,} commas, colons and brackets; at most {_MAX_MARKS:,} are read")
    try:
        with _no_collection():
            value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{where}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise DamagedFileError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, _unique, _refuse_constant, an integer of thousands of digits
        raise DamagedFileError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the cycle collector: JSON has no cycles, and each pass would go through the whole process's objects."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} appears twice")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
