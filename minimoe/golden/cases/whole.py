"""Cases of the whole model: prefill, chunks through a rolling cache, generation."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.golden.cases.draw import EXACT, Draw, Spec
from minimoe.golden.cases.models import MODELS, profiles, tags
from minimoe.golden.cases.texts import text
from minimoe.shapes import Array


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [*_prefill(), *_inputs(), *_chunks(), *_generate()]


def _spec(name: str, why: str, source: str, size: tuple[int, int], *more: str, **inputs: Array) -> Spec:
    """A case that reads the text `source`, (B, T) = `size`."""
    model = source.partition("/")[0]
    given = {"tokens": text(source, *size)} | inputs
    return Spec(f"model/{name}", why, given, {}, model, tags(model, *more), profiles(model), source)


def _prefill() -> list[Spec]:
    """One case or more per model."""
    why = (
        "Two cases with the same inputs, this and model/repeat-{}, and a config that asks for router jitter: jitter or "
        "dropout left on outside of training gives two different answers."
    )
    return [
        _spec("main", "The whole model, with every intermediate of every layer in execution order. Begin here.",
              "base/main", (1, 8)),
        _spec("window", "Eight tokens under a window of 5: layer upon layer a token is reached from further back than "
              "one window, so a mask off by one in either direction grows with depth.",
              "window/main", (1, 8), "window"),
        _spec("square", "A model of square matrices, the embedding table and the output matrix among them: no missing "
              "transposition is stopped by a shape.", "square/main", (1, 7)),
        _spec("every-expert", "k = E, tied embeddings and a large eps. A model whose output matrix is not the "
              "embedding table here, or is it in model/main, has mixed up the two.", "all-experts/main", (1, 6)),
        _spec("dense", "No gate anywhere: Mistral's own model, with a window. What is wrong here too has nothing to do "
              "with experts.", "dense/main", (1, 7), "window"),
        _spec("bfloat16", "Weights stored in bfloat16, which are widened without loss: bytes read in the wrong order, "
              "or as float16, give nonsense.", "bfloat16/main", (1, 7)),
        _spec("digits", "Three layers with all of float32's digits: weights quietly rounded to 16 bits, or products "
              "in TF32, show as thousands of bounds.", "digits/main", (1, 6)),
        _spec("ties", "Every router decision of the second layer is an exact tie, in any arithmetic: experts 0 and 1 "
              "serve every token. A top-k that breaks ties otherwise shows here, and only here.",
              "ties/main", (1, 6), "ties"),
        _spec("gap", "Router logits up to 200 apart: softmax before top-k loses second choices in float32.",
              "gap/main", (1, 8), "gap"),
        _spec("repeat-a", why.format("b"), "jitter/main", (1, 8), "repeat"),
        _spec("repeat-b", why.format("a"), "jitter/main", (1, 8), "repeat"),
        _spec("one-token", "A prompt of one token: attention sees itself alone, and products have one row.",
              "base/one", (1, 1)),
        _spec("grok", "Grok-1 in small, all that it does otherwise at once, with every intermediate. Multipliers of "
              "embeddings and logits that are left out, exchanged or inverted show at both ends.",
              "grok/main", (1, 7)),
    ]  # fmt: skip


def _inputs() -> list[Spec]:
    """Batches, padding, positions, forced routing."""
    T = 7
    length = np.array([[4], [7], [2]])
    left, right = np.arange(T) >= T - length, np.arange(T) < length
    empty = np.array([[True] * 5, [False] * 5])
    far = 29_990 + np.array([[0, 1, 2, 3, 5, 8, 13]])
    d, c = Draw("model/forced"), MODELS["base"].config
    ids = np.stack([d.choices(6, c.num_experts_per_token, c.num_experts) for _ in range(c.num_layers)])
    return [
        _spec("batch", "Three sequences at once: each as if it were alone. Rows that mix, or share positions, show "
              "here.", "base/rows", (3, T), "batch"),
        _spec("padding-left", "Three sequences of 4, 7 and 2 tokens, padded on the left: positions count from each "
              "one's first token, and padding is neither attended nor routed. Rows of padding are not compared.",
              "base/rows", (3, T), "padding", "batch", mask=left),
        _spec("padding-right", "The same lengths padded on the right. Attended padding is invisible here, since "
              "causality hides it: compare with model/padding-left.",
              "base/rows", (3, T), "padding", "batch", mask=right),
        _spec("padding-empty-row", "One row is padding altogether: whatever becomes of it, its neighbour's numbers "
              "stay as they are.", "base/empty", (2, 5), "padding", "batch", mask=empty),
        _spec("far", "Positions near 30,000, with gaps: only differences matter to attention in exact arithmetic, but "
              "float32 angles are off by 1e-3 here.", "base/far", (1, T), "long", positions=far),
        _spec("far-theta-1e4", "The same positions with theta 1e4, and a window that counts positions, not tokens: "
              "the gaps take keys out of it early.", "window/far", (1, T), "long", "window",
              positions=far),
        _spec("forced", "The experts of every layer are given, and are not the router's own: with them imposed, any "
              "difference that is left is no matter of routing.", "base/forced", (1, 6), "forced",
              ids=ids),
    ]  # fmt: skip


def _chunks() -> list[Spec]:
    def spec(name: str, why: str, model: str, chunks: list[int], max_length: int, B: int = 1) -> Spec:
        source = f"{model}/chunks-{B}"
        window = () if MODELS[model].config.sliding_window is None else ("window",)
        return Spec(
            f"model.chunks/{name}", why, {"tokens": text(source, B, sum(chunks))},
            {"chunks": chunks, "max_length": max_length}, model, tags(model, "cache", *window), profiles(model), source,
        )  # fmt: skip

    return [
        spec("no-window", "A cache as long as the text, filled in chunks: the same numbers as in one piece. Positions "
             "go on where the last chunk ended; restarting them at 0 shows from the second chunk on.",
             "base", [3, 1, 4, 1], 16),
        spec("tokens", "One token at a time, with two sequences: decoding gives what prefill gives, for each row of "
             "the "
             "cache.", "base", [1] * 6, 6, B=2),
        spec("window-unfilled", "W - 1 = 4 tokens one by one into a cache of 5 slots: nothing has rolled yet.",
             "window", [1] * 4, 16),
        spec("window-full", "W = 5 tokens one by one: the cache is just full, and the last query sees all five.",
             "window", [1] * 5, 16),
        spec("window-rolls", "W + 1 = 6 tokens one by one: the last one overwrites the first one's slot.", "window",
             [1] * 6, 16),
        spec("wrapped", "Thirteen tokens one by one: the cache goes round more than twice.", "window", [1] * 13, 13),
        spec("mixed", "Chunks of 3, 1, 7 and 2 under a window of 5: one of them is longer than the cache. A chunk that "
             "is written before it is attended overwrites keys which its first queries still need.",
             "window", [3, 1, 7, 2], 16),
        spec("one-chunk", "A first chunk of 12, longer than the window, then single tokens from what is left of it.",
             "window", [12, 1, 1], 16),
        spec("short-cache", "max_length 4 is below the window of 5: a cache of 4 slots holds all there is.",
             "window", [2, 1, 1], 4),
        spec("exact-cache", "max_length = W = 5: chunks of 2 and 3 fill it, and nothing is overwritten.", "window",
             [2, 3], 5),
        spec("batch", "Two sequences in a rolling cache, chunks around the window's edge: 4, 5, 6 and 1.", "window",
             [4, 5, 6, 1], 16, B=2),
        spec("dense", "The dense model under its window of 4: the cache alone, with no routing in the way.", "dense",
             [5, 1, 3, 1], 12),
        spec("grok", "Grok-1 through a cache, chunks and single tokens: decoding caps and scales as the prefill does.",
             "grok", [3, 1, 2, 1], 16),
    ]  # fmt: skip


def _generate() -> list[Spec]:
    def spec(name: str, why: str, model: str, B: int, T: int, steps: int, *marks: str, **more: Any) -> Spec:
        source = f"{model}/{name}"
        inputs = {"tokens": text(source, B, T), "uniform": more.pop("uniform", np.zeros((steps, B)))}
        if "mask" in more:
            inputs["mask"] = more.pop("mask")
        settings = {"temperature": 0.0, "top_p": 1.0} | more
        known = profiles(model) if settings["temperature"] == 0 else EXACT
        return Spec(f"model.generate/{name}", why, inputs, settings, model, tags(model, *marks), known, text=source)

    mask = np.arange(5) >= 5 - np.array([[2], [5]])
    random = Draw("model.generate/uniform").uniform(4, 2, low=0.1, high=0.95)
    return [
        spec("greedy", "Greedy decoding: prompt, then one token at a time through the cache. At every step the best "
             "logit is clearly ahead of the second.", "base", 1, 4, 6),
        spec("rolling", "Greedy decoding past a window of 5: the prompt and the first tokens leave the cache.",
             "window", 1, 3, 8, "window"),
        spec("padded", "Prompts of 2 and 5 tokens, padded on the left: each goes on as if it were alone, at its own "
             "positions.", "base", 2, 5, 3, "padding", mask=mask),
        spec("padded-right", "Prompts of 2 and 5 tokens, padded on the right: the next token follows the last one "
             "that is real, not the last column.", "base", 2, 5, 3, "padding", mask=mask[:, ::-1]),
        spec("stops", "The first sequence produces the end-of-text token (id 12) and repeats it, although the "
             "model would go on with another; the second goes on.", "stops", 2, 3, 4),
        spec("sampled", "Temperature 0.75 with top_p 0.875: which token a random number draws is pinned, so sampling "
             "is comparable at all. No number lies near an edge of the distribution.",
             "base", 2, 3, 4, "sampled", temperature=0.75, top_p=0.875, uniform=random),
        spec("grok", "Grok-1 greedily, the cap in every decoding step.", "grok", 1, 4, 5),
    ]  # fmt: skip
