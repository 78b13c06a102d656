"""Cases of one training step."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.golden.cases.draw import EXACT, Spec
from minimoe.golden.cases.models import tags
from minimoe.golden.cases.texts import text

_ROWS = "train-concatenated/rows"  # the models that differ in their balance loss alone read the same


def specs() -> list[Spec]:
    """Return the cases of this file."""
    plain = {"lr": 0.0625, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.125, "clip": 1.0}

    def spec(name: str, why: str, model: str, source: str, B: int, T: int, *marks: str, **more: Any) -> Spec:
        inputs = {"tokens": text(source, B, T)} | {key: more.pop(key) for key in ("mask", "ids") if key in more}
        return Spec(f"training/{name}", why, inputs, plain | more, model, tags(model, *marks), EXACT, text=source)

    mask = np.array([[False, True, True, True, True], [True, True, True, False, False]])
    ids = np.array([[[2, 0], [1, 2], [0, 1], [2, 1], [1, 0]], [[0, 1], [2, 1], [1, 0], [0, 2], [2, 0]]])
    return [
        spec("concatenated", "One whole step: cross-entropy, Hugging Face's balance loss, every gradient, clipping by "
             "the norm of all of them, AdamW. eps is 1e-3, so that the step from zero moments is well conditioned; "
             "norms are not decayed.", "train-concatenated", _ROWS, 2, 5),
        spec("per-layer", "The same weights and tokens as in training/concatenated, but the balance loss is taken per "
             "layer: its value, and the gradients of the gates, differ.", "train-per-layer", _ROWS, 2, 5),
        spec("switch", "The same once more with the balance loss of Switch, over first choices only.",
             "train-switch", _ROWS, 2, 5),
        spec("padding", "Left and right padding: a token is a target only where it and its predecessor are real, and "
             "padding counts in no mean, no balance and no gradient.",
             "train-concatenated", _ROWS, 2, 5, "padding", mask=mask),
        spec("unclipped", "A limit that the norm does not reach: gradients must not be scaled up to it.",
             "train-concatenated", "train-concatenated/one", 1, 6, clip=1024.0),
        spec("forced", "The experts are given: the gradients of exactly these, whatever a router would choose.",
             "train-concatenated", "train-concatenated/one", 1, 5, "forced", ids=ids),
        spec("tied", "Tied embeddings: the table has one gradient from the input and one from the output, added "
             "before the norm is taken and the step is made. k = 1.", "train-tied", "train-tied/rows", 2, 4),
        spec("dense", "A step without a gate: the balance loss is 0, and every expert gradient comes from every token.",
             "train-dense", "train-dense/rows", 2, 5, "window"),
        spec("grok", "A step of Grok-1, with padding: the gradient of the logits is multiplied on its way back, and so "
             "is that of the embeddings; the cap has a slope, and unchosen experts' logits have a gradient.",
             "train-grok", "train-grok/rows", 2, 5, "padding", mask=mask),
    ]  # fmt: skip
