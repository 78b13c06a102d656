"""The weight files of a folder: a single one, or shards and the index that says which tensor is where.

Hugging Face's begin with `model`, Mistral's with `consolidated`; the latter may lack the index, since each file holds
whole tensors, and then may be called `consolidated.00.safetensors` and so on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from minimoe.checkpoint.errors import (
    LayoutError,
    MissingFileError,
    ShardIndexError,
    UnsafeFormatError,
    listed,
    shown,
)
from minimoe.checkpoint.folder import PICKLES, Folder
from minimoe.checkpoint.header import TensorInfo, read_header
from minimoe.checkpoint.layouts import Layout, recognise

SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"  # of a stem
STEMS = ("model", "consolidated")
SHARD = re.compile(r"(?:model|consolidated)-(\d{5})-of-(\d{5})\.safetensors")
NUMBERED = re.compile(r"consolidated\.(\d\d)\.safetensors")
_MAX_INDEX = 10_000_000  # bytes
_MAX_SHARDS = 1000


@dataclass(frozen=True, eq=False)
class Shards:
    """Open weight files, and all tensors in them by name; headers are checked, nothing is mapped."""

    files: dict[str, BinaryIO]
    tensors: dict[str, TensorInfo]
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


@contextlib.contextmanager
def open_shards(folder: Folder) -> Iterator[Shards]:
    """Open the weight files of a folder, check their headers against each other and the index, recognise the layout.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or unsafe, a tensor is in two shards, the index says other than the shards, or
        the tensors are of several layouts.
    """
    names = folder.names()
    stem = _stem(folder, names)
    single, index = SINGLE.format(stem), INDEX.format(stem)
    weight_map = _read_index(folder, index) if index in names else None
    shards = (_numbered(names) or [single]) if weight_map is None else sorted(set(weight_map.values()))
    if single in names and shards != [single]:
        others = f"{index} with other shards" if weight_map is not None else shards[0]
        raise ShardIndexError(f"{folder.path}: holds both {single} and {others}: remove the stale one")
    if missing := [name for name in shards if name not in names]:
        raise MissingFileError(f"{folder.path}: {len(missing)} of {len(shards)} shards are missing: {listed(missing)}")
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(folder.open(name)) for name in shards}
        headers = {name: read_header(file, name, f"{folder.path}/{name}") for name, file in files.items()}
        tensors = _join(folder, headers)
        if weight_map is not None:
            _compare_with_index(folder, index, weight_map, tensors)
        yield Shards(files, tensors, recognise(tensors, str(folder.path)))


def _stem(folder: Folder, names: list[str]) -> str:
    """How the names of the weight files begin; an index counts only where no layout has any of its files."""
    files = {stem: [name for name in names if _is_of(stem, name)] for stem in STEMS}
    there = [stem for stem in STEMS if files[stem]] or [stem for stem in STEMS if INDEX.format(stem) in names]
    if not there:
        _refuse(folder, names)
    if len(there) > 1:
        found = [(files[stem] or [INDEX.format(stem)])[0] for stem in there]
        raise LayoutError(
            f"{folder.path}: holds weights in two layouts, {' and '.join(found)}: keep one of them in this folder"
        )
    return there[0]


def _is_of(stem: str, name: str) -> bool:
    """Whether a file of this name holds weights of the layouts whose files begin so."""
    numbered = SHARD.fullmatch(name) or NUMBERED.fullmatch(name)
    return name == SINGLE.format(stem) or (numbered is not None and name.startswith(stem))


def _numbered(names: list[str]) -> list[str]:
    """Mistral's shards without an index, those too that their numbers say should be there."""
    given = [match for name in names if (match := NUMBERED.fullmatch(name))]
    counted = [match for name in names if _is_of("consolidated", name) and (match := SHARD.fullmatch(name))]
    wanted = {f"consolidated.{i:02d}.safetensors" for i in range(1 + max((int(m[1]) for m in given), default=-1))}
    for total in {int(match[2]) for match in counted}:
        wanted |= {f"consolidated-{i:05d}-of-{total:05d}.safetensors" for i in range(1, 1 + min(total, _MAX_SHARDS))}
    return sorted(wanted)


def _refuse(folder: Folder, names: list[str]) -> NoReturn:
    """Say why a folder without weights of ours has none."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UnsafeFormatError(
            f"{folder.path}: its weights are pickle files, never opened, because they can run code "
            f"({listed(pickles, 3)}); convert them to safetensors with transformers' save_pretrained"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".npz"))]
    found = f"; found {listed(others, 4)}" if others else ""
    wanted = ", ".join(form.format(stem) for stem in STEMS for form in (SINGLE, INDEX))
    raise MissingFileError(f"{folder.path}: there is none of {wanted}{found}")


def _read_index(folder: Folder, index: str) -> dict[str, str]:
    where = f"{folder.path}/{index}"
    weight_map: Any = folder.read_json(index, _MAX_INDEX).get("weight_map")
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


def _compare_with_index(folder: Folder, index: str, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
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
        raise ShardIndexError(f"{folder.path}/{index}: does not describe its shards: tensors {wrong}")
