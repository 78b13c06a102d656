"""Cases of cross-entropy, AdamW and sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.golden.cases.draw import ALL, EXACT, Draw, Spec
from minimoe.shapes import Array


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [*_cross_entropy(), *_adamw(), *_sampling()]


def _cross_entropy() -> list[Spec]:
    d, N, V = Draw("cross_entropy"), 6, 9
    logits, targets = d.normal(N, V, scale=2.0), np.array([0, 8, 3, 3, 5, 1])
    some = np.array([-1, 8, -1, 3, 5, -1])
    large = np.where(d.uniform(N, V) < 0.5, -1000.0, 1000.0) + d.integers(N, V, high=8) * 0.25
    cases = [
        ("plain", "Nats, not bits; the mean over tokens, not their sum; the logit of the target, not the largest.",
         logits, targets),
        ("ignored", "Targets of -1 (padding, the end of a text) are not counted: the mean divides by the three others. "
         "-1 is not the last entry of the vocabulary either.", logits, some),
        ("large", "Logits of ±1000: exp overflows unless the maximum is subtracted first, and log(softmax) is -inf "
         "where the probability underflows; logsumexp keeps losses of 2000 exact.", large, targets),
        ("nothing-counted", "No target counts: the loss and its gradient are 0, where a mean over nothing is 0 / 0.",
         logits, np.full(N, -1)),
    ]  # fmt: skip
    return [
        Spec(f"{call}/{name}", why, {"logits": x, "targets": t}, tags=("padding",) if (t < 0).any() else (),
             profiles=EXACT)
        for call in ("cross_entropy", "cross_entropy.backward")
        for name, why, x, t in cases
    ]  # fmt: skip


def _adamw() -> list[Spec]:
    d, shape = Draw("adamw"), (4, 6)
    w, g = d.normal(*shape), d.normal(*shape)
    m, v = d.normal(*shape, scale=0.5), d.uniform(*shape, low=0.125, high=1.0)
    zero = np.zeros(shape)
    plain = {
        "step": 1, "lr": 0.0625, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.0, "scale": 1.0
    }  # fmt: skip
    conditioned = (
        " eps is 1e-3 and not 1e-8: from zero moments a step is g / (|g| + eps), whose relative error would be without "
        "bound wherever |g| is near eps."
    )

    def spec(name: str, why: str, moments: tuple[Array, Array], **changes: Any) -> Spec:
        inputs = dict(zip("wgmv", (w, g, *moments), strict=True))
        return Spec(f"adamw/{name}", why, inputs, plain | changes, profiles=EXACT)

    return [
        spec("first-step", "Step 1 from zero moments: bias correction makes the step about lr · sign(g); without it "
             "the step is several times too small." + conditioned, (zero, zero)),
        spec("later-step", "Step 10 with moments: β1¹⁰ and β2¹⁰ still matter, and counting steps from 0 is one power "
             "off.", (m, v), step=10),
        spec("decay", "Decoupled decay shrinks w by lr · weight_decay · w beside the step. L2 regularisation, "
             "decay inside g, goes through the moments, which differ as well.", (m, v), step=3, weight_decay=0.25),
        spec("scaled", "Clipping hands in a scale for the gradient: it enters m linearly and v squared.", (m, v),
             step=3, scale=0.375),
        spec("large-eps", "eps as large as the root: added outside of the root and after bias correction, as in "
             "torch.optim.AdamW; inside the root it gives other steps.", (m, v), step=2, eps=0.5),
    ]  # fmt: skip


def _sampling() -> list[Spec]:
    d, V = Draw("sampling"), 7
    logits = d.normal(5, V, scale=2.0)
    tied = np.array([[1.0, 3, 3, 0, 3], [2, 2, 2, 2, 2], [0, 1, 5, 5, 2]])
    four = np.array([[0.0, -64, 0, 0, 0], [0, 0, 0, 0, -64]])
    peaked = np.array([[0.0, 4.0, 2.0, 0.0, -1.0, 3.0]] * 4)
    middle = np.array([0.25, 0.75])
    cases: list[tuple[str, str, Array, Array, float, float, tuple[str, ...]]] = [
        ("greedy", "Temperature 0 is argmax, and the random number is not looked at.",
         logits, d.uniform(5), 0.0, 1.0, ALL),
        ("greedy-ties", "Equal logits: the lowest id wins, whatever a parallel argmax finds first, and top_p does not "
         "matter.", tied, d.uniform(3), 0.0, 0.5, ALL),
        ("temperature", "Logits are divided by the temperature before the softmax: below 1 it sharpens. Four random "
         "numbers in the same distribution draw four tokens, by the inverse of the cumulative distribution in order of "
         "falling probability.", peaked, np.array([0.25, 0.875, 0.9375, 0.99]), 0.75, 1.0, EXACT),
        ("hot", "Temperature 2 flattens: the same numbers draw other tokens than at 0.75. Multiplying by the "
         "temperature instead of dividing exchanges the two.",
         peaked, np.array([0.25, 0.625, 0.8125, 0.97]), 2.0, 1.0, EXACT),
        ("nucleus", "top_p = 0.75 keeps the smallest set whose mass reaches it, and renormalises: numbers near 1 draw "
         "the last of the set, never what was cut off.",
         peaked, np.array([0.25, 0.5, 0.875, 0.97]), 1.0, 0.75, EXACT),
        ("nucleus-exact-edge", "Four equal probabilities of exactly 1/4 and top_p = 1/2: two tokens reach the mass "
         "exactly and a third is not taken. Ties go to the lower ids.", four, middle, 1.0, 0.5, ALL),
        ("nucleus-one", "A tiny top_p keeps the most probable token: a set that excludes the token which reaches the "
         "mass "
         "would be empty.",
         logits, d.uniform(5), 1.0, 0.001, ALL),
        ("uniform-zero", "The random number 0 draws the most probable token: the order is that of probability, not of "
         "ids.", logits, np.zeros(5), 1.0, 1.0, ALL),
        ("uniform-almost-one", "The largest float32 below 1 draws the last token, and never one behind it. "
         "Probabilities of exactly 1/4 make the cumulative sum exact.",
         four, np.full(2, 1 - 2.0**-24), 1.0, 0.75, EXACT),
    ]  # fmt: skip
    return [
        Spec(f"sampling/{name}", why, {"logits": x, "uniform": np.asarray(u, np.float32).astype(np.float64)},
             {"temperature": temperature, "top_p": top_p}, profiles=profiles)
        for name, why, x, u, temperature, top_p, profiles in cases
    ]  # fmt: skip
