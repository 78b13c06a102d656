"""RMSNorm on the GPU: one kernel forward, two backward (`kernels.cu`)."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, launch, threads
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")


def forward(
    x: Float[Array, "N D"], weight: Float[Array, " D"], eps: float, residual: Float[Array, "N D"] | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " N"]]:
    xp, (N, D) = xp_of(x), x.shape
    x = contiguous(x)
    y, r = xp.empty_like(x), xp.empty(N, x.dtype)
    h = x if residual is None else xp.empty_like(x)
    residual = None if residual is None else contiguous(residual)
    kernel = f"rmsnorm_forward<{c_type(x)}, {c_type(weight)}>"
    launch(KERNELS, kernel, N, threads(D), [x, residual, contiguous(weight), float(eps), y, h, r, D])
    return y, h, r


def backward(
    dy: Float[Array, "N D"],
    h: Float[Array, "N D"],
    weight: Float[Array, " D"],
    r: Float[Array, " N"],
    dh: Float[Array, "N D"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
    xp, (N, D) = xp_of(h), h.shape
    dy, h = contiguous(dy), contiguous(h)
    dx, dweight = xp.empty_like(h), xp.empty(D, h.dtype)
    real = c_type(h)
    dh = None if dh is None else contiguous(dh)
    rows = f"rmsnorm_backward_rows<{real}, {c_type(weight)}>"
    launch(KERNELS, rows, N, threads(D), [dy, h, contiguous(weight), r, dh, dx, D])
    launch(KERNELS, f"rmsnorm_backward_weight<{real}>", -(-D // 32), (32, 32), [dy, h, r, dweight, N, D])
    return dx, dweight


REALS, STORED = ("float", "double"), ("float", "double", "bfloat16")
INSTANCES = (
    *(
        f"rmsnorm_{name}<{real}, {stored}>"
        for name in ("forward", "backward_rows")
        for real in REALS
        for stored in STORED
    ),
    *(f"rmsnorm_backward_weight<{real}>" for real in REALS),
)
