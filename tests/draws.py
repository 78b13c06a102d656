"""Random models and batches, from seeds: what the tests of whole models run on."""

import itertools

import numpy as np

from minimoe import mixtral
from minimoe.config import ModelConfig, preset
from minimoe.params import from_named, map_leaves, random, stack_experts

SIDES = ("none", "left", "right", "both")


def draw_config(rng, **fixed):
    """A small model of random shape: C is seldom D / H, windows are short, the number of experts is 1 to 16."""
    E = int(rng.choice([1, 2, 3, 4, 5, 8, 16]))
    K = int(rng.integers(1, 4))
    drawn = {
        "vocab_size": int(rng.integers(5, 40)),
        "hidden_size": int(rng.integers(3, 25)),
        "intermediate_size": int(rng.integers(1, 25)),
        "num_layers": int(rng.integers(1, 4)),
        "num_heads": K * int(rng.integers(1, 4)),
        "num_kv_heads": K,
        "head_dim": 2 * int(rng.integers(1, 7)),
        "num_experts": E,
        "num_experts_per_token": int(rng.integers(1, E + 1)),
        "norm_eps": float(10 ** rng.uniform(-8, -1)),
        "rope_theta": float(10 ** rng.uniform(1, 6)),
        "sliding_window": int(rng.integers(1, 12)) if rng.random() < 0.5 else None,
        "tie_embeddings": bool(rng.random() < 0.3),
        "balance_coefficient": float(rng.uniform(0.01, 1)),
        "balance_form": "concatenated",
        "bos_id": None,
        "eos_id": None,
    }
    return ModelConfig(**(drawn | fixed))


def draw_dense_config(rng, **fixed):
    """A model without a gate."""
    return draw_config(rng, num_experts=1, num_experts_per_token=1, dense=True, **fixed)


def draw_any_config(rng, **fixed):
    """`draw_config`, half the time with some of what Grok-1 has and Mixtral has not."""
    config, rng = draw_config(rng, **fixed), rng.spawn(1)[0]  # a stream of its own: the rest is drawn as without it
    if rng.random() < 0.5:
        return config
    drawn = {
        "activation": "gelu_tanh",
        "renormalise": False,
        "attention_scale": float(rng.uniform(0.1, 1)),
        "attention_cap": float(10 ** rng.uniform(-0.5, 1.5)),
        "embedding_multiplier": float(rng.uniform(0.5, 8)),
        "output_multiplier": float(rng.uniform(0.3, 2)),
        "post_norms": True,
    }
    return config.replace(**{name: value for name, value in drawn.items() if rng.random() < 0.7})


def scaled(name):
    """The preset with its proportions and constants, a few numbers wide; its window, where it has one, fills up."""
    config = preset(name)
    return config.replace(
        vocab_size=23, hidden_size=12, intermediate_size=10, num_layers=2,
        num_heads=config.num_heads // config.num_kv_heads * 2, num_kv_heads=2, head_dim=6,
        sliding_window=None if config.sliding_window is None else 5,
    )  # fmt: skip


def draw_params(config, rng, dtype=np.float64, stacked=True):
    """Random weights with norms unlike one, and with digits that float32 cannot hold, so that a lost digit shows."""

    def shake(w):
        return (w * rng.uniform(0.5, 1.5, w.shape)).astype(dtype)

    params = map_leaves(random(config, seed=int(rng.integers(1 << 30)), dtype=np.float64), shake)
    return stack_experts(params) if stacked else params


def draw_tokens(rng, config, B=None, T=None, side="none"):
    """Tokens (B, T) and the mask of their padding, None for the side `none`; padding holds ids that are no tokens."""
    B = int(rng.integers(1, 4)) if B is None else B
    T = int(rng.integers(1, 20)) if T is None else T
    tokens = rng.integers(0, config.vocab_size, (B, T))
    if side == "none":
        return tokens, None
    length = rng.integers(1, T + 1, B)
    start = {"left": T - length, "right": 0 * length, "both": (rng.random(B) * (T - length + 1)).astype(int)}[side]
    t = np.arange(T)
    mask = (t >= start[:, None]) & (t < (start + length)[:, None])
    return np.where(mask, tokens, rng.choice([-1, config.vocab_size + 7], (B, T))), mask


def regroup(config, leaves):
    """The tree of parameters from `leaves(params)`: {name: array}, with the experts of a layer in one array."""
    arrays = {}
    for name, leaf in leaves.items():
        before, experts, weight = name.partition(".experts.")
        arrays |= {f"{before}{experts}{e}.{weight}": w for e, w in enumerate(leaf)} if experts else {name: leaf}
    return stack_experts(from_named(config, arrays))


def forward(ops, config, params, tokens, *, mask=None, positions=None, cache=None, last_only=False, **choice):
    """Logits and routing of one call, from what a user gives; `choice` is routing or disabled_experts."""
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask, positions, cache)
    choose = mixtral.choices(
        ops, config, inputs.tokens.size, choice.pop("routing", None), choice.pop("disabled_experts", ())
    )
    assert not choice
    logits, routed = mixtral.forward(ops, config, params, inputs, cache=cache, last_only=last_only, choose=choose)
    return logits, mixtral.collect_routing(ops, routed)


def split(rng, T, most=6):
    """Cut range(T) into slices of random lengths, single tokens among them."""
    cuts = [0]
    while cuts[-1] < T:
        cuts.append(min(T, cuts[-1] + int(rng.choice([1, 1, rng.integers(1, most + 1)]))))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]
