"""Cross-entropy on the GPU: a block to a row of logits, forward and backward (`kernels.cu`).

The number of targets that count, and the mean, stay on the device.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, int64, launch, threads
from minimoe.shapes import Array, Scalar

KERNELS = Path(__file__).with_name("kernels.cu")


def forward(
    logits: Float[Array, "N V"], targets: Int[Array, " N"]
) -> tuple[Scalar, Float[Array, " N"], Float[Array, " N"]]:
    xp, (N, V) = xp_of(logits), logits.shape
    losses, lse, mean = xp.empty(N, logits.dtype), xp.empty(N, logits.dtype), xp.empty((), xp.float64)
    real, targets = c_type(logits), int64(targets)
    launch(KERNELS, f"cross_entropy_rows<{real}>", N, threads(V), [contiguous(logits), targets, losses, lse, V])
    launch(KERNELS, f"cross_entropy_mean<{real}>", 1, threads(N), [losses, targets, mean, N])
    return mean, losses, lse


def backward(
    dloss: float, logits: Float[Array, "N V"], targets: Int[Array, " N"], lse: Float[Array, " N"]
) -> Float[Array, "N V"]:
    xp, (N, V) = xp_of(logits), logits.shape
    dlogits, scale, targets = xp.empty((N, V), logits.dtype), xp.empty((), xp.float64), int64(targets)
    launch(KERNELS, "cross_entropy_scale", 1, threads(N), [targets, float(dloss), scale, N])
    kernel = f"cross_entropy_backward<{c_type(logits)}>"
    arguments = [contiguous(logits), targets, contiguous(lse), scale, dlogits, V]
    launch(KERNELS, kernel, N, threads(V), arguments)
    return dlogits


REALS = ("float", "double")
INSTANCES = (
    *(f"cross_entropy_{name}<{real}>" for name in ("rows", "mean", "backward") for real in REALS),
    "cross_entropy_scale",
)
