"""The letters, and the small types that several floors share.

Every signature, comment and docstring of minimoe uses these letters:

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
M       routed (token, slot) pairs, N * k without padding
V       vocabulary
L       layers
W       attention window in keys, the query itself included; None = unbounded
R       slots of a rolling key/value cache
c       pairs that RoPE rotates, C / 2
I, O    inputs and outputs of a linear map
======  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

# A NumPy or a CuPy array. Both follow the same interface; jaxtyping checks shape and dtype on either.
Array: TypeAlias = Any

# A number that an op adds up: a float on the host; on a device an array of no dimensions, and reading it (`float`, or
# `arrays.numbers` for several) waits until the device has come so far.
Scalar: TypeAlias = float | Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts every token went to, in every layer.

    Attributes
    ----------
    ids : (L, N, k) int
        Chosen experts, first choice in slot 0; -1 where the token was not routed (padding).
    weights : (L, N, k) float or None
        Gate weights; a row sums to 1 (to less where the model does not renormalise them), and is 0 where ids are -1.
        None when only the choice is given (to force it).
    logits : (L, N, E) float or None
        Router logits, in float32 or better.
    """

    ids: Array
    weights: Array | None = None
    logits: Array | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "weights", "logits"):
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, np.asarray(getattr(self, name)))
        if self.ids.ndim != 3:
            raise ValueError(f"routing ids must have shape (L, N, k), not {self.ids.shape}")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ValueError(f"routing weights {self.weights.shape} must have the shape of ids, {self.ids.shape}")
        if self.logits is not None and (self.logits.ndim != 3 or self.logits.shape[:2] != self.ids.shape[:2]):
            raise ValueError(f"routing logits {self.logits.shape} must be (L, N, E) beside ids of {self.ids.shape}")

    @property
    def margins(self) -> Array:
        """(L, N) distance in logits between the last expert chosen and the best one that was not.

        For a free choice: neither forced nor with experts disabled. Infinite where k = E, NaN where ids are -1.
        """
        if self.logits is None:
            raise ValueError("margins need the router logits, which this Routing does not carry")
        k, E = self.ids.shape[-1], self.logits.shape[-1]
        ordered = -np.sort(-self.logits, axis=-1)
        margins = np.full(self.ids.shape[:2], np.inf) if k == E else ordered[..., k - 1] - ordered[..., k]
        return np.where(self.ids[..., 0] >= 0, margins, np.nan)

    def table(self) -> Array:
        """One row per decision, (layer, token, slot, expert, weight, logit, margin), as a structured array.

        Tokens that were not routed have no rows. Needs weights and logits.
        """
        if self.weights is None or self.logits is None:
            raise ValueError("a table needs gate weights and router logits, which this Routing does not carry both")
        layer, token, slot = np.nonzero(self.ids >= 0)
        expert = self.ids[layer, token, slot]
        columns = {
            "layer": layer, "token": token, "slot": slot, "expert": expert, "weight": self.weights[layer, token, slot],
            "margin": self.margins[layer, token],
        }  # fmt: skip
        columns["logit"] = self.logits[layer, token, expert]
        names = ("layer", "token", "slot", "expert", "weight", "logit", "margin")
        rows = np.empty(len(layer), [(name, np.int64 if i < 4 else np.float64) for i, name in enumerate(names)])
        for name in names:
            rows[name] = columns[name]
        return rows
