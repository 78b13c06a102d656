"""Open a checkpoint folder: check everything, then map each tensor where it lies.

Order matters for files that one cannot trust: config.json, headers, names and shapes are read and compared first,
and only a folder in which all of them agree is mapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16
from minimoe.checkpoint.folder import Folder, read_whole
from minimoe.checkpoint.formats import CONFIG, config_from_hf
from minimoe.checkpoint.header import TensorInfo
from minimoe.checkpoint.matching import check_tied_head, match
from minimoe.checkpoint.memory import require_memory
from minimoe.checkpoint.shards import Shards, open_shards
from minimoe.checkpoint.tensors import map_tensors
from minimoe.config import ModelConfig
from minimoe.params import Params, from_named
from minimoe.shapes import Array

_MAX_CONFIG = 1_000_000  # bytes
_COMPUTABLE = (np.dtype(np.float32), np.dtype(np.float64), BFLOAT16)


@dataclass(frozen=True)
class Headers:
    """What the headers of a folder's weight files say.

    Attributes
    ----------
    tensors : every tensor, in the order of the files; `TensorInfo.file` is its shard
    nbytes : bytes of all tensors
    """

    tensors: tuple[TensorInfo, ...]
    nbytes: int


def read_config(folder: str | Path) -> ModelConfig:
    """Return the config of a checkpoint folder.

    Raises
    ------
    CheckpointError
        If there is no folder or no config.json; ConfigFileError if it describes no model of ours.
    """
    return read_whole(folder, config_of)


def headers(folder: str | Path) -> Headers:
    """Return what the headers of a folder's weight files say; no tensor is read, and none compared with the config.

    Raises
    ------
    CheckpointError
        If a weight file is missing or damaged.
    """

    def read(opened: Folder) -> Headers:
        with open_shards(opened) as shards:
            return Headers(tuple(shards.tensors.values()), shards.nbytes)

    return read_whole(folder, read)


def load_params(folder: str | Path, dtype: Any = None, *, mapped: bool = True) -> tuple[ModelConfig, Params]:
    """Open a checkpoint folder in Hugging Face's Mixtral, Mistral or Llama layout.

    Parameters
    ----------
    folder : path
    dtype : {None, float32, float64, bfloat16}
        None keeps every tensor as it is stored (float16 is widened to float32).
    mapped : bool
        False reads the weights into memory, instead of mapping the files: for files that others may change.

    Returns
    -------
    config : ModelConfig
    params : Params
        Read-only views of the files where the type is kept: nothing is read before it is used.

    Raises
    ------
    CheckpointError
        If anything about the folder is wrong; of the tensors' names and shapes, everything that is wrong at once.
    """
    kind = None if dtype is None else np.dtype(dtype)
    if kind is not None and kind not in _COMPUTABLE:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _COMPUTABLE))}, not {kind}")

    def read(opened: Folder) -> tuple[ModelConfig, Params]:
        config = config_of(opened)
        with open_shards(opened) as shards:
            placed = match(config, shards, str(opened.path))
            _check_memory(placed.values(), kind, mapped, str(opened.path))
            arrays = map_shards(shards, placed, str(opened.path))
            check_tied_head(config, shards, arrays, str(opened.path))
        return config, from_named(config, {name: _as(array, kind, mapped) for name, array in arrays.items()})

    return read_whole(folder, read)


def config_of(opened: Folder) -> ModelConfig:
    """Read the config of an open folder."""
    return config_from_hf(opened.read_json(CONFIG, _MAX_CONFIG), f"{opened.path}/{CONFIG}")


def map_shards(shards: Shards, placed: dict[str, TensorInfo], where: str) -> dict[str, Array]:
    """Map every placed tensor: {our name: array}."""
    arrays: dict[str, Array] = {}
    for shard, file in shards.files.items():
        mine = {ours: info for ours, info in placed.items() if info.file == shard}
        if mine:
            views = map_tensors(file, mine.values(), f"{where}/{shard}")
            arrays |= {ours: views[info.name] for ours, info in mine.items()}
    return arrays


def _converted(stored: np.dtype[Any], kind: np.dtype[Any] | None) -> np.dtype[Any]:
    if kind is not None:
        return kind
    return np.dtype(np.float32) if stored == np.float16 else stored


def _check_memory(infos: Iterable[TensorInfo], kind: np.dtype[Any] | None, mapped: bool, where: str) -> None:
    changed = [(info, _converted(info.dtype, kind)) for info in infos]
    size = sum(info.size * new.itemsize for info, new in changed if not mapped or new != info.dtype)
    require_memory(size, f"{where}: the weights that are converted or copied")


def _as(array: Array, kind: np.dtype[Any] | None, mapped: bool) -> Array:
    return array.astype(_converted(array.dtype, kind), copy=not mapped)
