"""Which tensor of the files is which parameter, and everything about their names and shapes that is wrong."""

from __future__ import annotations

import re

import numpy as np

from minimoe.checkpoint.errors import ConfigFileError, Differences, TensorMismatchError, gigabytes
from minimoe.checkpoint.formats import CONFIG, hf_name
from minimoe.checkpoint.header import MAX_TENSORS, TensorInfo
from minimoe.checkpoint.shards import Shards
from minimoe.checkpoint.tensors import map_tensors
from minimoe.config import ModelConfig
from minimoe.params import shapes
from minimoe.shapes import Array

# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def match(config: ModelConfig, shards: Shards, where: str) -> dict[str, TensorInfo]:
    """Return which tensor of the files is which parameter: {our name: TensorInfo}.

    Raises
    ------
    TensorMismatchError
        If tensors are missing, extra, transposed or of another shape; all of them are named.
    ConfigFileError
        If the config describes a model so much larger than the files that comparing them is pointless.
    """
    _refuse_absurd(config, shards, where)
    found, wrong = dict(shards.tensors), Differences()
    placed = {}
    for ours, shape in shapes(config).items():
        name = hf_name(ours)
        info = found.pop(name, None)
        if info is None:
            wrong.missing.append(name)
            continue
        placed[ours] = info
        if info.shape != shape:
            kind = wrong.transposed if len(shape) == 2 and info.shape == shape[::-1] else wrong.misshapen
            kind.append(f"{name} is {info.shape}, should be {shape}")
    head = hf_name("output")
    if config.tie_embeddings and head in found and found[head].shape == shapes(config)["tok_embeddings"]:
        del found[head]  # a copy of the table, as transformers v4 sometimes saved it
    wrong.extra.extend(name for name in found if not _BUFFERS.fullmatch(name))
    if wrong:
        raise TensorMismatchError(where, wrong)
    return placed


def _refuse_absurd(config: ModelConfig, shards: Shards, where: str) -> None:
    count = config.num_layers * (7 + 3 * config.num_experts)
    stored = sum(info.size for info in shards.tensors.values())
    if count > MAX_TENSORS or config.num_parameters() > 1000 * (stored + 1_000_000):
        raise ConfigFileError(
            f"{where}/{CONFIG}: describes {config.num_parameters():,} parameters in some {count:,} tensors, "
            f"{gigabytes(2 * config.num_parameters())} in bfloat16; the files hold {len(shards.tensors):,} tensors, "
            f"{gigabytes(shards.nbytes)}"
        )


def check_tied_head(config: ModelConfig, shards: Shards, arrays: dict[str, Array], where: str) -> None:
    """Refuse a tied model whose files hold an output projection that differs from the embeddings."""
    info = shards.tensors.get(hf_name("output"))
    if config.tie_embeddings and info is not None:
        head = map_tensors(shards.files[info.file], [info], where)[info.name]
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(head, arrays["tok_embeddings"], strict=True)):
            raise TensorMismatchError(
                f"{where} (tie_word_embeddings is true, but the two tensors differ)", Differences(extra=[info.name])
            )
