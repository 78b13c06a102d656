"""The header of a safetensors file, read strictly before anything is mapped or allocated.

file = length (8 bytes, little-endian) ‖ header (JSON, `length` bytes) ‖ data
header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}

Every tensor must have ``end - begin = itemsize · ∏ shape``, and together they must fill the data exactly: no overlap,
no hole, nothing after the last. Source: https://github.com/huggingface/safetensors, README, section "Format".
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from minimoe.arrays import BFLOAT16
from minimoe.checkpoint import strict_json
from minimoe.checkpoint.errors import DamagedFileError, UnsafeFormatError, UnsupportedTypeError, listed, shown
from minimoe.shapes import Array

WEIGHT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
}  # fmt: skip
ALL_TYPES: dict[str, np.dtype[Any]] = WEIGHT_TYPES | {
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
MAX_HEADER = 10_000_000  # bytes; Mixtral-8x22B in one file would need 0.3 million
MAX_TENSORS = 50_000
_MAX_DIMENSIONS = 8
_LFS = b"version https://git-lfs"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: in `file`, at `offset` from its start."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether it may be used in place: its offset is a multiple of its element's size."""
        return self.offset % self.dtype.itemsize == 0

    @property
    def packed(self) -> bool:
        """Whether the file holds no elements of `dtype`, but what they are computed from."""
        return False

    @property
    def kind(self) -> str:
        """What its elements are called: the dtype, or the way they are packed."""
        return str(self.dtype)

    def values(self, raw: Array) -> Array:
        """Return the array that its bytes in the file stand for."""
        return raw.view(self.dtype).reshape(self.shape)

    def span(self, start: int, count: int) -> Self:
        """Return `count` of its flattened elements, from the one numbered `start`, as a tensor of their own."""
        return dataclasses.replace(self, shape=(count,), offset=self.offset + start * self.dtype.itemsize)

    def piece(self, i: int, count: int, shape: tuple[int, ...]) -> Self:
        """Return part number `i` of `count`, all of one size, as a tensor of its own."""
        size = self.size // count
        return dataclasses.replace(self.span(i * size, size), shape=shape)


def read_header(
    file: BinaryIO, name: str, where: str, types: dict[str, np.dtype[Any]] = WEIGHT_TYPES
) -> dict[str, TensorInfo]:
    """Read and check the header of an open file.

    Parameters
    ----------
    file : binary file
    name : str
        The file's name in its folder, kept in every `TensorInfo`.
    where : str
        The file's path, for messages.
    types : {name in the format: dtype}
        Number formats to accept.

    Returns
    -------
    {tensor's name: TensorInfo}, in the header's order

    Raises
    ------
    DamagedFileError, UnsafeFormatError, UnsupportedTypeError
    """
    size = os.fstat(file.fileno()).st_size
    length = _header_length(file.read(64), size, where)
    file.seek(8)
    text = file.read(length)
    if text.count(b"{") > MAX_TENSORS + 2:  # before parsing, so that the time is bounded too
        raise DamagedFileError(f"{where}: its header lists more than {MAX_TENSORS:,} tensors")
    entries = strict_json.parse(text, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{where}: header: __metadata__ must map text to text")
    _check_types(entries, where, types)
    placed = [_tensor(key, entry, name, where, types) for key, entry in entries.items()]
    _check_layout(placed, size - 8 - length, size, where)
    return {info.name: TensorInfo(info.name, info.dtype, info.shape, name, 8 + length + info.offset) for info in placed}


def _header_length(start: bytes, size: int, where: str) -> int:
    if size == 0:
        raise DamagedFileError(f"{where}: the file is empty; download it again")
    if start.startswith(_LFS):
        raise DamagedFileError(f"{where}: a Git-LFS pointer, not the weights themselves; fetch them with: git lfs pull")
    if start.startswith(_PICKLES) and start[8:9] != b"{":  # a header of 1408 bytes starts with b"\x80\x05" too
        raise UnsafeFormatError(
            f"{where}: a pickle or zip file, not safetensors; never opened, because it can run code"
        )
    if size < 8:
        raise DamagedFileError(f"{where}: truncated: {size} bytes, too few for a header")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise DamagedFileError(
            f"{where}: not a safetensors file: its first 8 bytes announce a header of {length:,} bytes "
            f"(at most {MAX_HEADER:,} are read)"
        )
    if length > size - 8:
        raise DamagedFileError(f"{where}: truncated: the header takes {length:,} bytes, the file has {size:,}")
    return length


def _check_types(entries: dict[str, Any], where: str, types: dict[str, np.dtype[Any]]) -> None:
    wrong: dict[str, list[str]] = {}
    for name, entry in entries.items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind not in types:
            wrong.setdefault(kind, []).append(name)
    if wrong:
        kinds = "; ".join(f"{shown(kind)}: {listed(names, 3)}" for kind, names in wrong.items())
        raise UnsupportedTypeError(f"{where}: number formats other than {', '.join(types)}: {kinds}")


def _tensor(name: str, entry: Any, file: str, where: str, types: dict[str, np.dtype[Any]]) -> TensorInfo:
    """Check one entry by itself; `offset` counts from the start of the data."""
    at = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"{at}: its header entry must hold dtype, shape and data_offsets, nothing else")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise DamagedFileError(f"{at}: shape must be at most {_MAX_DIMENSIONS} counts, not {shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedFileError(f"{at}: data_offsets must be [begin, end], not {shown(offsets)}")
    if not isinstance(entry["dtype"], str):
        raise DamagedFileError(f"{at}: dtype must be text, not {shown(entry['dtype'])}")
    info = TensorInfo(name, types[entry["dtype"]], tuple(shape), file, offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise DamagedFileError(
            f"{at}: shape {shown(info.shape)} of {entry['dtype']} takes {shown(info.nbytes)} bytes, "
            f"its data_offsets give {shown(offsets[1] - offsets[0])}"
        )
    return info


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(placed: list[TensorInfo], data_size: int, size: int, where: str) -> None:
    order = sorted(placed, key=lambda info: (info.offset, info.nbytes))
    end, previous = 0, "the header"
    for info in order:
        if info.offset != end:
            what = "overlap" if info.offset < end else "leave a hole between them"
            raise DamagedFileError(f"{where}: tensors {shown(previous)} and {shown(info.name)} {what}")
        end, previous = info.offset + info.nbytes, info.name
    if end > data_size:
        raise DamagedFileError(
            f"{where}: truncated: {size:,} bytes instead of {size - data_size + end:,}; download it again"
        )
    if end < data_size:
        raise DamagedFileError(f"{where}: {data_size - end:,} bytes after the last tensor belong to none")
