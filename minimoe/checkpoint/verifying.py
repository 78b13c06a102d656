"""Read every tensor of a checkpoint and find the values that no model should hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimoe.checkpoint.errors import shown
from minimoe.checkpoint.folder import Folder, read_whole
from minimoe.checkpoint.header import TensorInfo
from minimoe.checkpoint.reading import open_checkpoint
from minimoe.checkpoint.tensors import read_elements
from minimoe.shapes import Array

_CHUNK = 1 << 22  # elements read at a time


@dataclass(frozen=True)
class Problem:
    """A tensor with NaN or infinite values.

    Attributes
    ----------
    tensor, file : its name and shard
    nans, infinities : how many there are
    first : index of the first of either
    """

    tensor: str
    file: str
    nans: int
    infinities: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        counts = {"NaN": self.nans, "Inf": self.infinities}
        what = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        return f"{self.file}: tensor {shown(self.tensor)} holds {what}, the first at {list(self.first)}"


def verify(folder: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Problem]:
    """Open and read every tensor of a checkpoint, in little memory.

    Parameters
    ----------
    folder : path
    progress : called with the bytes read so far, and those there are

    Returns
    -------
    list of Problem
        Tensors with NaN or Inf; empty where all is well.

    Raises
    ------
    CheckpointError
        If config, headers, names or shapes are wrong, before any tensor is read; or if a file cannot be read to its
        end.
    """

    def read(opened: Folder) -> list[Problem]:
        with open_checkpoint(opened) as (_, shards, _):
            problems: list[Problem] = []
            done = 0
            for info in shards.tensors.values():
                found = []
                for start in range(0, info.size, _CHUNK):
                    chunk = read_elements(shards.files[info.file], info, start, min(_CHUNK, info.size - start))
                    found.append(_not_finite(chunk, start))
                    done += chunk.size * info.nbytes // info.size
                    progress(done, shards.nbytes)
                problems += _problem(info, found)
            return problems

    return read_whole(folder, read)


def _not_finite(chunk: Array, start: int) -> tuple[int, int, int | None]:
    """Count NaN and Inf; say where the first of them is among all values of the tensor."""
    finite = np.isfinite(chunk)
    if finite.all():
        return 0, 0, None
    nans = int(np.isnan(chunk).sum())
    return nans, int((~finite).sum()) - nans, start + int(finite.argmin())


def _problem(info: TensorInfo, found: list[tuple[int, int, int | None]]) -> list[Problem]:
    nans, infinities = sum(n for n, _, _ in found), sum(n for _, n, _ in found)
    first = next((place for *_, place in found if place is not None), None)
    if first is None:
        return []
    index = tuple(int(i) for i in np.unravel_index(first, info.shape))
    return [Problem(info.name, info.file, nans, infinities, index)]
