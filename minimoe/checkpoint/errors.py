"""What can be wrong with a checkpoint, one type per case; every message is one line and names the file or tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from minimoe.config import ConfigError

_LISTED = 12  # names of one kind that a message gives in full


class CheckpointError(ValueError):
    """A folder or file that cannot be used as a checkpoint."""


class MissingFileError(CheckpointError):
    """A folder or a file that is not there, or cannot be opened."""


class OutsideFolderError(CheckpointError):
    """A name or a link that leads out of the checkpoint's folder."""


class DamagedFileError(CheckpointError):
    """A file whose contents are not what its format asks for: truncated, empty, a Git-LFS pointer, a false header."""


class ChangedFileError(CheckpointError):
    """A file that was written to while a model was using it."""


class UnsafeFormatError(CheckpointError):
    """Weights in a format that runs code when it is opened (pickle); never opened."""


class UnsupportedTypeError(CheckpointError):
    """Tensors of a number format that the model does not compute with."""


class ShardIndexError(CheckpointError):
    """An index and shards that contradict each other."""


class LayoutError(CheckpointError):
    """Weights of several layouts in one place, or of one that cannot hold them."""


class ConfigFileError(CheckpointError, ConfigError):
    """A config.json or params.json that describes no model of ours."""


class NotEnoughMemoryError(CheckpointError, ConfigError):
    """Arrays that would not fit; nothing was allocated."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; what was there before is whole."""


@dataclass(eq=False)
class Differences:
    """How the tensors of a checkpoint differ from those that its config asks for."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.transposed or self.misshapen)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "extra": self.extra, "transposed": self.transposed, "shape": self.misshapen}
        return "; ".join(f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names)


class TensorMismatchError(CheckpointError):
    """Missing, extra, transposed or wrongly shaped tensors: all of them at once, in `differences`."""

    def __init__(self, where: str, differences: Differences) -> None:
        super().__init__(f"{where}: the tensors are not those of its config: {differences}")
        self.differences = differences


def shown(name: object) -> str:
    """Return text from a file as it may appear in a message: one printable line of bounded length.

    >>> shown("model.norm.weight"), shown("a\\x1b[31m")
    ('model.norm.weight', "'a\\\\x1b[31m'")
    """
    text = name if isinstance(name, str) and name and name.isprintable() else repr(name)
    return text if len(text) <= 200 else f"{text[:160]}… ({len(text):,} characters)"


def listed(names: Iterable[str], limit: int = _LISTED) -> str:
    """Join names; of many, those that differ in numbers only are given as one pattern with their count.

    >>> listed(["norm", "output"])
    'norm, output'
    >>> listed([f"layers.{i}.attention.wq" for i in range(32)] + ["norm"])
    'layers.*.attention.wq (32 of them, first layers.0.attention.wq), norm'
    """
    every = [shown(name) for name in names]
    if len(every) > limit:
        groups: dict[str, list[str]] = {}
        for name in every:
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
        every = [_group(pattern, group) for pattern, group in groups.items()]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def _group(pattern: str, names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them, first {names[0]})"


def gigabytes(size: int) -> str:
    """Return a number of bytes for people: GB from 0.1 GB on, else MB.

    >>> gigabytes(93_405_585_408), gigabytes(7_340_032)
    ('93.4 GB', '7.3 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 100_000_000 else f"{size / 1e6:,.1f} MB"
