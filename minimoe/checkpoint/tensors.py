"""Arrays in a safetensors file: mapped into memory in place, loaded, or written one after the other.

Files are written here and not by the safetensors library, whose `save_file` first copies all tensors into memory;
ours streams them, so a checkpoint larger than memory can be written from mapped arrays. The tests read what is
written here with that library, and the reverse.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minimoe.arrays import to_host
from minimoe.checkpoint.errors import DamagedFileError, MissingFileError, SaveError, gigabytes, shown
from minimoe.checkpoint.header import ALL_TYPES, TensorInfo, read_header
from minimoe.checkpoint.mapped import map_file
from minimoe.shapes import Array

_ALIGNMENT = 64  # of the data's start in the file: a cache line, and the widest vector register
_NAMES = {dtype: name for name, dtype in ALL_TYPES.items()}


class MappedTensors:
    """Tensors of open files, mapped where they lie; they stay valid when a file is closed, renamed or deleted.

    `mapped[info]` is a read-only view of a file's one private mapping: nothing is read until it is used, and pages that
    are not in use may be dropped by the system at any time. A tensor that is not aligned is copied, and so is one that
    is computed from what the file holds. (A file that is truncated *in place* while it is mapped ends the process with
    SIGBUS; `save` never does that.)

    Parameters
    ----------
    files : {name: open file}
    where : their folder, for messages
    mapped : False reads tensors into memory instead, and leaves nothing that a change of the file could reach
    """

    def __init__(self, files: Mapping[str, BinaryIO], where: str, mapped: bool = True) -> None:
        self._files, self._where, self._mapped = files, where, mapped
        self._data: dict[str, Array] = {}
        self._unaligned: dict[str, int] = {}

    def __getitem__(self, info: TensorInfo) -> Array:
        if not self._mapped:
            return info.values(_read(self._files[info.file], info))
        if info.file not in self._data:
            mapping = map_file(self._files[info.file], f"{self._where}/{info.file}")
            self._data[info.file] = np.frombuffer(mapping, np.uint8)
        piece = self._data[info.file][info.offset : info.offset + info.nbytes]
        if not info.aligned:
            piece = piece.copy()
            self._unaligned[info.file] = self._unaligned.get(info.file, 0) + info.nbytes
        return info.values(piece)

    def warn(self) -> None:
        """Warn of the unaligned tensors there were."""
        for file, copied in self._unaligned.items():
            message = f"{self._where}/{file}: {gigabytes(copied)} of unaligned tensors are copied, not mapped"
            warnings.warn(message, stacklevel=3)


def load_tensors(path: str | Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file into memory, as writable arrays of their own.

    Takes integers and booleans too: made for the state of a training run.

    Raises
    ------
    CheckpointError
        If the file is missing, or not a valid safetensors file.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be opened: {error.strerror}") from None
    with file:
        infos = read_header(file, path.name, str(path), ALL_TYPES)
        return {name: read_elements(file, info, 0, info.size).reshape(info.shape) for name, info in infos.items()}


def read_elements(file: BinaryIO, info: TensorInfo, start: int, count: int) -> Array:
    """Read `count` elements of a tensor's flattened values, from the one numbered `start`."""
    wanted = info.span(start, count)
    return wanted.values(_read(file, wanted))


def _read(file: BinaryIO, info: TensorInfo) -> Array:
    """Read a tensor's bytes."""
    file.seek(info.offset)
    data = np.empty(info.nbytes, np.uint8)
    if file.readinto(data.data) < info.nbytes:  # type: ignore[attr-defined]
        raise DamagedFileError(f"{info.file}: became shorter while it was read, in tensor {shown(info.name)}")
    return data


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write: type and shape are known at once, its values, in one piece or several, when they are due."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_tensors(path: str | Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays to a safetensors file, and make sure they have reached the disk.

    The file itself is not replaced atomically: write it inside `write_folder_atomically`.

    Parameters
    ----------
    path : file to write; follows the umask
    tensors : {name: array}
        Written one at a time, in the order that keeps every tensor aligned: widest elements first.
    metadata : {text: text}

    Raises
    ------
    SaveError
        If the format has no name for an array's dtype.
    """
    write_tensors(path, {name: _whole(array) for name, array in tensors.items()}, metadata)


def _whole(array: Array) -> Outgoing:
    return Outgoing(array.dtype, array.shape, lambda: [array])


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Outgoing],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Do what `save_tensors` does, with values that are asked for one piece at a time.

    `progress` is called with the bytes of every piece written.
    """
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable
    with Path(path).open("wb") as file:
        file.write(_header(order, metadata, path))
        for _, tensor in order:
            for piece in tensor.pieces():
                # ascontiguousarray, because a transposed view's memory is not in the order that the header promises
                data = np.ascontiguousarray(to_host(piece)).reshape(-1).view(np.uint8).data
                file.write(data)
                progress(len(data))
        file.flush()
        os.fsync(file.fileno())


def _header(order: list[tuple[str, Outgoing]], metadata: Mapping[str, str] | None, path: str | Path) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in order:
        if tensor.dtype not in _NAMES:
            raise SaveError(f"{path}: tensor {name} is {tensor.dtype}; safetensors takes {', '.join(ALL_TYPES)}")
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.nbytes],
        }  # fmt: skip
        begin += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
