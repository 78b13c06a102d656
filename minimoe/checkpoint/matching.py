"""Which tensor of the files holds which parameter, and everything about their names and shapes that is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from minimoe.checkpoint.errors import ConfigFileError, Differences, TensorMismatchError, gigabytes
from minimoe.checkpoint.header import MAX_TENSORS, TensorInfo
from minimoe.checkpoint.layouts import Form, Stored
from minimoe.checkpoint.shards import Shards
from minimoe.checkpoint.tensors import MappedTensors
from minimoe.config import ModelConfig
from minimoe.params import shapes

# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Placed:
    """Where a parameter's values lie: a tensor of the files, or a piece of one, and in which order."""

    info: TensorInfo
    form: Form

    @property
    def in_place(self) -> bool:
        """Whether it can be used where it lies; otherwise its values are copied in another order or type."""
        return self.form.plain and not self.info.packed


def match(config: ModelConfig, shards: Shards, where: str) -> dict[str, Placed]:
    """Return where each parameter lies: {our name: Placed}.

    Raises
    ------
    TensorMismatchError
        If tensors are missing, extra, transposed or of another shape; all of them are named.
    ConfigFileError
        If the config describes a model so much larger than the files that comparing them is pointless.
    """
    _refuse_absurd(config, shards, where)
    found, wrong = dict(shards.tensors), Differences()
    placed: dict[str, Placed] = {}
    for stored in shards.layout.tensors(config):
        info = found.pop(stored.name, None)
        if info is None:
            wrong.missing.append(stored.name)
        elif info.shape != stored.shape:
            kind = wrong.transposed if _transposed(info.shape, stored.shape) else wrong.misshapen
            kind.append(f"{stored.name} is {info.shape}, should be {stored.shape}")
        else:
            placed |= _pieces(info, stored)
    head = shards.layout.name_of("output")
    if config.tie_embeddings and head in found and found[head].shape == shapes(config)["tok_embeddings"]:
        del found[head]  # a copy of the table, as transformers v4 sometimes saved it
    wrong.extra.extend(name for name in found if not _BUFFERS.fullmatch(name))
    if wrong:
        raise TensorMismatchError(where, wrong)
    return placed


def _pieces(info: TensorInfo, stored: Stored) -> dict[str, Placed]:
    count = len(stored.parts)
    return {ours: Placed(info.piece(i, count, stored.part_shape), stored.form) for i, ours in enumerate(stored.parts)}


def _transposed(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(expected) > 1 and shape == (*expected[:-2], expected[-1], expected[-2])


def _refuse_absurd(config: ModelConfig, shards: Shards, where: str) -> None:
    count = config.num_layers * (9 + 3 * config.num_experts)
    stored = sum(info.size for info in shards.tensors.values())
    if count > MAX_TENSORS or config.num_parameters() > 1000 * (stored + 1_000_000):
        raise ConfigFileError(
            f"{where}/{shards.layout.config}: describes {config.num_parameters():,} parameters in some {count:,} "
            f"tensors, {gigabytes(2 * config.num_parameters())} in bfloat16; the files hold {len(shards.tensors):,} "
            f"tensors, {gigabytes(shards.nbytes)}"
        )


def check_tied_head(config: ModelConfig, shards: Shards, placed: dict[str, Placed], where: str) -> None:
    """Refuse a tied model whose files hold an output projection that differs from the embeddings."""
    info = shards.tensors.get(shards.layout.name_of("output"))
    if config.tie_embeddings and info is not None:
        mapped = MappedTensors(shards.files, where)
        head, table = mapped[info], mapped[placed["tok_embeddings"].info]
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(head, table, strict=True)):
            raise TensorMismatchError(
                f"{where} (tie_word_embeddings is true, but the two tensors differ)", Differences(extra=[info.name])
            )
