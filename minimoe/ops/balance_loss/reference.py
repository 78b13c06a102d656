"""Load-balancing losses in array code."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int

from minimoe.arrays import xp_of
from minimoe.shapes import Array, Scalar


def forward(
    logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Scalar:
    L, _, E = logits.shape
    probs, share, count = _probs_and_share(logits, ids, active, form)
    if count == 0:
        return 0.0
    mean_probs = probs.sum(axis=1) / count  # (L, N, E) -> (L, E)
    if form == "concatenated":
        return float(E * (share.mean(axis=0) * mean_probs.mean(axis=0)).sum())
    return float(E * (share * mean_probs).sum() / L)


def backward(
    dloss: float, logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Float[Array, "L N E"]:
    xp = xp_of(logits)
    L, _, E = logits.shape
    probs, share, count = _probs_and_share(logits, ids, active, form)
    if count == 0:
        return xp.zeros_like(logits)
    # forward: loss = E · Σ_e share · mean_probs, the mean over layers as `form` says
    slope = xp.broadcast_to(share.mean(axis=0), (L, E)) if form == "concatenated" else share
    dprobs = (slope * (dloss * E / (L * count)))[:, None, :]  # (L, 1, E), the same for every token
    # forward: probs = softmax(logits), zero where not active
    dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
    return dlogits.astype(logits.dtype)


def _probs_and_share(
    logits: Array, ids: Array, active: Array | None, form: str
) -> tuple[Float[Array, "L N E"], Float[Array, "L E"], int]:
    """Softmax (zero where not active), the shares f summed over the slots that count, and how many tokens do."""
    xp = xp_of(logits)
    _, N, E = logits.shape
    if form == "switch":
        ids = ids[..., :1]
    elif form not in ("concatenated", "per_layer"):
        raise ValueError(f"balance form must be concatenated, per_layer or switch, not {form!r}")
    probs = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    probs = probs / probs.sum(axis=-1, keepdims=True)
    chosen = (ids[..., None] == xp.arange(E)).sum(axis=2)  # (L, N, k, E) -> (L, N, E)
    count = N
    if active is not None:
        keep = active[None, :, None]
        probs, chosen, count = xp.where(keep, probs, 0), xp.where(keep, chosen, 0), int(active.sum())
    share = chosen.sum(axis=1) / max(count, 1)  # (L, E)
    return probs, share.astype(logits.dtype), count
