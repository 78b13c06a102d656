"""How much work a forward pass is: operations and bytes by op, from the schedule, with a cache and without.

The least time it can take is that of reading every weight once and every cached key and value once, or that of its
operations, whichever is longer (the roofline: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimoe import schedule
from minimoe.arrays import to_host
from minimoe.config import ModelConfig
from minimoe.layers import Routed
from minimoe.schedule import Cost, Step

TRAINING = 3  # a backward is two products for each one of the forward


@dataclass(frozen=True)
class Work:
    """What a run has to do at least.

    Attributes
    ----------
    flops : floating-point operations, 2 per multiply-add
    weights : bytes of the weights it reads: of the experts, those that were chosen; of the embeddings, a row per token
    cache : bytes of the keys and values that earlier calls left
    """

    flops: float
    weights: float
    cache: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes that must come from memory; what an op hands to the next can stay in a processor's cache."""
        return self.weights + self.cache

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.weights + other.weights, self.cache + other.cache)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.weights * factor, self.cache * factor)

    def bound(self, bandwidth: float, peak: float) -> tuple[float, str]:
        """Return the least seconds it can take, and what sets them: "memory" or "arithmetic".

        >>> Work(flops=2e9, weights=4e9).bound(bandwidth=40e9, peak=200e9)
        (0.1, 'memory')
        """
        reading, computing = self.bytes / bandwidth, self.flops / peak
        return (reading, "memory") if reading >= computing else (computing, "arithmetic")


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes
    ----------
    batch, tokens : B sequences of T new tokens
    held : tokens of each sequence that are in the cache before
    chosen : experts that were chosen at all, layer by layer
    stored : bytes of a weight, and of a cached number
    int8 : whether the matrices of linear maps and experts are stored in int8 instead
    last_only : whether logits are made for the last position of each sequence only
    """

    batch: int
    tokens: int
    held: int
    chosen: Sequence[int]
    stored: int
    last_only: bool = True
    int8: bool = False

    def cost(self, config: ModelConfig, step: Step) -> Cost:
        """Count one op call; attention's bytes include the cache it reads."""
        B, T = self.batch, self.tokens
        if self.last_only and step.layer is None and step.room in ("rmsnorm", "linear"):
            T = 1
        experts = 1 if step.layer is None else self.chosen[step.layer]
        count = schedule.cost(
            config, step, B, T, visible=self.visible(config), experts=experts, stored=self.stored,
            computed=max(self.stored, 4), int8=self.int8,
        )  # fmt: skip
        return count + Cost(0, self.cached(config)) if step.room == "attention" else count

    def visible(self, config: ModelConfig) -> int:
        """Pairs of a query and a key it sees."""
        seen = self.held + np.arange(1, self.tokens + 1)
        return self.batch * int(np.minimum(seen, config.sliding_window or seen[-1]).sum())

    def cached(self, config: ModelConfig) -> int:
        """Bytes of the cached keys and values that one layer reads: those that its first query sees."""
        keys = self.held if config.sliding_window is None else min(self.held, config.sliding_window - 1)
        return self.batch * keys * 2 * config.num_kv_heads * config.head_dim * self.stored

    def work(self, config: ModelConfig) -> Work:
        """Count the whole pass."""
        steps = schedule.schedule(config)
        flops = sum(self.cost(config, step).flops for step in steps)
        return Work(flops, sum(self._weights(config, step) for step in steps), config.num_layers * self.cached(config))

    def _weights(self, config: ModelConfig, step: Step) -> int:
        """Bytes of the weights of one call: what vanishes if weights take no room."""
        experts = 1 if step.layer is None else self.chosen[step.layer]
        with_them, without = (
            schedule.cost(config, step, self.batch, self.tokens, visible=0, experts=experts, stored=stored, int8=int8)
            for stored, int8 in ((self.stored, self.int8), (0, False))
        )
        return with_them.bytes - without.bytes


def experts_chosen(routed: Sequence[Routed]) -> list[int]:
    """How many different experts one call chose, layer by layer."""
    ids = [to_host(one.ids) for one in routed]
    return [len(np.unique(layer[layer >= 0])) for layer in ids]
