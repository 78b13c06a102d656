"""Linear maps on the GPU: cuBLAS for many rows, for few a kernel that reads every weight once (`kernels.cu`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16, widen, xp_of
from minimoe.cuda import FEW, FEW_QUEUE, FEW_WORKS, contiguous, few_work, launch, product
from minimoe.quantized import Int8, parts
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
LISTED = 3  # weights of one launch
ROWS = 16  # of a block


def forward(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    if not 0 < len(x) <= FEW:
        return [product(x, w) for w in weights]  # (N, I) -> (N, O)
    ys = []
    for start in range(0, len(weights), LISTED):
        ys += _few(x, weights[start : start + LISTED])
    return ys


def backward(
    dys: Sequence[Float[Array, "N _"]], x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"]]
) -> tuple[Float[Array, "N I"], list[Float[Array, "_ I"]]]:
    # forward: y = x · wᵀ
    dx = dys[0] @ widen(weights[0])  # (N, O) -> (N, I)
    for dy, w in zip(dys[1:], weights[1:], strict=True):
        dx += dy @ widen(w)
    dws = [dy.T @ x for dy in dys]  # (O, N) @ (N, I) -> (O, I)
    return dx, dws


def _few(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    """One launch for up to three weights; the kernel writes all results into one array."""
    xp, (N, width) = xp_of(x), x.shape
    numbers = contiguous(x.astype(xp.float32, copy=False) if is_bfloat16(weights[0]) else x)
    held = [(contiguous(w), scale) for w, scale in map(parts, weights)]
    work = few_work(N, numbers, [w for w, _ in held])
    if work is None:
        return [product(x, w) for w in weights]
    name, threads = work
    rows = [len(w) for w in weights]
    nothing = [None] * (LISTED - len(weights))
    values, scales = ([part[i] for part in held] + nothing for i in range(2))
    out = xp.empty(N * sum(rows), numbers.dtype)
    sizes = rows + [0] * len(nothing)
    blocks = sum(-(-count // ROWS) for count in rows)
    arguments = [numbers, *values, *scales, *sizes, out, N, width]
    launch(KERNELS, f"linear_few<{name}>", blocks, threads, arguments, shared=FEW_QUEUE)
    ys, start = [], 0
    for count in rows:
        ys.append(out[start : start + N * count].reshape(N, count))
        start += N * count
    return ys


INSTANCES = tuple(f"linear_few<{work}>" for work in FEW_WORKS)
