"""GGUF files of Llama's architecture, which Mistral and Mixtral share, read by the package `gguf` (an extra).

For files that one trusts only: the header is parsed by that package, not by the strict reader that safetensors have
here. Tensors in F32, F16 and BF16 lie as in any other file; those in Q8_0 and the like, and in the K-quants, are
packed, and become float32 in memory, one parameter at a time. The tokenizer is not read: give one as `tokenizer=`.

Sizes and constants are metadata, `llama.*`; a key that is not known here may change the mathematics, and is refused.
Its reals are float32: 1e-5 is stored as 9.99999974e-06, and read as the shortest number that rounds to what is stored.
Sources: https://github.com/ggml-org/ggml, docs/gguf.md; conversion/llama.py and gguf-py of llama.cpp.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from minimoe.arrays import BFLOAT16
from minimoe.checkpoint.errors import (
    ConfigFileError,
    DamagedFileError,
    LayoutError,
    UnsupportedTypeError,
    listed,
    shown,
)
from minimoe.checkpoint.folder import GGUF_SUFFIX, Folder
from minimoe.checkpoint.header import TensorInfo
from minimoe.checkpoint.layouts import GGUF, GGUF_OLD, Layout
from minimoe.checkpoint.shards import Shards
from minimoe.config import ConfigError, ModelConfig
from minimoe.shapes import Array

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16, "F64": np.dtype("<f8")}
_PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_ARCHITECTURE, _TRUSTED = "llama", "GGUF is for files that you trust"
_FIELDS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "context_length": "max_length",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_token",
}
_REQUIRED = (
    "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Keys that change nothing at these values; the two widths, at that of a head.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "attention.causal": (True,),
    "expert_weights_norm": (True,), "expert_weights_scale": (0.0, 1.0), "expert_shared_count": (0,),
}  # fmt: skip
_HEAD_WIDTHS = ("rope.dimension_count", "attention.value_length")


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A tensor in blocks of some numbers with common scales; `dtype` is what it is unpacked to."""

    packing: str
    block: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size // self.block * self.block_bytes

    @property
    def aligned(self) -> bool:
        """Whether it can be read where it lies: bytes always can."""
        return True

    @property
    def packed(self) -> bool:
        """Whether the file holds no elements of `dtype`: always."""
        return True

    @property
    def kind(self) -> str:
        """How its elements are packed."""
        return self.packing

    def span(self, start: int, count: int) -> Self:
        """Return `count` of its flattened elements, both whole blocks."""
        return dataclasses.replace(self, shape=(count,), offset=self.offset + start // self.block * self.block_bytes)

    def values(self, raw: Array) -> Array:
        """Unpack its bytes."""
        import gguf

        rows = np.asarray(raw).reshape(-1, self.shape[-1] // self.block * self.block_bytes)
        unpacked: Array = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.packing])
        return unpacked.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What the header of one file says."""

    metadata: dict[str, Any]
    shards: Shards
    where: str

    @property
    def config(self) -> ModelConfig:
        """The config that its metadata describe.

        Raises
        ------
        ConfigFileError
            If they describe no model of ours; the message names the key.
        """
        return _config(self.metadata, self.shards, self.where)


def gguf_of(folder: Folder) -> str | None:
    """Return the name of the GGUF file that a folder's weights are in, None where they are in other files.

    Safetensors go before a GGUF file beside them, which may be opened by its own path.

    Raises
    ------
    LayoutError
        If there are several.
    """
    names = folder.names()
    found = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    if len(found) > 1:
        raise LayoutError(f"{folder.path}: holds {len(found)} GGUF files: give the path of one: {listed(found, 4)}")
    return found[0]


@contextlib.contextmanager
def open_gguf(folder: Folder, name: str) -> Iterator[GgufFile]:
    """Open a GGUF file and read its header.

    Raises
    ------
    LayoutError
        If the package gguf is not installed.
    DamagedFileError, UnsupportedTypeError
        If it cannot be read, or holds tensors packed in another way.
    """
    where = f"{folder.path}/{name}"
    try:
        import gguf
    except ImportError:
        raise LayoutError(f"{where}: reading it needs pip install 'minimoe[gguf]'; {_TRUSTED}") from None
    with folder.open(name) as file:
        try:
            reader = gguf.GGUFReader(where)
            metadata = {key: _contents(key, field) for key, field in reader.fields.items()}
            listing = [(t.name, t.tensor_type, t.shape.tolist()[::-1], int(t.data_offset)) for t in reader.tensors]
            swapped = reader.byte_order != "I"
        except Exception as error:  # whatever the package comes upon
            reason = f"{type(error).__name__}: {error}"
            raise DamagedFileError(f"{where}: not a whole GGUF file ({shown(reason)}); {_TRUSTED}") from None
        if swapped:
            raise DamagedFileError(f"{where}: its numbers are big-endian")
        tensors = {key: _info(key, kind, tuple(shape), name, offset, where) for key, kind, shape, offset in listing}
        yield GgufFile(metadata, Shards({name: file}, tensors, _layout(tensors)), where)


def _contents(key: str, field: Any) -> Any:
    """A value of the metadata; the tokenizer's long lists are not unpacked."""
    if key.startswith("tokenizer.") and not key.endswith("_token_id"):
        return None
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _info(name: str, kind: Any, shape: tuple[int, ...], file: str, offset: int, where: str) -> TensorInfo:
    import gguf

    if kind.name in _PLAIN:
        return TensorInfo(name, _PLAIN[kind.name], shape, file, offset)
    if kind.name not in _PACKED:
        allowed = ", ".join((*_PLAIN, *_PACKED))
        raise UnsupportedTypeError(f"{where}: tensor {shown(name)} is {kind.name}; those that are read are {allowed}")
    return PackedInfo(name, np.dtype(np.float32), shape, file, offset, kind.name, *gguf.GGML_QUANT_SIZES[kind])


