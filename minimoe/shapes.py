"""The letters, and the small types that several floors share.

Every signature, comment and docstring of minimoe uses these letters and no others:

======  =====================================================================
letter  meaning
======  =====================================================================
B       batch: independent sequences
T       new tokens per sequence (the queries of this call)
S       keys per sequence: what is cached and what is new
D       model width
H       query heads
K       key/value heads
G       query heads per key/value head, H / K
C       width of one head
F       hidden width of one expert
E       experts
k       experts chosen per token
N       tokens of this call, B * T
V       vocabulary
L       layers
W       attention window in keys, the query itself included; None = unbounded
R       slots of a rolling key/value cache
======  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

# A NumPy or a CuPy array. Both follow the same interface; jaxtyping checks shape and dtype on either.
Array: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts every token went to, in every layer.

    Attributes
    ----------
    ids : (L, N, k) int
        Chosen experts, first choice in slot 0; -1 where the token was not routed (padding).
    weights : (L, N, k) float or None
        Gate weights; a row sums to 1. None when only the choice is given (to force it).
    logits : (L, N, E) float or None
        Router logits, in float32 or better.
    """

    ids: Array
    weights: Array | None = None
    logits: Array | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids) if isinstance(self.ids, list | tuple) else self.ids
        object.__setattr__(self, "ids", ids)
        if ids.ndim != 3:
            raise ValueError(f"routing ids must have shape (L, N, k), not {ids.shape}")
        if self.weights is not None and self.weights.shape != ids.shape:
            raise ValueError(f"routing weights {self.weights.shape} must have the shape of ids, {ids.shape}")

    @property
    def margins(self) -> Array:
        """(L, N) distance in logits between the last expert chosen and the best one that was not."""
        if self.logits is None:
            raise ValueError("margins need the router logits, which this Routing does not carry")
        k, E = self.ids.shape[-1], self.logits.shape[-1]
        if k == E:
            return np.full(self.ids.shape[:2], np.inf)
        ordered = -np.sort(-self.logits, axis=-1)
        return ordered[..., k - 1] - ordered[..., k]
