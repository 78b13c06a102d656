"""Sampling on the GPU, without asking the host: one kernel where it is greedy, else four (`kernels.cu`)."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, launch, threads
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
SMALLEST, LARGEST = 64, 2048  # tokens that one block sorts: two to a thread


def forward(
    logits: Float[Array, "B V"], temperature: float, top_p: float, uniform: Float[Array, " B"]
) -> Int[Array, " B"]:
    xp, (B, V), real = xp_of(logits), logits.shape, c_type(logits)
    logits, ids = contiguous(logits), xp.empty(B, xp.int64)
    if temperature == 0:
        launch(KERNELS, f"sampling_greedy<{real}>", B, threads(V), [logits, ids, V])
        return ids
    chunk = min(LARGEST, max(SMALLEST, 1 << (V - 1).bit_length()))
    chunks = -(-V // chunk)
    tops, sums, reached = (xp.empty((B, chunks), xp.float64) for _ in range(3))
    probs, before, after = (xp.empty((B, chunks, chunk), xp.float64) for _ in range(3))
    prefix, places = xp.empty((B, chunks, chunk + 1), xp.float64), xp.empty((B, chunks, chunk), xp.int32)
    temperature, top_p = float(temperature), float(top_p)

    def run(kernel: str, arguments: list[Array | int | float], shared: int = 0) -> None:
        launch(KERNELS, kernel, (chunks, B), chunk // 2, arguments, shared)

    run(f"sampling_sums<{real}>", [logits, temperature, tops, sums, V, chunk])
    found = [probs, places, prefix, ids, V, chunk]
    run(f"sampling_sort<{real}>", [logits, temperature, tops, sums, *found], shared=12 * chunk)
    run("sampling_masses", [probs, prefix, top_p, before, after, reached, chunk])
    run(
        "sampling_draw",
        [places, before, after, reached, contiguous(uniform.astype(xp.float64, copy=False)), top_p, ids, chunk],
    )
    return ids


REALS = ("float", "double")
INSTANCES = (
    *(f"sampling_{name}<{real}>" for name in ("greedy", "sums", "sort") for real in REALS),
    "sampling_masses",
    "sampling_draw",
)
