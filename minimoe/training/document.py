"""A named text, and the rule that decides on which side of the train/held-out split it falls."""

import hashlib
from dataclasses import dataclass

HELD_OUT_SHARE = 0.06


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Parameters
    ----------
    name
        What the split is decided by: for harvested text the path of the file it comes from, so that the docstrings
        of a file (domain `english`) are held out exactly when its code (domain `python`) is.
    text
        The text itself, with "\\n" line ends.
    """

    name: str
    text: str


def unit_hash(name: str) -> float:
    """Map a name to [0, 1), the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Say whether the document of this name is held out (about 6% are)."""
    return unit_hash(name) < HELD_OUT_SHARE


def place_in_part(name: str) -> float:
    """Map a name to [0, 1), evenly among the names of its own part: what samples both parts alike."""
    place = unit_hash(name)
    return place / HELD_OUT_SHARE if is_held_out(name) else (place - HELD_OUT_SHARE) / (1 - HELD_OUT_SHARE)
