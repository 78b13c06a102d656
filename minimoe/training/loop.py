"""The training loop: batches, schedule, clipping, AdamW; every step is a function of the seed and its number.

lr(step) = peak · step / warmup                                    step <= warmup
         = floor + (peak - floor) · (1 + cos(π · progress)) / 2     after, progress from 0 to 1 at the last step

Batches are drawn from a generator seeded with (seed, step), so that a run which is stopped and resumed sees the same
batches, and ends with the same bits, as one that was not. Sources: Loshchilov and Hutter, SGDR, arXiv 1608.03983,
equation 5 (one cosine, no restarts); Pascanu et al., arXiv 1211.5063 (clipping by the global norm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from minimoe import mixtral
from minimoe.arrays import numbers
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.params import Params, leaves, map_leaves, random, stack_experts
from minimoe.placement import explained, placed
from minimoe.shapes import Array, Scalar


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run, besides the model's config and the corpus.

    Attributes
    ----------
    steps, batch_size, sequence_length : int
        Tokens seen are their product.
    peak_lr, final_lr_share, warmup : float, float, int
        The cosine ends at ``final_lr_share · peak_lr``.
    clip : float
        Largest global norm of the gradient.
    weight_decay : float
        On matrices; norms are not decayed.
    beta1, beta2, eps : float
        Of AdamW.
    seed : int
        Of the weights, the batches and router jitter.
    mixture : dict or None
        Share of sequences of every domain, by name; None draws every domain equally often.
    """

    steps: int
    batch_size: int = 16
    sequence_length: int = 256
    peak_lr: float = 3e-3
    final_lr_share: float = 0.05
    warmup: int = 200
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    mixture: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("peak_lr", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("final_lr_share", "weight_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2 (a token and its target), not {self.sequence_length}")

    def learning_rate(self, step: int) -> float:
        """Return the rate of step number `step`, the first being 1."""
        if step <= self.warmup:
            return self.peak_lr * step / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        floor = self.final_lr_share * self.peak_lr
        return floor + (self.peak_lr - floor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Metrics:
    """What one step reports.

    Attributes
    ----------
    loss, balance : cross-entropy in nats per token, and the balance loss
    gradient_norm : before clipping
    least_share : smallest share of assignments of any expert in any layer, times E (1 = exactly even)
    """

    step: int
    loss: float
    balance: float
    lr: float
    gradient_norm: float
    least_share: float


@dataclass(eq=False)
class TrainState:
    """What a checkpoint of a run holds: parameters, AdamW's two moments, and the number of steps taken."""

    params: Params
    m: Params
    v: Params
    step: int = 0


def new_state(ops: Backend, config: ModelConfig, train: TrainConfig) -> TrainState:
    """Return fresh float32 parameters and zero moments, where the backend computes."""
    params = placed(stack_experts(random(config, train.seed)), ops)
    with explained(ops):
        return TrainState(params, map_leaves(params, ops.xp.zeros_like), map_leaves(params, ops.xp.zeros_like))


def batch(streams: Mapping[str, Int[Array, " n"]], train: TrainConfig, step: int) -> Int[Array, "B T"]:
    """Draw the batch of one step: each row a random window of a random domain."""
    rng = np.random.default_rng([train.seed, step])
    names = sorted(streams)
    if train.mixture is not None and sorted(train.mixture) != names:
        raise ValueError(f"mixture must name the domains {', '.join(names)}, not {', '.join(train.mixture)}")
    shares = np.array([1.0 if train.mixture is None else train.mixture[name] for name in names])
    T = train.sequence_length
    rows = []
    for domain in rng.choice(len(names), train.batch_size, p=shares / shares.sum()):
        stream = streams[names[domain]]
        if stream.size < T:
            raise ValueError(f"domain {names[domain]} has {stream.size} tokens, fewer than sequence_length = {T}")
        start = rng.integers(stream.size - T + 1)
        rows.append(stream[start : start + T])
    return np.stack(rows).astype(np.int64)


def train_step(
    ops: Backend, config: ModelConfig, train: TrainConfig, state: TrainState, tokens: Int[Array, "B T"]
) -> Metrics:
    """Take one step, changing `state` in place."""
    step = state.step + 1
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    jitter = np.random.default_rng([train.seed, step, 1])
    with explained(ops):
        losses, grads, routed = mixtral.loss_and_grads(ops, config, state.params, inputs, jitter=jitter)
        flat = [dict(leaves(tree)) for tree in (state.params, grads, state.m, state.v)]
        squares = [ops.adamw.squared_norm(g) for g in flat[1].values()]
        # On a device everything above is under way; here, once in a step, the host waits for it.
        total, cross_entropy, balance, least, *squares = numbers(
            losses.total, losses.cross_entropy, losses.balance, least_share(ops, config, routed), *squares
        )
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss of step {step} is {total}: lower peak_lr, or lengthen warmup")
    norm = math.sqrt(sum(squares))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient of step {step} has norm {norm}: lower peak_lr, or lengthen warmup")
    lr = train.learning_rate(step)
    for name, w in flat[0].items():
        decay = train.weight_decay if w.ndim > 1 else 0.0
        ops.adamw.forward(
            w, flat[1][name], flat[2][name], flat[3][name],
            step=step, lr=lr, beta1=train.beta1, beta2=train.beta2, eps=train.eps,
            weight_decay=decay, scale=min(1.0, train.clip / max(norm, 1e-12)),
        )  # fmt: skip
    state.step = step
    return Metrics(step, cross_entropy, balance, lr, norm, least)


def least_share(ops: Backend, config: ModelConfig, routed: Any) -> Scalar:
    """Smallest share of assignments that any expert of any layer gets, times E; 1.0 in a dense model."""
    routing = mixtral.collect_routing(ops, routed)
    if routing is None:
        return 1.0
    xp, E = ops.xp, config.num_experts
    counts = (routing.ids[..., None] == xp.arange(E)).sum(axis=(1, 2))  # (L, N, k, E) -> (L, E)
    return (counts.min(axis=1) / xp.maximum(counts.sum(axis=1), 1)).min() * E
