"""The small models that block, model and training cases compute with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16
from minimoe.config import ModelConfig
from minimoe.golden.cases.draw import ALL, EXACT, GROK, OURS, Draw, coded
from minimoe.params import Params, from_named, shapes
from minimoe.shapes import Array


@dataclass(frozen=True)
class ModelSpec:
    """One model: its config, and how its weights differ from the others'.

    Attributes
    ----------
    grid : whether its weights have eight significant bits
    dtype : in which its checkpoint is stored
    gate : how steeply its gates tell experts apart
    change : changes the weights after they have been drawn
    """

    why: str
    config: ModelConfig
    grid: bool = True
    dtype: Any = np.float32
    gate: float = 0.75
    change: Callable[[dict[str, Array]], None] | None = None


def tags(model: str, *more: str) -> tuple[str, ...]:
    """Return the tags of a case of this model."""
    return (*((GROK,) if MODELS[model].config.post_norms else ()), *more)


def profiles(model: str) -> tuple[str, ...]:
    """Return the numeric profiles in which a forward pass of this model can be compared."""
    spec = MODELS[model]
    return EXACT if not spec.grid else OURS if spec.config.post_norms else ALL


def weights(name: str, spec: ModelSpec) -> Params:
    """Draw the weights of a model: norms unlike one, every matrix unlike its transposition, routing without near-ties.

    `coded` says how embeddings rank the experts. Gates read mostly these elements, and undo the norm's weight there; wo
    and w2 write little to them.
    """
    family = name.partition("-")[0]  # models that differ only in their balance loss have the same weights
    d, c = Draw(f"models/{family}", spec.grid), spec.config
    E, k = c.num_experts, c.num_experts_per_token
    arrays: dict[str, Array] = {}
    for tensor, shape in shapes(c).items():
        if len(shape) == 1:
            arrays[tensor] = d.uniform(*shape, low=0.5, high=1.5)
        elif tensor == "tok_embeddings":
            arrays[tensor] = d.normal(*shape) if c.dense else coded(d, shape[0], shape[1], E, k)
        elif tensor.endswith(".gate"):
            gate = d.normal(*shape, scale=spec.gate / 64)
            norm = arrays[tensor.replace("feed_forward.gate", "ffn_norm")]
            read = (np.arange(E) + int(tensor.split(".")[1])) % E  # another element in every layer: another choice
            gate[np.arange(E), read] = spec.gate / norm[read]
            arrays[tensor] = d.round(gate)
        else:
            w = d.normal(*shape, scale=shape[1] ** -0.5)
            if tensor.endswith((".wo", ".w2")) and not c.dense:
                w[:E] /= 32
            elif tensor == "output":  # two of three tokens are rare, so that the best one is often well ahead
                w *= 2.0 ** -(np.arange(len(w)) % 3)[:, None]
            arrays[tensor] = d.round(w)
    if spec.change is not None:
        spec.change(arrays)
    return from_named(c, {tensor: w.astype(spec.dtype) for tensor, w in arrays.items()})


def _tie_second_layer(arrays: dict[str, Array]) -> None:
    arrays["layers.1.feed_forward.gate"][:] = 0


_BASE = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=10, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    num_experts=4, num_experts_per_token=2, rope_theta=1e6, norm_eps=1e-5, max_length=64, bos_id=None, eos_id=None,
)  # fmt: skip
_SMALL = _BASE.replace(
    vocab_size=12, hidden_size=8, intermediate_size=6, num_heads=2, num_kv_heads=1, head_dim=6, num_experts=3,
    balance_coefficient=0.5,
)  # fmt: skip
_GROK = {
    "tie_embeddings": True, "rope_theta": 1e4, "activation": "gelu_tanh", "renormalise": False,
    "attention_scale": 1.25, "attention_cap": 1.5, "embedding_multiplier": 2.5, "output_multiplier": 0.625,
    "post_norms": True,
}  # fmt: skip
MODELS: dict[str, ModelSpec] = {
    "base": ModelSpec(
        "Mixtral's shape in small: 4 experts of which 2 serve a token, grouped heads, C = 6 unlike D / H = 4, untied "
        "embeddings, theta 1e6, no window.", _BASE,
    ),
    "window": ModelSpec(
        "A sliding window of 5 keys, one key/value head, one expert per token, theta 1e4.",
        _BASE.replace(hidden_size=12, num_heads=3, num_kv_heads=1, head_dim=8, num_experts=3,
                      num_experts_per_token=1, rope_theta=1e4, sliding_window=5, vocab_size=24),
    ),
    "square": ModelSpec(
        "D = H·C = K·C = F = V: every matrix but the gates is square, so a missing transposition passes all shapes.",
        _BASE.replace(intermediate_size=16, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=16),
    ),
    "all-experts": ModelSpec(
        "Every expert serves every token (k = E = 3), tied embeddings, and an eps of 0.1 that must stand inside the "
        "root.",
        _BASE.replace(num_experts=3, num_experts_per_token=3, num_kv_heads=4, tie_embeddings=True, norm_eps=0.1,
                      vocab_size=20),
    ),
    "dense": ModelSpec(
        "No gate: Mistral's model, with one expert, a window of 4 and theta 1e4.",
        _BASE.replace(dense=True, num_experts=1, num_experts_per_token=1, hidden_size=12, rope_theta=1e4,
                      sliding_window=4, vocab_size=24),
    ),
    "bfloat16": ModelSpec(
        "Stored in bfloat16, as released checkpoints are: reading it needs no more than shifting 16 bits.",
        _BASE.replace(vocab_size=24), dtype=BFLOAT16,
    ),
    "digits": ModelSpec(
        "Weights that use all of float32's digits: where an implementation quietly holds them in 16 bits, its float32 "
        "results are off by thousands of bounds.",
        _BASE.replace(num_layers=3, num_experts=5, vocab_size=24), grid=False,
    ),
    "ties": ModelSpec(
        "The second layer's gate is zero: all its logits are exactly 0 in every arithmetic, and ties go to the lower "
        "ids.", _BASE.replace(vocab_size=24), change=_tie_second_layer,
    ),
    "gap": ModelSpec(
        "One layer whose router logits lie up to 200 apart.",
        _BASE.replace(num_layers=1, num_experts=6, vocab_size=24), gate=64.0,
    ),
    "jitter": ModelSpec(
        "Its config asks for router jitter. Jitter is noise for training, and must be off here.",
        _BASE.replace(router_jitter=0.25, vocab_size=24),
    ),
    "stops": ModelSpec(
        "Has an end-of-text token: a sequence that has produced it repeats it while the others go on.",
        _BASE.replace(vocab_size=16, eos_id=12),
    ),
    "train-concatenated": ModelSpec(
        "For training steps; the balance loss is Hugging Face's, over all layers' tokens at once.",
        _SMALL.replace(balance_form="concatenated"),
    ),
    "train-per-layer": ModelSpec(
        "For training steps; the balance loss is the mean of one per layer.", _SMALL.replace(balance_form="per_layer"),
    ),
    "train-switch": ModelSpec(
        "For training steps; the balance loss counts first choices only.", _SMALL.replace(balance_form="switch"),
    ),
    "train-tied": ModelSpec(
        "For training steps; the embedding table is the output matrix too, and has both gradients.",
        _SMALL.replace(tie_embeddings=True, num_experts_per_token=1),
    ),
    "train-dense": ModelSpec(
        "For training steps; no gate and no balance loss.",
        _SMALL.replace(dense=True, num_experts=1, num_experts_per_token=1, sliding_window=3),
    ),
    "grok": ModelSpec(
        "Grok-1's shape in small: four norms a block, scores times 1.25 and capped at 1.5, GELU in its tanh form, gate "
        "weights that are not renormalised, embeddings times 2.5, logits times 0.625, tied embeddings.",
        _BASE.replace(vocab_size=24, **_GROK),
    ),
    "train-grok": ModelSpec(
        "For training steps; all that Grok-1 does otherwise, with a balance loss; embeddings times 1.5, logits times "
        "0.75, so that a step without either is well conditioned, too, and is recognised.",
        _SMALL.replace(**_GROK | {"embedding_multiplier": 1.5, "output_multiplier": 0.75}),
    ),
}  # fmt: skip
