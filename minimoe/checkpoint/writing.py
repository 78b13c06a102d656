"""Write a checkpoint folder in one of the layouts, atomically (see `atomic`), one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.checkpoint.atomic import write_folder_atomically
from minimoe.checkpoint.errors import Differences, LayoutError, SaveError, TensorMismatchError, gigabytes, shown
from minimoe.checkpoint.formats import CONFIG, config_to_hf, family_of
from minimoe.checkpoint.header import WEIGHT_TYPES
from minimoe.checkpoint.layouts import GROK, LAYOUTS, PARAMS, Layout, Stored
from minimoe.checkpoint.params_json import config_to_params
from minimoe.checkpoint.shards import INDEX, NUMBERED, SHARD, SINGLE, STEMS
from minimoe.checkpoint.tensors import Outgoing, write_tensors
from minimoe.config import ModelConfig
from minimoe.params import Params, named, shapes
from minimoe.shapes import Array

TOKENIZER, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
TRAINING_STATE = "training_state"  # files with this stem belong to a checkpoint, and go with it
SHARD_BYTES = 5_000_000_000
_WEIGHTS = [form.format(stem) for form in (SINGLE, INDEX) for stem in STEMS]
_OURS = re.compile(
    "|".join(
        [
            *map(re.escape, (CONFIG, PARAMS, TOKENIZER, TOKENIZER_JSON, *_WEIGHTS)), SHARD.pattern, NUMBERED.pattern,
            rf"{TRAINING_STATE}\..*",
        ]
    )
)  # fmt: skip
Progress = Callable[[int, int], None]  # bytes written so far, and those there are


@dataclass(frozen=True)
class Parameter:
    """A parameter to write: its type is known at once, its values when they are due."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    values: Callable[[], Array]


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    layout: str = "hf",
    tokenizer_file: str | Path | None = None,
    also: Callable[[Path], None] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `load_params`, and transformers, can read; the old one stays whole until it is replaced.

    Parameters
    ----------
    folder : path
        May be the folder that `params` are mapped from. Of an older checkpoint there, config, weights, tokenizer and
        training state are replaced as one set (what is not written now is gone); all other files are kept.
    config, params
        Every tensor is written in its own type: float32, float64, bfloat16 or float16. Only one at a time is copied.
    layout : {"hf", "fused", "mistral", "stacked"}
        See `minimoe.checkpoint.layouts`; transformers reads "hf".
    tokenizer_file : path or None
        Copied as tokenizer.model, or tokenizer.json where its name ends so.
    also : called with the new folder before it takes its place, to write more files into it
    max_shard_bytes : int
        Weights that take more are split into shards of at most so many bytes (or of one tensor), with an index.

    Raises
    ------
    SaveError
        If the folder cannot be written; what was there before is whole.
    TensorMismatchError
        If `params` are not those of `config`.
    """

    def more(new: Path) -> None:
        copy_tokenizer(tokenizer_file, new)
        if also is not None:
            also(new)

    parameters = {name: _in_memory(array) for name, array in named(params)}
    write_checkpoint(folder, config, parameters, layout=layout, also=more, max_shard_bytes=max_shard_bytes)


def copy_tokenizer(file: str | Path | None, folder: Path) -> None:
    """Copy a tokenizer's file, if there is one, under the name by which it is found again."""
    if file is not None:
        shutil.copyfile(file, folder / (TOKENIZER_JSON if Path(file).suffix == ".json" else TOKENIZER))


def _in_memory(array: Array) -> Parameter:
    return Parameter(array.dtype, array.shape, lambda: array)


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, Parameter],
    *,
    layout: str,
    also: Callable[[Path], None],
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Do what `save` does, with parameters whose values are asked for one after the other."""
    chosen = layout_of(layout, config)
    _check(config, parameters, str(folder))
    tensors = {stored.name: _outgoing(stored, parameters, str(folder)) for stored in chosen.tensors(config)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_space(Path(folder), total)
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    def write(new: Path) -> None:
        dtype = parameters["tok_embeddings"].dtype
        raw = config_to_params(config) if chosen.config == PARAMS else config_to_hf(config, dtype)
        (new / chosen.config).write_text(json.dumps(raw, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _write_weights(new, chosen, tensors, max_shard_bytes, written)
        also(new)

    write_folder_atomically(folder, write, keep=lambda name: _OURS.fullmatch(name) is None)


def layout_of(name: str, config: ModelConfig) -> Layout:
    """Return the layout called so; Hugging Face's is another one for Grok-1.

    Raises
    ------
    LayoutError
        If there is none that can be written, or it cannot hold such a model.
    SaveError
        If no config.json can describe it.
    """
    if name not in LAYOUTS:
        raise LayoutError(f"unknown layout {shown(name)}; those that are written are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if layout.config != CONFIG or family_of(config) != "grok-1":
        return layout
    if name != "hf":
        raise LayoutError(f"layout {name} does not hold Grok-1: hf, mistral and stacked do")
    return GROK


def _check(config: ModelConfig, parameters: Mapping[str, Parameter], where: str) -> None:
    """Refuse parameters that are not those of the config, or of a type that is not saved."""
    expected, wrong = shapes(config), Differences()
    wrong.missing.extend(name for name in expected if name not in parameters)
    wrong.extra.extend(name for name in parameters if name not in expected)
    for name, parameter in parameters.items():
        if name in expected and parameter.shape != expected[name]:
            wrong.misshapen.append(f"{name} is {parameter.shape}, should be {expected[name]}")
        if parameter.dtype not in WEIGHT_TYPES.values():
            raise SaveError(f"{where}: {name} is {parameter.dtype}; weights are saved as {', '.join(WEIGHT_TYPES)}")
    if wrong:
        raise TensorMismatchError(f"{where}: not saved", wrong)


def check_space(folder: Path, size: int) -> None:
    """Raise SaveError if the disk has no room for so many bytes."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    disk = shutil.disk_usage(existing)
    if disk.total and size > disk.free:  # /proc and its like have no size, and are refused for what they are
        raise SaveError(
            f"{folder}: cannot be saved: the weights take {gigabytes(size)}; {gigabytes(disk.free)} are free"
        )


def _outgoing(stored: Stored, parameters: Mapping[str, Parameter], where: str) -> Outgoing:
    """A tensor of the layout, whose pieces are made as they are written."""
    parts = [parameters[ours] for ours in stored.parts]
    if len(types := {part.dtype for part in parts}) > 1:
        raise SaveError(
            f"{where}: {stored.name} would hold {' and '.join(sorted(map(str, types)))}: choose one type for all"
        )

    def pieces() -> Iterator[Array]:
        for part in parts:
            yield stored.form.written(part.values())

    return Outgoing(parts[0].dtype, stored.shape, pieces)


def _write_weights(
    folder: Path,
    layout: Layout,
    tensors: Mapping[str, Outgoing],
    max_shard_bytes: int,
    written: Callable[[int], None],
) -> None:
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE.format(layout.stem), tensors, {"format": "pt"}, written)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"{layout.stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, {key: tensors[key] for key in shard}, {"format": "pt"}, written)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX.format(layout.stem)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, Outgoing], max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order; a shard is closed before the tensor that would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
