"""Embedding on the GPU: rows are gathered; gradients, sorted by token, are added segment by segment (`kernels.cu`)."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16, xp_of
from minimoe.cuda import c_type, contiguous, int64, launch, threads
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")


def forward(tokens: Int[Array, " N"], table: Float[Array, "V D"]) -> Float[Array, "N D"]:
    xp, N, D = xp_of(table), len(tokens), table.shape[1]
    x = xp.empty((N, D), xp.float32 if is_bfloat16(table) else table.dtype)
    kernel = f"embedding_forward<{c_type(x)}, {c_type(table)}>"
    launch(KERNELS, kernel, N, threads(D), [int64(tokens), contiguous(table), x, D])
    return x


def backward(dx: Float[Array, "N D"], tokens: Int[Array, " N"], vocab_size: int) -> Float[Array, "V D"]:
    xp, (N, D) = xp_of(dx), dx.shape
    tokens = int64(tokens)
    order = tokens.argsort(kind="stable")  # (N,)
    dtable = xp.empty((vocab_size, D), dx.dtype)
    kernel = f"embedding_backward<{c_type(dx)}>"
    launch(KERNELS, kernel, vocab_size, threads(D), [contiguous(dx), tokens[order], order, dtable, N, D])
    return dtable


REALS = ("float", "double")
INSTANCES = (
    "embedding_forward<float, float>",
    "embedding_forward<double, double>",
    "embedding_forward<float, bfloat16>",
    *(f"embedding_backward<{real}>" for real in REALS),
)