def _layout(tensors: dict[str, TensorInfo]) -> Layout:
    return GGUF_OLD if "blk.0.ffn_gate.0.weight" in tensors else GGUF


def _config(metadata: dict[str, Any], shards: Shards, where: str) -> ModelConfig:
    if (architecture := metadata.get("general.architecture")) != _ARCHITECTURE:
        raise ConfigFileError(f"{where}: general.architecture must be {_ARCHITECTURE}, not {shown(architecture)}")
    if metadata.get("split.count", 1) > 1:
        parts = metadata["split.count"]
        raise ConfigFileError(f"{where}: is one of {parts} parts; join them with llama-gguf-split --merge")
    given = {key[len("llama.") :]: value for key, value in metadata.items() if key.startswith("llama.")}
    if missing := [f"llama.{key}" for key in _REQUIRED if key not in given]:
        raise ConfigFileError(f"{where}: lacks {', '.join(missing)}")
    fields = {ours: _one(given[key], key, where) for key, ours in _FIELDS.items() if key in given}
    fields |= _left_open(fields, shards)
    for ours, key in (("bos_id", "tokenizer.ggml.bos_token_id"), ("eos_id", "tokenizer.ggml.eos_token_id")):
        if key in metadata:
            fields[ours] = metadata[key]
    try:
        config = ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigFileError(f"{where}: {shown(str(error))}") from None
    _refuse_others(given, config, where)
    return config


def _left_open(fields: dict[str, Any], shards: Shards) -> dict[str, Any]:
    """What a file may leave to others, as llama.cpp takes it."""
    table = shards.tensors.get(shards.layout.name_of("tok_embeddings"))
    width, heads = fields["hidden_size"], fields["num_heads"]
    sizes = isinstance(width, int) and isinstance(heads, int) and heads > 0
    dense = not fields.get("num_experts")  # 0, where there are none
    return {
        "vocab_size": fields.get("vocab_size", table.shape[0] if table is not None and table.shape else 0),
        "num_kv_heads": fields.get("num_kv_heads", heads),
        "head_dim": fields.get("head_dim", width // heads if sizes else 2),
        "rope_theta": fields.get("rope_theta", 1e4),
        "tie_embeddings": shards.layout.name_of("output") not in shards.tensors,
        **({"dense": True, "num_experts": 1, "num_experts_per_token": 1} if dense else {}),
    }


def _one(value: Any, key: str, where: str) -> Any:
    """A value that may be given for each layer, where it is the same in all."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConfigFileError(f"{where}: llama.{key} differs between layers: {shown(value)}")
        return value[0]
    return value


def _refuse_others(given: dict[str, Any], config: ModelConfig, where: str) -> None:
    neutral = _NEUTRAL | dict.fromkeys(_HEAD_WIDTHS, (config.head_dim,))
    wrong = [f"llama.{key} = {shown(value)}" for key, value in given.items()
             if key not in _FIELDS and value not in neutral.get(key, ())]  # fmt: skip
    if wrong:
        raise ConfigFileError(f"{where}: asks for mathematics that minimoe does not have: {listed(wrong)}")
