"""Cases of one block, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.golden.cases.draw import EXACT, Draw, Spec, coded
from minimoe.golden.cases.models import MODELS, profiles, tags
from minimoe.shapes import Array


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [*_forward(), *_backward()]


def _states(name: str, model: str, B: int, T: int) -> Array:
    """What a block may be handed: states that rank the experts clearly."""
    spec = MODELS[model]
    d, c = Draw(f"block/{name}", spec.grid), spec.config
    if c.dense:
        return d.normal(B, T, c.hidden_size)
    flat = coded(d, B * T, c.hidden_size, c.num_experts, c.num_experts_per_token)
    return flat.reshape(B, T, c.hidden_size)


def _forward() -> list[Spec]:
    def spec(name: str, why: str, model: str, T: int, *more: str, layer: int = 0, B: int = 1, **inputs: Any) -> Spec:
        x = {"x": _states(name, model, B, T)}
        return Spec(f"block/{name}", why, x | inputs, {"layer": layer}, model, tags(model, *more), profiles(model))

    left = np.array([[False, False, True, True, True], [True] * 5])
    far = 29_990 + np.arange(6)[None]
    return [
        spec("main", "Every intermediate of a block in execution order: the first that is off is nearest to the cause. "
             "The experts' residual is the stream after attention, not the block's input and not the normed state.",
             "base", 6),
        spec("second-layer", "The same with the second layer's weights: an implementation that reads layer 0's for "
             "all layers passes block/main only.", "base", 5, layer=1),
        spec("batch", "Two sequences: they must not see each other, and each counts its positions from 0.", "base", 4,
             B=2),
        spec("square", "All matrices are square: transpositions show in numbers alone.", "square", 5),
        spec("window", "T = W + 3 tokens, a single key/value head and k = 1: late queries have lost early keys.",
             "window", 8, "window"),
        spec("every-expert", "k = E with K = H, and an eps of 0.1 that acts in both norms.", "all-experts", 5),
        spec("dense", "A block without a gate: its one expert serves every token with weight 1.", "dense", 6,
             "window"),
        spec("padding", "Left padding beside a full row: padding is neither attended nor routed (ids -1), and real "
             "tokens get the numbers that they would get alone.", "base", 5, "padding", B=2, mask=left),
        spec("far", "Positions near 30,000: rotary angles in float32 are off by 1e-3 here.", "base", 6, "long",
             positions=far),
        spec("forced", "The experts are given, and are not those that the router would choose: what follows must use "
             "them, with weights from their own logits. Separates a wrong choice from wrong experts.",
             "base", 5, "forced", ids=np.array([[3, 1], [0, 2], [2, 3], [1, 0], [3, 2]])),
        spec("ties", "A gate of zeros: experts 0 and 1 serve every token with weight 1/2 each.", "ties", 4, "ties",
             layer=1),
        spec("gap", "Router logits up to 200 apart: the second choice must survive, although its weight does not.",
             "gap", 5, "gap"),
        spec("digits", "Weights and states with all of float32's digits: anything held in 16 bits leaves float32's "
             "bounds, at the first tensor that it touches.", "digits", 5),
        spec("grok", "Grok-1's block: what attention and the experts write is normed before it joins the stream, "
             "scores are capped, weights are shares of all experts. Norms of the sums, or none, differ from "
             "attention_post_norm on.", "grok", 6),
        spec("grok-padding", "The same with left padding beside a full row: what is written at padding is zero, and so "
             "is its norm.", "grok", 5, "padding", layer=1, B=2, mask=left),
    ]  # fmt: skip


def _backward() -> list[Spec]:
    def spec(name: str, why: str, model: str, T: int, layer: int, B: int = 1) -> Spec:
        d, c = Draw(f"block.backward/{name}"), MODELS[model].config
        ids = np.zeros((B * T, 1), np.int64)
        if not c.dense:
            ids = d.choices(B * T, c.num_experts_per_token, c.num_experts)
        x = _states(f"backward-{name}", model, B, T)
        inputs = {"x": x, "dout": d.normal(B, T, c.hidden_size), "ids": ids}
        return Spec(f"block.backward/{name}", why, inputs, {"layer": layer}, model, tags(model), EXACT)

    return [
        spec("main", "Gradients of the block's input and of all its weights. The stream's gradient passes both "
             "residual sums; the choice of experts is given, so no router can blur a wrong gradient.", "base", 5, 0),
        spec("batch", "Two sequences: weights collect from both, inputs do not mix.", "train-concatenated", 3, 1, B=2),
        spec("square", "Square matrices: a gradient of the transposed shape cannot be told by its shape.",
             "square", 4, 1),
        spec("window", "Gradients under a sliding window, one key/value head, k = 1: the gate's own gradient is zero "
             "without a balance loss.", "window", 7, 0),
        spec("dense", "A block without a gate, under a window: gradients of attention and of one expert, and no more.",
             "train-dense", 5, 0),
        spec("grok", "Four norms: the gradient of what attention and the experts wrote passes one more on its way, and "
             "each of the two has a gradient of its own.", "train-grok", 5, 1),
    ]  # fmt: skip
