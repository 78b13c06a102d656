"""How clear the decisions of a case are: routing and choosing tokens are discontinuous, and near-ties prove nothing.

    python -m minimoe.golden.clear

prints, for every text that a case reads, the first draw with which all decisions are clear: what stands in
`cases.texts.DRAWS`.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

from minimoe.backends import Backend, make_backend
from minimoe.golden import make, outputs
from minimoe.golden.calls import GoldenModel, cast, run
from minimoe.golden.cases import Spec, training, whole
from minimoe.golden.cases.texts import DRAWS
from minimoe.ops.sampling import reference as sampling
from minimoe.shapes import Array

# Relative to the largest logit. Two router logits of correct implementations may both be off by a bound, at worst 0.035
# in 16 bits: ROUTING is three times that, 6 bounds. TOKEN is 3 bounds, since the best of many tokens leads by less.
# EDGE is how far random numbers and top_p stay away from any change; sampling is compared in float32 and float64 only.
ROUTING, TOKEN, EDGE = 0.21, 0.15, 2.0**-9


def token_lead(logits: Array, temperature: float, top_p: float, uniform: Array) -> float:
    """Return how clear a choice of tokens is: the relative lead of the best, or whether all edges are far."""
    if temperature == 0:
        best = -np.sort(-logits, axis=-1)
        return float((best[:, 0] - best[:, 1]).min() / np.abs(logits).max())
    near = [
        sampling.forward(logits, temperature, top_p + p * EDGE, uniform + u * EDGE)
        for p, u in itertools.product((-1, 0, 1), repeat=2)
    ]
    return np.inf if all(np.array_equal(ids, near[0]) for ids in near) else 0.0


def decisions(spec: Spec) -> tuple[float, float, dict[str, Array]]:
    """Return the smallest lead, relative to the largest logit, of routing and of choices of tokens; and the outputs."""
    routing, tokens = [np.inf], [np.inf]
    ops = make_backend("numpy")

    def gate(*args: Any) -> Any:
        logits, ids, weights = ops.gating.forward(*args)
        lead = outputs.smallest_lead(logits, ids)
        if lead is not None and "ids" not in spec.inputs:
            routing.append(lead / max(np.abs(logits).max(), np.finfo(float).tiny))
        return logits, ids, weights

    def choose(*args: Any) -> Any:
        tokens.append(token_lead(*args))
        return ops.sampling.forward(*args)

    watched = _with(_with(ops, "gating", gate), "sampling", choose)
    inputs = cast(spec.call, spec.inputs, np.float64, np.float64)
    found = run(spec.call, watched, inputs, spec.settings, make.model(spec.model))
    return min(routing), min(tokens), found


def is_clear(spec: Spec) -> bool:
    """Whether no decision of a case hangs in the balance; exact ties are there to be decided by the pin."""
    routing, tokens, found = decisions(spec)
    if spec.id == "model.generate/stops":
        ended = (found["ids"] == 12).argmax(axis=1)
        if not (0 < ended[0] < 3 and (found["ids"][1] != 12).all()):
            return False
        if np.array_equal(found["ids"], _without_end(spec)):  # then nobody sees who goes on after the end
            return False
    return "ties" in spec.tags or (routing >= ROUTING and tokens >= TOKEN)


def search() -> None:
    """Print which draw of each text is the first that is clear, where that is not draw 0."""
    for name in dict.fromkeys(spec.text for room in (whole, training) for spec in room.specs()):
        assert name is not None
        for draw in itertools.count():
            DRAWS[name] = draw
            if all(is_clear(spec) for spec in reading(name)):
                break
        if draw:
            print(f'"{name}": {draw},', flush=True)


def reading(text: str) -> list[Spec]:
    """Return the cases that read a text, made with the draw that `DRAWS` gives now."""
    return [spec for room in (whole, training) for spec in room.specs() if spec.text == text]


def _without_end(spec: Spec) -> Array:
    """What the model of a case generates if nothing ends it."""
    model = make.model(spec.model)
    assert model is not None
    endless = GoldenModel(model.config.replace(eos_id=None), model.params)
    inputs = cast(spec.call, spec.inputs, np.float64, np.float64)
    return run(spec.call, make_backend("numpy"), inputs, spec.settings, endless)["ids"]


def _with(ops: Backend, room: str, forward: Any) -> Backend:
    functions = vars(getattr(ops, room)) | {"forward": forward}
    changed: dict[str, Any] = {room: SimpleNamespace(**functions)}
    return dataclasses.replace(ops, **changed)


if __name__ == "__main__":
    search()
