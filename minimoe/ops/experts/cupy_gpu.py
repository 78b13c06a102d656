"""Experts on the GPU: for few tokens two kernels that read each chosen weight once, for many cuBLAS (`kernels.cu`).

Few: experts are found, and their pairs grouped, on the device, so that a step of decoding can be captured. Stacked
experts need no table of addresses: expert e begins e matrices behind the first.

Many: a counting sort on the device, one product per non-empty segment (the host reads the bounds of segments, once),
the activation, and the weighted sum in the order of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int

from minimoe.arrays import BFLOAT16, is_bfloat16, to_host, widen, xp_of
from minimoe.cuda import FEW, FEW_QUEUE, FEW_WORKS, c_type, contiguous, few_work, int64, launch, product, threads
from minimoe.ops.experts import Saved, check_activation
from minimoe.quantized import Int8, parts
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
ROWS = 16  # of a block of the kernels for few tokens
FLAT = 256  # threads of a block where every thread has one number
ACTIVATIONS = {"silu": "Silu", "gelu_tanh": "GeluTanh"}


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
    x, ids = contiguous(x), int64(ids)
    weights = contiguous(weights.astype(x.dtype, copy=False))
    if 0 < len(x) <= FEW and not keep:
        out = _few(x, w1, w2, w3, ids, weights, activation)
        if out is not None:
            return out, None
    return _many(x, w1, w2, w3, ids, weights, keep, activation)


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
    xp, (N, D), k, E, F, M = xp_of(x), x.shape, weights.shape[1], len(w1), w1[0].shape[0], len(saved.pairs)
    dout, x, weights, pairs = contiguous(dout), contiguous(x), contiguous(weights), contiguous(saved.pairs)
    real, rows = c_type(x), threads(D)
    # forward: out = Σ_slot weights · slots
    dweights = xp.empty((N, k), x.dtype)
    launch(KERNELS, f"experts_weights_backward<{real}>", N * k, rows, [dout, saved.slots, dweights, k, D])
    xs, dys = xp.empty((M, D), x.dtype), xp.empty((M, D), x.dtype)
    launch(KERNELS, f"experts_gather<{real}, {real}>", M, rows, [x, None, pairs, xs, k, D])
    launch(KERNELS, f"experts_gather<{real}, {real}>", M, rows, [dout, weights, pairs, dys, k, D])
    # forward: y = hidden · w2ᵀ, hidden = act(gate_in) ⊙ up
    segments = _segments(saved.offsets)
    dhidden = xp.empty((M, F), x.dtype)
    for e, part in segments:
        dhidden[part] = dys[part] @ widen(w2[e])  # (M_e, D) -> (M_e, F)
    hidden, dgate_in = xp.empty_like(dhidden), xp.empty_like(dhidden)
    arguments = [saved.gate_in, saved.up, dhidden, hidden, dgate_in, M * F]
    kernel = f"experts_activate_backward<{real}, {ACTIVATIONS[activation]}>"
    launch(KERNELS, kernel, -(-M * F // FLAT), FLAT, arguments)
    dup = dhidden
    # forward: gate_in = xe · w1ᵀ, up = xe · w3ᵀ
    dw1, dw2, dw3 = (xp.zeros((E, *shape), x.dtype) for shape in ((F, D), (D, F), (F, D)))
    dxs = xp.empty((M, D), x.dtype)
    for e, part in segments:
        dw1[e], dw3[e] = dgate_in[part].T @ xs[part], dup[part].T @ xs[part]
        dw2[e] = dys[part].T @ hidden[part]
        dxs[part] = dgate_in[part] @ widen(w1[e]) + dup[part] @ widen(w3[e])  # (M_e, F) -> (M_e, D)
    # forward: xe = x[pairs // k]
    place = xp.full(N * k, -1, xp.int64)
    place[pairs] = xp.arange(M)
    dx = xp.empty((N, D), x.dtype)
    launch(KERNELS, f"experts_combine<{real}>", N, rows, [dxs, place, None, dx, None, k, D])
    return dx, dw1, dw2, dw3, dweights


def _few(
    x: Float[Array, "N D"],
    w1: Any,
    w2: Any,
    w3: Any,
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    activation: str,
) -> Float[Array, "N D"] | None:
    """Return the result, or None where the kernels cannot read these weights: lists, or types that do not suit `x`."""
    xp, (N, D), k, E, F = xp_of(x), x.shape, ids.shape[1], len(w1), w1[0].shape[0]
    stacks = [w[0] if len(w) == 1 else w for w in (w1, w2, w3)]
    if any(isinstance(w, list | tuple) for w in stacks):
        return None
    (w1, scale1), (w2, scale2), (w3, scale3) = ((contiguous(w), scale) for w, scale in map(parts, stacks))
    hidden = xp.empty((N * k, F), w2.dtype if is_bfloat16(w2) else x.dtype)
    # With int8 more would not fit registers: an expert that more than 4 tokens share is then read again.
    most = min(N, 4) if w1.dtype == xp.int8 else N
    up, down = few_work(most, x, [w1, w3]), few_work(most, hidden, [w2])
    if up is None or down is None or w1.dtype != w2.dtype:
        return None
    out, M = xp.empty((N, D), x.dtype), N * k
    work, block = up
    arguments = [x, w1, w3, scale1, scale3, ids, hidden, M, k, E, D, F]
    kernel = f"experts_up<{work}, {ACTIVATIONS[activation]}>"
    launch(KERNELS, kernel, (-(-F // ROWS), min(E, M)), block, arguments, shared=FEW_QUEUE)
    work, block = down
    arguments = [hidden, w2, scale2, ids, weights, out, M, k, E, D, F, FEW_QUEUE]
    slots = M * ROWS * x.dtype.itemsize
    launch(KERNELS, f"experts_down<{work}>", -(-D // ROWS), block, arguments, shared=FEW_QUEUE + slots)
    return out


def _many(
    x: Float[Array, "N D"],
    w1: Any,
    w2: Any,
    w3: Any,
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    keep: bool,
    activation: str,
) -> tuple[Float[Array, "N D"], Saved | None]:
    xp, (N, D), k, F, real = xp_of(x), x.shape, ids.shape[1], w1[0].shape[0], c_type(x)
    pairs, offsets, place = dispatch(ids, len(w1))
    segments, M = _segments(offsets), len(pairs)
    # Rounded here once, and not for every product, where all that read them are bfloat16.
    xs = xp.empty((M, D), BFLOAT16 if is_bfloat16(w1[0]) and is_bfloat16(w3[0]) else x.dtype)
    launch(KERNELS, f"experts_gather<{real}, {c_type(xs)}>", M, threads(D), [x, None, pairs, xs, k, D])
    # Without a backward the inner numbers of one expert take the place of another's.
    kept = M if keep else max((part.stop - part.start for _, part in segments), default=0)
    gate_in, up = (xp.empty((kept, F), x.dtype) for _ in range(2))
    ys = xp.empty((M, D), x.dtype)
    for e, part in segments:
        inner = part if keep else slice(0, part.stop - part.start)
        product(xs[part], w1[e], gate_in[inner])  # (M_e, D) -> (M_e, F)
        product(xs[part], w3[e], up[inner])
        hidden = xp.empty(up[inner].shape, BFLOAT16 if is_bfloat16(w2[0]) else x.dtype)
        kernel = f"experts_activate<{real}, {c_type(hidden)}, {ACTIVATIONS[activation]}>"
        arguments = [gate_in[inner], up[inner], hidden, hidden.size]
        launch(KERNELS, kernel, -(-hidden.size // FLAT), FLAT, arguments)
        product(hidden, w2[e], ys[part])  # (M_e, F) -> (M_e, D)
    out = xp.empty((N, D), x.dtype)
    slots = xp.empty((N, k, D), x.dtype) if keep else None
    launch(KERNELS, f"experts_combine<{real}>", N, threads(D), [ys, place, weights, out, slots, k, D])
    return out, Saved(pairs, offsets, gate_in, up, slots) if keep else None


def dispatch(ids: Int[Array, "N k"], num_experts: int) -> tuple[Int[Array, " M"], Int[Array, " E+1"], Int[Array, " P"]]:
    """Sort the pairs n·k + slot by expert: the pairs, the bounds of segments (on the host), each pair's row or -1."""
    xp, size = xp_of(ids), ids.size
    pairs, place, offsets = xp.empty(size, xp.int64), xp.empty(size, xp.int64), xp.empty(num_experts + 1, xp.int64)
    arguments = [int64(ids), pairs, offsets, place, size, num_experts]
    launch(KERNELS, "experts_sort", num_experts, threads(4 * size), arguments)
    bounds = to_host(offsets)
    return pairs[: int(bounds[-1])], bounds, place


def _segments(offsets: Int[Array, " E+1"]) -> list[tuple[int, slice]]:
    """The experts that have tokens, each with the rows of its segment."""
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(bounds) if stop > start]


REALS = ("float", "double")
WORKS = [work for work in FEW_WORKS if not (work.startswith("Dots<signed char") and work.endswith(", 16>"))]
INSTANCES = (
    "experts_sort",
    *(f"experts_up<{work}, {activation}>" for work in WORKS for activation in ACTIVATIONS.values()),
    *(f"experts_down<{work}>" for work in WORKS),
    *(f"experts_gather<{real}, {to}>" for real in REALS for to in (real, "bfloat16")),
    *(
        f"experts_activate<{real}, {to}, {activation}>"
        for real in REALS
        for to in (real, "bfloat16")
        for activation in ACTIVATIONS.values()
    ),
    *(f"experts_{name}<{real}>" for name in ("combine", "weights_backward") for real in REALS),
    *(f"experts_activate_backward<{real}, {activation}>" for real in REALS for activation in ACTIVATIONS.values()),
)
