"""Open a checkpoint folder: check everything, then map each tensor where it lies.

Order matters for files that one cannot trust: config.json, headers, names and shapes are read and compared first,
and only a folder in which all of them agree is mapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16
from minimoe.checkpoint.folder import Folder, read_whole
from minimoe.checkpoint.formats import CONFIG, config_from_hf
from minimoe.checkpoint.gguf_file import gguf_of, open_gguf
from minimoe.checkpoint.header import TensorInfo
from minimoe.checkpoint.layouts import PARAMS, Layout
from minimoe.checkpoint.matching import Placed, check_tied_head, match
from minimoe.checkpoint.memory import require_memory
from minimoe.checkpoint.params_json import config_from_params, refuse_disagreement
from minimoe.checkpoint.shards import Shards, open_shards
from minimoe.checkpoint.tensors import MappedTensors
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
    layout : how they are named and ordered
    """

    tensors: tuple[TensorInfo, ...]
    nbytes: int
    layout: Layout


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
        with _open_shards(opened) as shards:
            return Headers(tuple(shards.tensors.values()), shards.nbytes, shards.layout)

    return read_whole(folder, read)


def load_params(folder: str | Path, dtype: Any = None, *, mapped: bool = True) -> tuple[ModelConfig, Params]:
    """Open a checkpoint folder in any of the layouts of `minimoe.checkpoint.layouts`.

    Parameters
    ----------
    folder : path
        Of a folder, or of a GGUF file that one trusts.
    dtype : {None, float32, float64, bfloat16}
        None keeps every tensor as it is stored (float16 is widened to float32).
    mapped : bool
        False reads the weights into memory, instead of mapping the files: for files that others may change.

    Returns
    -------
    config : ModelConfig
    params : Params
        Read-only views of the files where type and order of the values are kept: nothing is read before it is used.
        Copied in any case are wq and wk of layouts with interleaved RoPE (1.3 GB of Mixtral-8x7B's 93 GB in bfloat16),
        w2 of the stacked layout (30 GB of them), which the loops need by rows, and what GGUF packs: `convert` such a
        checkpoint once.

    Raises
    ------
    CheckpointError
        If anything about the folder is wrong; of the tensors' names and shapes, everything that is wrong at once.
    """
    kind = None if dtype is None else np.dtype(dtype)
    if kind is not None and kind not in _COMPUTABLE:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _COMPUTABLE))}, not {kind}")

    def read(opened: Folder) -> tuple[ModelConfig, Params]:
        where = str(opened.path)
        with open_checkpoint(opened) as (config, shards, placed):
            _check_memory(placed.values(), kind, mapped, where)
            files = MappedTensors(shards.files, where, mapped)
            arrays = {name: _read(files, place, kind) for name, place in placed.items()}
        files.warn()
        return config, from_named(config, arrays)

    return read_whole(folder, read)


@contextlib.contextmanager
def open_checkpoint(opened: Folder) -> Iterator[tuple[ModelConfig, Shards, dict[str, Placed]]]:
    """Read config and headers of an open folder, and find every parameter; all of it is checked, nothing is mapped."""
    config, where = config_of(opened), str(opened.path)
    with _open_shards(opened) as shards:
        placed = match(config, shards, where)
        check_tied_head(config, shards, placed, where)
        yield config, shards, placed


@contextlib.contextmanager
def _open_shards(opened: Folder) -> Iterator[Shards]:
    """Open the weight files of a folder, of whatever format."""
    if (gguf := gguf_of(opened)) is None:
        with open_shards(opened) as shards:
            yield shards
    else:
        with open_gguf(opened, gguf) as file:
            yield file.shards


def config_of(opened: Folder) -> ModelConfig:
    """Read the config of an open folder: config.json, params.json, both if they agree, or a GGUF file's metadata."""
    if (gguf := gguf_of(opened)) is not None:
        with open_gguf(opened, gguf) as file:
            return file.config
    names = opened.names()
    raw, where = {}, f"{opened.path}/{PARAMS}"
    if PARAMS in names:
        raw = opened.read_json(PARAMS, _MAX_CONFIG)
        if CONFIG not in names:
            return config_from_params(raw, where)
    config = config_from_hf(opened.read_json(CONFIG, _MAX_CONFIG), f"{opened.path}/{CONFIG}")
    if PARAMS in names:
        refuse_disagreement(config, raw, where)
    return config


def copied_bytes(folder: str | Path) -> int:
    """Bytes of memory that `load_params` takes for weights that it cannot use where they lie in the files."""

    def read(opened: Folder) -> int:
        with open_checkpoint(opened) as (_, _, placed):
            return _copied(placed.values(), None, True)

    return read_whole(folder, read)


def _copied(placed: Iterable[Placed], kind: np.dtype[Any] | None, mapped: bool) -> int:
    changed = [(place, _converted(place.info.dtype, kind)) for place in placed]
    return sum(
        place.info.size * new.itemsize
        for place, new in changed
        if not mapped or not place.in_place or new != place.info.dtype
    )


def _check_memory(placed: Collection[Placed], kind: np.dtype[Any] | None, mapped: bool, where: str) -> None:
    """Refuse what does not fit, and say what would, where it is the order of the values that asks for memory."""
    remedy = "" if all(place.in_place for place in placed) else " (minimoe convert writes them as they are used)"
    require_memory(_copied(placed, kind, mapped), f"{where}: the weights that are converted or copied{remedy}")


def _converted(stored: np.dtype[Any], kind: np.dtype[Any] | None) -> np.dtype[Any]:
    if kind is not None:
        return kind
    return np.dtype(np.float32) if stored == np.float16 else stored


def _read(files: MappedTensors, place: Placed, kind: np.dtype[Any] | None) -> Array:
    array = place.form.read(files[place.info])
    return array.astype(_converted(array.dtype, kind), copy=False)
