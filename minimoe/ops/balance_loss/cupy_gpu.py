"""Load-balancing losses on the GPU: sums within blocks of tokens, then over the blocks (`kernels.cu`)."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Bool, Float, Int

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, int64, launch
from minimoe.shapes import Array, Scalar

KERNELS = Path(__file__).with_name("kernels.cu")
TOKENS = 128  # of a block, one to a thread


def forward(
    logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Scalar:
    return _loss_and_slope(contiguous(logits), ids, active, form)[0]


def backward(
    dloss: float, logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Float[Array, "L N E"]:
    L, N, E = logits.shape
    logits = contiguous(logits)
    # forward: loss = E · Σ_e share · mean_probs, the mean over layers as `form` says
    _, slope = _loss_and_slope(logits, ids, active, form)
    dlogits = xp_of(logits).empty_like(logits)
    arguments = [logits, active, slope, float(dloss), dlogits, L, N, E]
    launch(KERNELS, f"balance_backward<{c_type(logits)}>", -(-L * N // TOKENS), TOKENS, arguments)
    return dlogits


def _loss_and_slope(
    logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> tuple[Float[Array, ""], Float[Array, "L E"]]:
    """The loss, and its gradient with respect to every token's probabilities."""
    if form not in ("concatenated", "per_layer", "switch"):
        raise ValueError(f"balance form must be concatenated, per_layer or switch, not {form!r}")
    xp, (L, N, E), k = xp_of(logits), logits.shape, ids.shape[-1]
    blocks = -(-N // TOKENS)
    probs, chosen, slope = (xp.empty(shape, xp.float64) for shape in ((L, blocks, E), (L, blocks, E), (L, E)))
    loss = xp.empty((), xp.float64)
    arguments = [logits, int64(ids), active, probs, chosen, N, E, k, 1 if form == "switch" else k]
    launch(KERNELS, f"balance_sums<{c_type(logits)}>", (blocks, L), TOKENS, arguments)
    together = L if form == "concatenated" else 1
    launch(KERNELS, "balance_finish", 1, 256, [probs, chosen, active, slope, loss, L, N, E, blocks, together])
    return loss, slope


REALS = ("float", "double")
INSTANCES = (*(f"balance_{name}<{real}>" for name in ("sums", "backward") for real in REALS), "balance_finish")
