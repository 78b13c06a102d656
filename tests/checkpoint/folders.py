"""Small models and folders that the tests of checkpoints share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minimoe.config import ModelConfig
from minimoe.params import Params, named, random

MOE = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    num_experts=3, num_experts_per_token=2, max_length=64, balance_coefficient=0.01, balance_form="per_layer",
)  # fmt: skip
DENSE = MOE.replace(num_experts=1, num_experts_per_token=1, dense=True, sliding_window=7)
GROK = MOE.replace(
    tie_embeddings=True, activation="gelu_tanh", renormalise=False, attention_scale=0.3, attention_cap=30.0,
    embedding_multiplier=2.5, output_multiplier=0.75, post_norms=True, rope_theta=1e4,
)  # fmt: skip


def model(config: ModelConfig = MOE, dtype: object = np.float32, seed: int = 0) -> Params:
    """Random weights, norms included, so that no tensor equals another."""
    params = random(config, seed, dtype)
    rng = np.random.default_rng(seed)
    for name, array in named(params):
        if name.endswith("norm"):
            array[...] = rng.uniform(0.5, 1.5, array.shape).astype(dtype)
    return params


def same_bits(a: Params, b: Params) -> bool:
    left, right = dict(named(a)), dict(named(b))
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and np.ascontiguousarray(left[name]).tobytes() == np.ascontiguousarray(right[name]).tobytes()
        for name in left
    )


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; the value `...` removes one."""
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def read_parts(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file, by a few lines of their own."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
