"""AdamW on the GPU: one kernel for a whole tensor's step; sums of squares stay on the device (`kernels.cu`)."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, launch
from minimoe.shapes import Array, Scalar

KERNELS = Path(__file__).with_name("kernels.cu")
THREADS = 256
EACH = 4  # numbers to a thread: enough loads under way to hide that memory is far
MOST_BLOCKS = 1024  # of the sum of squares; more would only lengthen the second sum


def forward(
    w: Float[Array, "..."],
    g: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    if not (w.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous):
        raise ValueError("w, m and v are changed in place and must be contiguous")
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**step, 1 - beta2**step, lr, lr * weight_decay, eps, scale)
    arguments = [w, contiguous(g), m, v, w.size, *map(float, numbers)]
    launch(KERNELS, f"adamw_step<{c_type(w)}>", -(-w.size // (THREADS * EACH)), THREADS, arguments)


def squared_norm(g: Float[Array, "..."]) -> Scalar:
    xp = xp_of(g)
    blocks = min(MOST_BLOCKS, max(1, -(-g.size // (THREADS * EACH))))
    partial, total = xp.empty(blocks, xp.float64), xp.empty((), xp.float64)
    sums = total if blocks == 1 else partial
    launch(KERNELS, f"adamw_squares<{c_type(g)}>", blocks, THREADS, [contiguous(g), sums, g.size])
    if blocks > 1:
        launch(KERNELS, "adamw_sum", 1, THREADS, [partial, total, blocks])
    return total


REALS = ("float", "double")
INSTANCES = (*(f"adamw_{name}<{real}>" for name in ("step", "squares") for real in REALS), "adamw_sum")
