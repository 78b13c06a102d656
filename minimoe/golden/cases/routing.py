"""Cases of the ops that routing is made of: gating, experts and the balance losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.golden.cases.draw import EXACT, GROK, OURS, Draw, Spec, coded
from minimoe.shapes import Array


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [
        *_gating(), *_ties(), *_shares(), *_gating_backward(), *_shares_backward(), *_experts(), *_gelu(),
        *_experts_backward(), *_gelu_backward(), *_balance_loss(),
    ]  # fmt: skip


def _routed(name: str, N: int, D: int, E: int, k: int, scale: float = 0.5, grid: bool = True) -> dict[str, Array]:
    """States and a gate whose logits keep their order under any rounding (see `coded`)."""
    d = Draw(f"gating/{name}", grid)
    x = coded(d, N, D, E, k)
    gate = d.normal(E, D, scale=scale / 32)
    gate[np.arange(E), np.arange(E)] += scale
    return {"x": x, "gate": d.round(gate)}


def _gating() -> list[Spec]:
    padding = np.array([True, False, True, True, False, True])
    forced, negative = _routed("forced", 5, 8, 4, 2), _routed("negative", 5, 8, 4, 2)
    negative["x"][:, 4] = 2.0  # one element that lowers every logit alike
    negative["gate"][:, 4] = -1.0
    return [
        Spec(
            "gating/top-1", "k = 1: the one chosen expert has weight exactly 1. Weights taken from a softmax over all "
            "experts, not renormalised, as Switch has them, are below 1.",
            _routed("top-1", 6, 8, 4, 1), {"k": 1},
        ),
        Spec(
            "gating/top-2", "k = 2 of 5, Mixtral's way: the softmax is over the two chosen logits alone. Slot 0 is the "
            "first choice, whichever id it has: ids sorted by number, or the smallest instead of the largest logits, "
            "differ.", _routed("top-2", 7, 9, 5, 2), {"k": 2},
        ),
        Spec(
            "gating/all", "k = E: every expert is chosen, in the order of its logit. Where weights come in expert "
            "order instead, they are the same numbers in other slots.", _routed("all", 5, 8, 4, 4), {"k": 4},
        ),
        Spec(
            "gating/square", "E = D: a gate that was stored transposed fits, and chooses other experts.",
            _routed("square", 6, 6, 6, 2), {"k": 2},
        ),
        Spec(
            "gating/negative", "All logits are negative: masking losers with 0 before the top-k, instead of -inf, "
            "chooses experts that were masked.", negative, {"k": 2},
        ),
        _gap("gap-200", 200.0),
        Spec(
            "gating/padding", "Inactive tokens are not routed: ids -1 and weights 0 in all slots, so they take no "
            "expert's time and count in no statistic.", _routed("padding", 6, 8, 4, 2) | {"active": padding},
            {"k": 2}, tags=("padding",),
        ),
        Spec(
            "gating/forced", "The choice is given and is not what the router would choose: the weights are the softmax "
            "over the logits of the *given* experts, in the given order.",
            forced | {"ids": np.array([[3, 0], [1, 2], [0, 3], [2, 1], [3, 2]])}, {"k": 2}, tags=("forced",),
        ),
        Spec(
            "gating/digits", "States and gate with all of float32's digits: router logits taken in 16 bits, as many "
            "mixed-precision implementations do by accident, leave float32's bound.",
            _routed("digits", 6, 32, 8, 2, grid=False), {"k": 2}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _gap(name: str, gap: float) -> Spec:
    """One-hot states: the logits are exact numbers in every format."""
    x = np.eye(4)
    logits = [[gap, -40, 40, 0], [0, gap / 2, -gap / 2, -40], [40, 0, gap, -40], [-gap, 0, -gap / 2, -gap / 4]]
    return Spec(
        f"gating/{name}",
        "Logits up to 200 apart: exp must not overflow. Softmax over all experts before the top-k underflows in "
        "float32: the losers are all 0 and tie, and the second choice becomes an accident. Its weight is far below the "
        "bound, so that choice is counted as don't care.",
        {"x": x, "gate": np.array(logits).T.copy()}, {"k": 2}, tags=("gap",),
    )  # fmt: skip


def _ties() -> list[Spec]:
    """Small integers: every product and sum is exact, so equal logits are equal in any order of summation."""
    d = Draw("gating/ties")
    x = d.integers(6, 5, low=-2, high=3).astype(np.float64)
    gate = d.integers(6, 5, low=-2, high=3).astype(np.float64)
    pairs = gate.copy()
    pairs[4], pairs[5], pairs[2] = gate[1], gate[0], gate[3]
    border = np.array([[3, 2, 2, 1], [2, 2, 3, 2], [1, 2, 2, 2], [0, 1, 1, 3]], np.float64)
    return [
        Spec(
            "gating/ties-all", "A gate of zeros: all logits are 0, and the pinned choice is the lowest ids, 0 and 1, "
            "with equal weights. What a library's top-k returns here is an accident of its sorting.",
            {"x": x, "gate": np.zeros((5, 5))}, {"k": 2}, tags=("ties",),
        ),
        Spec(
            "gating/ties-pairs", "Experts 0 and 5, 1 and 4, 2 and 3 have the same gate rows: every choice ties with "
            "its twin, which stands in the next slot. Ties go to the lower id.",
            {"x": x, "gate": pairs}, {"k": 2}, tags=("ties",),
        ),
        Spec(
            "gating/ties-border", "Ties across the border of the chosen: two or three experts compete for the last "
            "slot, and the lowest id has it.",
            {"x": np.eye(4), "gate": border.T.copy()}, {"k": 2}, tags=("ties",),
        ),
    ]  # fmt: skip


def _shares() -> list[Spec]:
    """Weights that are shares of all experts, as Grok-1 has them."""
    forced = np.array([[3, 0], [1, 2], [0, 3], [2, 1], [3, 2]])
    padding = np.array([True, False, True, True, False, True])

    def spec(name: str, why: str, inputs: dict[str, Array], *tags: str, **more: Any) -> Spec:
        settings = {"k": 2, "renormalise": False} | more
        return Spec(f"gating/shares{name}", why, inputs, settings, tags=(GROK, *tags), profiles=OURS)

    return [
        spec("", "renormalise is false: each of the two chosen keeps its share of a softmax over all five, so that "
             "their sum is below 1. Divided by their sum, or taken from the two logits alone, weights are too large.",
             _routed("shares", 7, 9, 5, 2)),
        spec("-padding", "The same beside padding, which has ids -1 and weights 0.",
             _routed("shares-padding", 6, 8, 4, 2) | {"active": padding}, "padding"),
        spec("-forced", "The choice is given: shares of all, of the given experts, in the given order.",
             _routed("shares-forced", 5, 8, 4, 2) | {"ids": forced}, "forced"),
        spec("-ties", "A gate of zeros: experts 0 and 1 are chosen, each with its share of 1/5, not 1/2.",
             {"x": Draw("gating/shares-ties").normal(4, 6), "gate": np.zeros((5, 6))}, "ties"),
        spec("-switched-off", "Expert 1 is switched off and is not chosen, however large its logit, but it keeps its "
             "part in the sum that shares are taken of.",
             _routed("shares-switched-off", 6, 8, 4, 2), disabled=[1]),
    ]  # fmt: skip


def _shares_backward() -> list[Spec]:
    d, N, D, E = Draw("gating.backward/shares"), 6, 7, 5

    def spec(name: str, why: str, ids: Array, dlogits: bool, *tags: str) -> Spec:
        inputs = {"x": d.normal(N, D), "gate": d.normal(E, D), "ids": ids, "dweights": d.normal(*ids.shape)}
        if dlogits:
            inputs["dlogits"] = np.where((ids >= 0).any(axis=1, keepdims=True), d.normal(N, E), 0.0)
        return Spec(f"gating.backward/shares{name}", why, inputs, {"renormalise": False}, None, (GROK, *tags), EXACT)

    unrouted = d.choices(N, 2, E)
    unrouted[[0, 3]] = -1
    return [
        spec("", "Shares of all experts: the logits of those that were not chosen have a gradient too, since they "
             "stand in the sum.", d.choices(N, 2, E), False),
        spec("-padding", "The same beside the balance loss's gradient and tokens that were not routed.",
             unrouted, True, "padding"),
    ]  # fmt: skip


def _gating_backward() -> list[Spec]:
    d, N, D, E = Draw("gating.backward"), 6, 7, 5
    x, gate = d.normal(N, D), d.normal(E, D)
    unrouted = d.choices(N, 2, E)
    unrouted[[1, 4]] = -1

    def spec(name: str, why: str, ids: Array, dlogits: bool, *tags: str) -> Spec:
        inputs = {"x": x, "gate": gate, "ids": ids, "dweights": d.normal(*ids.shape)}
        if dlogits:
            inputs["dlogits"] = np.where((ids >= 0).any(axis=1, keepdims=True), d.normal(N, E), 0.0)
        return Spec(f"gating.backward/{name}", why, inputs, {}, None, tags, EXACT)

    return [
        spec("top-2", "The gradient flows through the weights of the chosen alone; the rows of experts that no token "
             "chose are zero. The choice itself has no gradient.", d.choices(N, 2, E), False),
        spec("with-balance-loss", "The balance loss reaches *all* logits: its gradient is added to that of the chosen.",
             d.choices(N, 2, E), True),
        spec("top-1", "k = 1: a weight that is always 1 has no gradient, so only the balance loss teaches the router.",
             d.choices(N, 1, E), True),
        spec("all", "k = E: the plain gradient of a softmax; with nothing left out, a gradient that is scattered to "
             "wrong columns has nowhere to hide.", d.choices(N, E, E), False),
        spec("padding", "Tokens that were not routed (ids -1) take no part; -1 must not be read as the last expert.",
             unrouted, True, "padding"),
    ]  # fmt: skip


def _weights(d: Draw, E: int, F: int, D: int) -> dict[str, Array]:
    return {
        "w1": d.normal(E, F, D, scale=0.5), "w2": d.normal(E, D, F, scale=0.5), "w3": d.normal(E, F, D, scale=0.5)
    }  # fmt: skip


def _expert_inputs(name: str, ids: Array, D: int, F: int, E: int = 4, scale: float = 1.0) -> dict[str, Array]:
    d, (N, k) = Draw(f"experts/{name}"), ids.shape
    return {"x": d.normal(N, D, scale=scale), **_weights(d, E, F, D), "ids": ids, "weights": d.shares(N, k)}


_MAIN = np.array([[1, 3], [3, 0], [0, 1], [3, 1], [1, 0]])  # expert 2 has no tokens; neither order nor shares are even
_UNROUTED = np.array([[2, 0], [-1, -1], [0, 3], [-1, -1], [3, 2]])


def _experts() -> list[Spec]:
    cases = [
        ("main", "k = 2 with F unlike D, unsorted choices, and an expert without tokens in the middle: dispatch that "
         "loses the order of slots, or stumbles over the empty segment, shows. silu stands on w1's side: exchanging w1 "
         "and w3 gives other numbers.", _MAIN, 6, 10, ()),
        ("square", "F = D: w2 without its transposition, or w1 with one, fits and gives other numbers.",
         _MAIN, 8, 8, ()),
        ("top-1", "k = 1: each token visits one expert, and its weight, which is not 1 here, still multiplies.",
         np.array([[2], [0], [2], [3], [2], [0]]), 6, 10, ()),
        ("all-to-one", "All tokens go to expert 3, none to the others: a capacity limit drops some; ours has none.",
         np.full((7, 1), 3), 6, 10, ()),
        ("every-expert", "k = E: every token visits every expert, each in another order.",
         Draw("experts/every").choices(4, 4, 4), 5, 6, ()),
        ("unrouted", "ids -1 mark tokens that are not routed: their output is exactly zero, and -1 is not the last "
         "expert.", _UNROUTED, 6, 10, ("padding",)),
        ("one-token", "A single token, as in decoding, where kernels often take another path.",
         np.array([[2, 1]]), 6, 10, ()),
    ]  # fmt: skip
    d = Draw("experts/saturated")
    steep = {"x": d.normal(4, 6, scale=8.0), **_weights(d, 4, 10, 6), "ids": _MAIN[:4], "weights": d.shares(4, 2)}
    digits = Draw("experts/digits", grid=False)
    fine = {"x": digits.normal(5, 24), **_weights(digits, 4, 20, 24), "ids": _MAIN, "weights": digits.shares(5, 2)}
    return [
        *(
            Spec(f"experts/{name}", why, _expert_inputs(name, ids, D, F), tags=tags)
            for name, why, ids, D, F, tags in cases
        ),
        Spec("experts/saturated", "Pre-activations of some tens either side of zero: silu is almost z or almost 0, and "
             "a sigmoid written as 1 / (1 + exp(-z)) meets exp of large numbers.", steep),
        Spec("experts/digits", "Full float32 digits: hidden states rounded to 16 bits leave float32's bound.", fine,
             profiles=EXACT),
    ]  # fmt: skip


def _gelu() -> list[Spec]:
    def spec(name: str, why: str, inputs: dict[str, Array], *tags: str) -> Spec:
        return Spec(f"experts/{name}", why, inputs, {"activation": "gelu_tanh"}, tags=(GROK, *tags), profiles=OURS)

    return [
        spec("gelu", "The activation is GELU in its tanh form, on w1's side. silu is far off; the exact form, with "
             "erf, differs by up to 5e-4 where |z| is about 2, as it is here.",
             _expert_inputs("gelu", _MAIN, 6, 10, scale=1.5)),
        spec("gelu-saturated", "Pre-activations of some tens: GELU is z or 0, and z³ must not overflow what follows.",
             _expert_inputs("gelu-saturated", _UNROUTED, 6, 10, scale=16.0), "padding"),
    ]  # fmt: skip


def _gelu_backward() -> list[Spec]:
    dout = Draw("experts.backward/gelu").normal(len(_MAIN), 6)
    return [
        Spec("experts.backward/gelu", "The slope of GELU's tanh form has the slope of its cubic in it. Pre-activations "
             "are of either sign.", _expert_inputs("backward-gelu", _MAIN, 6, 10, scale=1.5) | {"dout": dout},
             {"activation": "gelu_tanh"}, tags=(GROK,), profiles=EXACT),
    ]  # fmt: skip


def _experts_backward() -> list[Spec]:
    cases = [
        ("main", "Gradients of every expert's matrices, zeros for the one without tokens, and of the gate weights: "
         "Σ_d dout · slot. The weight multiplies what flows into the expert, not twice and not never.", _MAIN, 6, 10),
        ("square", "F = D, so that each of the three transpositions in the backward could be missing unnoticed.",
         _MAIN, 6, 6),
        ("unrouted", "Tokens that were not routed get a zero dx and give nothing to any expert.", _UNROUTED, 6, 10),
        ("all-to-one", "One expert collects the gradients of all tokens; those of the others are exactly zero, and are "
         "not left unset.", np.full((5, 1), 1), 6, 10),
    ]  # fmt: skip
    return [
        Spec(
            f"experts.backward/{name}", why,
            _expert_inputs(f"backward-{name}", ids, D, F)
            | {"dout": Draw(f"experts.backward/{name}").normal(len(ids), D)},
            profiles=EXACT, tags=("padding",) if name == "unrouted" else (),
        )
        for name, why, ids, D, F in cases
    ]  # fmt: skip


def _balance_loss() -> list[Spec]:
    d, L, N, E, k = Draw("balance_loss"), 3, 8, 4, 2
    logits = d.normal(L, N, E)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    active = np.array([True] * 5 + [False] * 3)
    crossed = np.zeros((2, 4, 2))
    crossed[0, :, 0] = crossed[1, :, 1] = 4.0  # layer 0 sends all to expert 0, layer 1 all to expert 1
    even = np.tile(np.array([[0, 1], [2, 3], [1, 2], [3, 0]]), (1, 1, 1))
    forms = {
        "concatenated": "Hugging Face's: the layers' tokens are one long list, so layers can cancel each other out",
        "per_layer": "one loss per layer, then their mean",
        "switch": "Switch's: only first choices count, per layer",
    }
    found = []
    for form, says in forms.items():
        for call in ("balance_loss", "balance_loss.backward"):
            kept = ("balance_loss", "balance_loss.backward").index(call)
            constant = " The shares are constants: only the probabilities have a gradient." if kept else ""
            found += [
                Spec(f"{call}/{form}", f"The form {form}: {says}. Probabilities are one softmax over all experts; a "
                     f"second softmax over them flattens the loss.{constant}", {"logits": logits, "ids": ids},
                     {"form": form}, profiles=EXACT),
                Spec(f"{call}/{form}-padding", f"The form {form} with padding: masked tokens count neither in the "
                     f"shares nor in the means, and the divisor is the number of the others.{constant}",
                     {"logits": logits, "ids": ids, "active": active}, {"form": form}, tags=("padding",),
                     profiles=EXACT),
            ]  # fmt: skip
        found.append(
            Spec(f"balance_loss/{form}-crossed", "Two layers that each send every token to one expert, but to "
                 "different ones: concatenated reads this as perfect balance (1), per layer as the collapse that it "
                 f"is. The form {form}.",
                 {"logits": crossed, "ids": np.argsort(-crossed, axis=-1, kind="stable")[..., :1]}, {"form": form},
                 profiles=EXACT)
        )  # fmt: skip
    return [
        *found,
        Spec("balance_loss/even", "Exact balance: with all logits equal and all experts chosen equally often the loss "
             "is k = 2, not 1 and not E.", {"logits": np.zeros((1, 4, 4)), "ids": even}, {"form": "concatenated"},
             profiles=EXACT),
    ]  # fmt: skip
