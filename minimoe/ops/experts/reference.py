"""Expert feed-forward networks in array code: one pass of a Python loop per expert that has tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float, Int

from minimoe.arrays import matmul, to_host, widen, xp_of
from minimoe.ops.experts import Saved, check_activation
from minimoe.quantized import Int8
from minimoe.shapes import Array

_ROOT = 2 * math.sqrt(2 / math.pi)


def dispatch(ids: Int[Array, "N k"], num_experts: int) -> tuple[Int[Array, " M"], Int[Array, " E+1"]]:
    """Sort the pairs n·k + slot by expert, leaving out those that are not routed.

    Returns
    -------
    pairs : (M,) in the order of experts, and within an expert of pairs
    offsets : (E + 1,) on the host: segment e is pairs[offsets[e]:offsets[e + 1]]

    Examples
    --------
    >>> import numpy as np
    >>> pairs, offsets = dispatch(np.array([[2, 0], [0, 1], [-1, -1]]), 4)
    >>> pairs.tolist(), offsets.tolist()
    ([1, 2, 3, 0], [0, 2, 3, 4, 4])
    """
    xp = xp_of(ids)
    flat = ids.reshape(-1)  # (N, k) -> (N k,)
    order = xp.argsort(flat, kind="stable")  # -1 sorts first
    counts = xp.bincount(flat[flat >= 0], minlength=num_experts)
    offsets = xp.concatenate([xp.zeros(1, counts.dtype), xp.cumsum(counts)])
    return order[flat.size - int(offsets[-1]) :], to_host(offsets)


def forward(
    x: Float[Array, "N D"],
    w1: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    w2: Sequence[Float[Array, "D F"] | Int[Int8, "D F"]],
    w3: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    keep: bool = False,
    activation: str = "silu",
) -> tuple[Float[Array, "N D"], Saved | None]:
    check_activation(activation)
    xp = xp_of(x)
    (N, D), (_, k), F = x.shape, ids.shape, w1[0].shape[0]
    pairs, offsets = dispatch(ids, len(w1))
    gate_in = xp.empty((pairs.size, F), x.dtype)
    up = xp.empty((pairs.size, F), x.dtype)
    slots = xp.zeros((N * k, D), x.dtype)
    for e, rows in _segments(offsets):
        xe = x[pairs[rows] // k]  # (N, D) -> (M_e, D)
        gate_in[rows] = matmul(xe, w1[e].T)  # (M_e, F)
        up[rows] = matmul(xe, w3[e].T)
        hidden = act(gate_in[rows], activation) * up[rows]
        slots[pairs[rows]] = matmul(hidden, w2[e].T)  # (M_e, F) -> (M_e, D)
    slots = slots.reshape(N, k, D)
    out = _sum_slots(weights[:, :, None] * slots)
    return out, Saved(pairs, offsets, gate_in, up, slots) if keep else None


def backward(
    dout: Float[Array, "N D"],
    x: Float[Array, "N D"],
    w1: Sequence[Float[Array, "F D"]],
    w2: Sequence[Float[Array, "D F"]],
    w3: Sequence[Float[Array, "F D"]],
    weights: Float[Array, "N k"],
    saved: Saved,
    activation: str = "silu",
) -> tuple[
    Float[Array, "N D"], Float[Array, "E F D"], Float[Array, "E D F"], Float[Array, "E F D"], Float[Array, "N k"]
]:
    xp = xp_of(x)
    (N, D), k, E, F = x.shape, weights.shape[1], len(w1), w1[0].shape[0]
    dw1, dw3 = xp.zeros((E, F, D), x.dtype), xp.zeros((E, F, D), x.dtype)
    dw2 = xp.zeros((E, D, F), x.dtype)
    # forward: out = Σ_slot weights · slots
    dweights = (saved.slots * dout[:, None]).sum(axis=-1)  # (N, k)
    dslots = (weights[:, :, None] * dout[:, None]).reshape(N * k, D)
    dx_slots = xp.zeros((N * k, D), x.dtype)
    for e, rows in _segments(saved.offsets):
        pairs = saved.pairs[rows]
        xe, dy = x[pairs // k], dslots[pairs]  # (M_e, D)
        gate_in, up = saved.gate_in[rows], saved.up[rows]  # (M_e, F)
        opened = act(gate_in, activation)
        # forward: y = hidden · w2ᵀ, hidden = act(gate_in) ⊙ up
        dw2[e] = dy.T @ (opened * up)
        dhidden = dy @ widen(w2[e])  # (M_e, F)
        dup = dhidden * opened
        dgate_in = dhidden * up * act_slope(gate_in, activation)
        # forward: gate_in = xe · w1ᵀ, up = xe · w3ᵀ
        dw1[e], dw3[e] = dgate_in.T @ xe, dup.T @ xe
        dx_slots[pairs] = dgate_in @ widen(w1[e]) + dup @ widen(w3[e])
    # forward: xe = x[pairs // k]
    return _sum_slots(dx_slots.reshape(N, k, D)), dw1, dw2, dw3, dweights


def explain(
    x: Float[Array, "N D"],
    w1: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    w2: Sequence[Float[Array, "D F"] | Int[Int8, "D F"]],
    w3: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    activation: str = "silu",
) -> dict[str, Array]:
    """Return the inner arrays by name: `hidden` (N, k, F) and `slots` (N, k, D), zeros where not routed."""
    xp = xp_of(x)
    N, k = ids.shape
    _, saved = forward(x, w1, w2, w3, ids, weights, True, activation)
    assert saved is not None
    hidden = xp.zeros((N * k, saved.up.shape[1]), x.dtype)
    hidden[saved.pairs] = act(saved.gate_in, activation) * saved.up
    return {"hidden": hidden.reshape(N, k, -1), "slots": saved.slots}


def act(z: Array, activation: str) -> Array:
    """The activation; exp(-|z|) never overflows."""
    return silu(z) if activation == "silu" else gelu_tanh(z)


def act_slope(z: Array, activation: str) -> Array:
    """d act / dz."""
    return silu_slope(z) if activation == "silu" else gelu_tanh_slope(z)


def silu(z: Array) -> Array:
    """z · sigmoid(z)."""
    return z * sigmoid(z)


def silu_slope(z: Array) -> Array:
    """d silu / dz = s · (1 + z · (1 - s)), s = sigmoid(z)."""
    s = sigmoid(z)
    return s * (1 + z * (1 - s))


def gelu_tanh(z: Array) -> Array:
    """z/2 · (1 + tanh(u)) = z · sigmoid(2 u), u = sqrt(2/π) (z + 0.044715 z³); 2 u is the bend of z."""
    return z * sigmoid(_bend(z))


def gelu_tanh_slope(z: Array) -> Array:
    """d gelu_tanh / dz = s · (1 + z · (1 - s) · d bend / dz), s = sigmoid(bend)."""
    s = sigmoid(_bend(z))
    return s * (1 + z * (1 - s) * (_ROOT * (1 + 3 * 0.044715 * z * z)))


def _bend(z: Array) -> Array:
    return _ROOT * (z + 0.044715 * z * z * z)


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), computed from exp(-|z|)."""
    xp = xp_of(z)
    small = xp.exp(-xp.abs(z))
    return xp.where(z >= 0, 1, small) / (1 + small)


def _segments(offsets: Int[Array, " E+1"]) -> list[tuple[int, slice]]:
    """The experts that have tokens, each with the rows of its segment."""
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(bounds) if stop > start]


def _sum_slots(slots: Float[Array, "N k D"]) -> Float[Array, "N D"]:
    """Sum over k in slot order: a fixed order of additions, the same for every dialect."""
    total = slots[:, 0]
    for slot in range(1, slots.shape[1]):
        total = total + slots[:, slot]
    return total
