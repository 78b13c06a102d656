"""The router on the GPU: one kernel forward, which asks the host nothing; the backward's products by cuBLAS."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Bool, Float, Int

from minimoe.arrays import widen, xp_of
from minimoe.cuda import FEW, c_type, contiguous, int64, launch
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
SHARES = 32  # into which the products of a block's tokens are cut at least: a warp's work each
MOST_WARPS = 16  # of a block: with more, their registers would not suffice
COLUMNS = 256  # what one warp reads of a row in one go: fewer are not worth another warp
TOGETHER = 4  # tokens of a block that read the gate together, where there are many


def forward(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    k: int,
    active: Bool[Array, " N"] | None = None,
    allowed: Bool[Array, " E"] | None = None,
    ids: Int[Array, "N k"] | None = None,
    renormalise: bool = True,
) -> tuple[Float[Array, "N E"], Int[Array, "N k"], Float[Array, "N k"]]:
    xp, (N, D), E = xp_of(x), x.shape, len(gate)
    forced = None if ids is None else int64(ids)
    k = k if forced is None else forced.shape[1]
    logits, weights = xp.empty((N, E), x.dtype), xp.empty((N, k), x.dtype)
    chosen = xp.empty((N, k), xp.int64)
    parts = max(1, min(SHARES // E, -(-D // COLUMNS)))
    columns = 8 * -(-D // (8 * parts))  # whole loads of 16 bytes of any type
    tokens = 1 if N <= FEW else TOGETHER
    kernel = f"gating_forward<{c_type(x)}, {c_type(gate)}, {tokens}>"
    arguments = [contiguous(x), contiguous(gate), active, allowed, forced, logits, chosen, weights]
    shared = tokens * (8 * k + x.itemsize * E * (parts + 1))
    warps = min(MOST_WARPS, E * parts)
    launch(KERNELS, kernel, -(-N // tokens), 32 * warps, [*arguments, N, D, E, k, parts, columns, renormalise], shared)
    return logits, chosen, weights


def backward(
    dweights: Float[Array, "N k"],
    dlogits: Float[Array, "N E"] | None,
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    logits: Float[Array, "N E"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, "E D"]]:
    (N, k), E = ids.shape, len(gate)
    total = xp_of(x).empty((N, E), x.dtype)
    dlogits, logits = (None if array is None else contiguous(array) for array in (dlogits, logits))
    arguments = [contiguous(dweights), dlogits, int64(ids), contiguous(weights), logits, total, N, E, k]
    launch(KERNELS, f"gating_backward_logits<{c_type(x)}>", -(-N // 4), 128, arguments)  # a warp to a token
    # forward: logits = x · gateᵀ
    return total @ widen(gate), total.T @ x


REALS = ("float", "double")
INSTANCES = (
    *(
        f"gating_forward<{real}, {stored}, {tokens}>"
        for real in REALS
        for stored in (real, "bfloat16")
        for tokens in (1, TOGETHER)
    ),
    *(f"gating_backward_logits<{real}>" for real in REALS),
)
