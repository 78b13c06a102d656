"""Arrays in a safetensors file: mapped into memory in place, loaded, or written one after the other.

Files are written here and not by the safetensors library, whose `save_file` first copies all tensors into memory;
ours streams them, so a checkpoint larger than memory can be written from mapped arrays. The tests read what is
written here with that library, and the reverse.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
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


def map_tensors(file: BinaryIO, infos: Iterable[TensorInfo], where: str) -> dict[str, Array]:
    """Map tensors of one open file; they stay valid when it is closed, renamed or deleted.

    The arrays are read-only views of one private mapping: nothing is read until it is used, and pages that are not in
    use may be dropped by the system at any time. A tensor that is not aligned is copied, with a warning. (A file that
    is truncated *in place* while it is mapped ends the process with SIGBUS; `save` never does that.)
    """
    data = np.frombuffer(map_file(file, where), np.uint8)
    arrays, copied = {}, 0
    for info in infos:
        piece = data[info.offset : info.offset + info.nbytes]
        if not info.aligned:
            piece, copied = piece.copy(), copied + info.nbytes
        arrays[info.name] = piece.view(info.dtype).reshape(info.shape)
    if copied:
        warnings.warn(f"{where}: {gigabytes(copied)} of unaligned tensors are copied, not mapped", stacklevel=2)
    return arrays


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
    file.seek(info.offset + start * info.dtype.itemsize)
    data = bytearray(file.read(count * info.dtype.itemsize))  # a bytearray, so that the array is writable
    if len(data) < count * info.dtype.itemsize:
        raise DamagedFileError(f"{info.file}: became shorter while it was read, in tensor {shown(info.name)}")
    return np.frombuffer(data, info.dtype)


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
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable
    with Path(path).open("wb") as file:
        file.write(_header(order, metadata, path))
        for _, array in order:
            # ascontiguousarray, because a transposed view's memory is not in the order that the header promises
            file.write(np.ascontiguousarray(to_host(array)).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _header(order: list[tuple[str, Array]], metadata: Mapping[str, str] | None, path: str | Path) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, array in order:
        if array.dtype not in _NAMES:
            raise SaveError(f"{path}: tensor {name} is {array.dtype}; safetensors takes {', '.join(ALL_TYPES)}")
        entries[name] = {
            "dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes],
        }  # fmt: skip
        begin += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
