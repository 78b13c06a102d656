"""A small checkpoint with random weights that reads real text: what tests of commands run on."""

from pathlib import Path

import numpy as np

from minimoe import checkpoint, params
from minimoe.arrays import BFLOAT16
from minimoe.config import ModelConfig

TOKENIZER = Path(__file__).parents[1] / "minimoe" / "models" / "tiny" / "tokenizer.model"

SPARSE = ModelConfig(
    vocab_size=1024, hidden_size=16, intermediate_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
    max_length=512,
)  # fmt: skip
DENSE = SPARSE.replace(num_experts=1, num_experts_per_token=1, dense=True)


def save(folder, config=SPARSE, *, dtype=BFLOAT16, tokenizer=True, change=None):
    """Write a checkpoint; `change` maps the tree of weights before."""
    tree = params.random(config, 0, np.float32)
    tree = params.map_leaves(tree, lambda w: w.astype(dtype))
    if change is not None:
        change(tree)
    checkpoint.save(folder, config, tree, tokenizer_file=TOKENIZER if tokenizer else None)
    return folder
