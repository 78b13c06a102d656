"""The weight files of a folder: one `model.safetensors`, or shards and the index that says which tensor is where."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from minimoe.checkpoint.errors import MissingFileError, ShardIndexError, UnsafeFormatError, listed, shown
from minimoe.checkpoint.folder import PICKLES, Folder
from minimoe.checkpoint.header import TensorInfo, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_INDEX = 20_000_000  # bytes
_MAX_SHARDS = 1000


@dataclass(frozen=True, eq=False)
class Shards:
    """Open weight files, and all tensors in them by name; headers are checked, nothing is mapped."""

    files: dict[str, BinaryIO]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


@contextlib.contextmanager
def open_shards(folder: Folder) -> Iterator[Shards]:
    """Open the weight files of a folder and check their headers against each other and the index.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or unsafe, a tensor is in two shards, or the index says other than the shards.
    """
    names = folder.names()
    if SINGLE not in names and INDEX not in names:
        _refuse(folder, names)
    weight_map = _read_index(folder) if INDEX in names else None
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if weight_map is not None and SINGLE in names and shards != [SINGLE]:
        raise ShardIndexError(f"{folder.path}: holds both {SINGLE} and {INDEX} with other shards: remove the stale one")
    if missing := [name for name in shards if name not in names]:
        raise MissingFileError(f"{folder.path}: {len(missing)} of {len(shards)} shards are missing: {listed(missing)}")
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(folder.open(name)) for name in shards}
        headers = {name: read_header(file, name, f"{folder.path}/{name}") for name, file in files.items()}
        tensors = _join(folder, headers)
        if weight_map is not None:
            _compare_with_index(folder, weight_map, tensors)
        yield Shards(files, tensors)


def _refuse(folder: Folder, names: list[str]) -> None:
    """Say why a folder without weights of ours has none."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UnsafeFormatError(
            f"{folder.path}: its weights are pickle files, never opened, because they can run code "
            f"({listed(pickles, 3)}); convert them to safetensors with transformers' save_pretrained"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".npz"))]
    found = f"; found {listed(others, 4)}" if others else ""
    raise MissingFileError(f"{folder.path}: there is no {SINGLE} and no {INDEX}{found}")


def _read_index(folder: Folder) -> dict[str, str]:
    where = f"{folder.path}/{INDEX}"
    weight_map: Any = folder.read_json(INDEX, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(f"{where}: weight_map must be an object that gives each tensor's shard")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ShardIndexError(
                f"{where}: the shard of {shown(tensor)} must be a .safetensors file, not {shown(shard)}"
            )
    shards = set(weight_map.values())
    if len(shards) > _MAX_SHARDS:
        raise ShardIndexError(f"{where}: names {len(shards):,} shards; at most {_MAX_SHARDS:,} are opened")
    for shard in sorted(shards):
        folder.check_name(shard)
    return weight_map


def _join(folder: Folder, headers: dict[str, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for header in headers.values():
        for name, info in header.items():
            if name in tensors:
                twice.append(f"{name} (in {tensors[name].file} and {info.file})")
            tensors[name] = info
    if twice:
        raise ShardIndexError(f"{folder.path}: tensors in two shards: {listed(twice)}")
    return tensors


def _compare_with_index(folder: Folder, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = [f"{name} (not in {shard})" for name, shard in weight_map.items() if name not in tensors]
    unlisted = [f"{name} (in {info.file})" for name, info in tensors.items() if name not in weight_map]
    elsewhere = [
        f"{name} (in {tensors[name].file}, not in {shard})"
        for name, shard in weight_map.items()
        if name in tensors and tensors[name].file != shard
    ]
    kinds = {"missing": absent, "not in the index": unlisted, "in another shard": elsewhere}
    wrong = "; ".join(f"{kind} ({len(found)}): {listed(found)}" for kind, found in kinds.items() if found)
    if wrong:
        raise ShardIndexError(f"{folder.path}/{INDEX}: does not describe its shards: tensors {wrong}")
