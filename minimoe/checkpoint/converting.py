"""Write checkpoints tensor by tensor: from another checkpoint, or with random weights.

Neither holds more than one parameter in memory, so both can be larger than it.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.checkpoint.errors import SaveError, UnsupportedTypeError, shown
from minimoe.checkpoint.folder import Folder, read_whole
from minimoe.checkpoint.header import WEIGHT_TYPES
from minimoe.checkpoint.matching import Placed
from minimoe.checkpoint.reading import open_checkpoint
from minimoe.checkpoint.tensors import MappedTensors
from minimoe.checkpoint.writing import (
    SHARD_BYTES,
    TOKENIZER,
    Parameter,
    Progress,
    check_space,
    copy_tokenizer,
    write_checkpoint,
)
from minimoe.config import ModelConfig
from minimoe.params import draw, shapes
from minimoe.shapes import Array

# What goes along with the weights, where it is there.
_COMPANIONS = (
    TOKENIZER, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    layout: str = "hf",
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> ModelConfig:
    """Write a checkpoint in another layout or number format, with its tokenizer; return its config.

    Parameters
    ----------
    source : path
        A checkpoint in any layout; it is checked as `load_params` checks it.
    folder : path
        What to write, atomically (see `save`); may be `source` itself.
    layout : {"hf", "fused", "mistral", "stacked"}
    dtype : {None, float32, float64, bfloat16, float16}
        None keeps every value bit for bit in its own type (what GGUF packs becomes float32).
    max_shard_bytes : int
        See `save`.
    progress : called with the bytes written so far, and those there are

    Raises
    ------
    CheckpointError
        If `source` is not a whole checkpoint, or `folder` cannot be written; SaveError also where finite values do not
        fit `dtype`.
    """
    kind = None if dtype is None else weight_type(dtype)

    def read(opened: Folder) -> ModelConfig:
        with open_checkpoint(opened) as (config, shards, placed):
            files = MappedTensors(shards.files, str(opened.path))
            parameters = {name: _stored(name, place, files, kind) for name, place in placed.items()}
            write_checkpoint(
                folder, config, parameters, layout=layout, also=partial(_copy_companions, opened),
                max_shard_bytes=max_shard_bytes, progress=progress,
            )  # fmt: skip
            return config

    return read_whole(source, read)


def initialise(
    folder: str | Path,
    config: ModelConfig,
    seed: int = 0,
    *,
    layout: str = "hf",
    dtype: Any = "bfloat16",
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a checkpoint with the random weights of `params.random`, one parameter at a time.

    Parameters
    ----------
    folder : path
        What to write, atomically (see `save`).
    config, seed
        The same seed gives the same weights, whatever the layout.
    layout, dtype, max_shard_bytes, progress
        See `convert`.
    tokenizer_file : path or None
        Copied along (see `save`).

    Raises
    ------
    SaveError
        If `folder` cannot be written, or the disk has no room for it.
    """
    kind = weight_type(dtype)
    check_space(Path(folder), config.num_parameters() * kind.itemsize)  # before millions of names are made
    parameters = {
        name: Parameter(kind, shape, partial(draw, config, name, shape, seed, kind))
        for name, shape in shapes(config).items()
    }

    write_checkpoint(
        folder, config, parameters, layout=layout, also=partial(copy_tokenizer, tokenizer_file),
        max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip


def weight_type(dtype: Any) -> np.dtype[Any]:
    """Return the number format called `dtype`.

    Raises
    ------
    UnsupportedTypeError
        If weights are not stored in it.
    """
    names = {str(kind): kind for kind in WEIGHT_TYPES.values()}
    if (name := dtype if isinstance(dtype, str) else str(np.dtype(dtype))) not in names:
        raise UnsupportedTypeError(f"dtype must be one of {', '.join(names)}, not {shown(name)}")
    return names[name]


def _stored(name: str, place: Placed, files: MappedTensors, kind: np.dtype[Any] | None) -> Parameter:
    """A parameter of a checkpoint, which is read when it is due."""
    dtype = place.info.dtype if kind is None else kind

    def read() -> Array:
        return _cast(name, place.form.read(files[place.info]), dtype)

    return Parameter(dtype, place.form.shape(place.info.shape), read)


def _cast(name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast).all() and np.isfinite(values).all():
        most = np.abs(values.astype(np.float64)).max()
        raise SaveError(f"{name}: holds {most:.6g}, which {dtype} cannot hold")
    return cast


def _copy_companions(opened: Folder, new: Path) -> None:
    there = opened.names()
    for name in _COMPANIONS:
        if name in there:
            with opened.open(name) as old, (new / name).open("wb") as copy:
                shutil.copyfileobj(old, copy)
