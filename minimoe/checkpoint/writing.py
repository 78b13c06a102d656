"""Write a checkpoint folder in Hugging Face's layout, atomically (see `atomic`)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from minimoe.checkpoint.atomic import write_folder_atomically
from minimoe.checkpoint.errors import Differences, SaveError, TensorMismatchError
from minimoe.checkpoint.formats import CONFIG, config_to_hf, hf_name
from minimoe.checkpoint.header import WEIGHT_TYPES
from minimoe.checkpoint.shards import INDEX, SHARD, SINGLE
from minimoe.checkpoint.tensors import save_tensors
from minimoe.config import ModelConfig
from minimoe.params import Params, named, shapes
from minimoe.shapes import Array

TOKENIZER = "tokenizer.model"
TRAINING_STATE = "training_state"  # files with this stem belong to a checkpoint, and go with it
_OURS = re.compile(
    "|".join([*map(re.escape, (CONFIG, SINGLE, INDEX, TOKENIZER)), SHARD.pattern, rf"{TRAINING_STATE}\..*"])
)


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_file: str | Path | None = None,
    also: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load_params`, and transformers, can read; the old one stays whole until it is replaced.

    Parameters
    ----------
    folder : path
        May be the folder that `params` are mapped from. Of an older checkpoint there, config, weights, tokenizer.model
        and training state are replaced as one set (what is not written now is gone); all other files are kept.
    config, params
        Every tensor is written in its own type: float32, float64, bfloat16 or float16. Only one at a time is copied.
    tokenizer_file : path or None
        Copied as tokenizer.model.
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
    tensors = _tensors(config, params, str(folder))

    def write(new: Path) -> None:
        text = json.dumps(config_to_hf(config, params.dtype), indent=2, allow_nan=False)
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")
        _write_weights(new, tensors, max_shard_bytes)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, new / TOKENIZER)
        if also is not None:
            also(new)

    write_folder_atomically(folder, write, keep=lambda name: _OURS.fullmatch(name) is None)


def _tensors(config: ModelConfig, params: Params, where: str) -> dict[str, Array]:
    """Hugging Face's name and the array of every parameter, checked against the config."""
    arrays, expected, wrong = dict(named(params)), shapes(config), Differences()
    wrong.missing.extend(name for name in expected if name not in arrays)
    wrong.extra.extend(name for name in arrays if name not in expected)
    for name, array in arrays.items():
        if name in expected and array.shape != expected[name]:
            wrong.misshapen.append(f"{name} is {array.shape}, should be {expected[name]}")
        if array.dtype not in WEIGHT_TYPES.values():
            raise SaveError(f"{where}: {name} is {array.dtype}; weights are saved as {', '.join(WEIGHT_TYPES)}")
    if wrong:
        raise TensorMismatchError(f"{where}: not saved", wrong)
    return {hf_name(name): array for name, array in arrays.items()}


def _write_weights(folder: Path, tensors: Mapping[str, Array], max_shard_bytes: int) -> None:
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        save_tensors(folder / SINGLE, tensors, {"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / name, {key: tensors[key] for key in shard}, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, Array], max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order; a shard is closed before the tensor that would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards
