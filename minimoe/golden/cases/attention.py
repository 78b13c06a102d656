"""Cases of attention and of the rolling key/value cache."""

from __future__ import annotations

import numpy as np

from minimoe.golden.cases.draw import EXACT, GROK, OURS, Draw, Spec
from minimoe.shapes import Array


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [*_attention(), *_windows(), *_capped(), *_backward(), *_backward_capped(), *_kv_cache()]


def _inputs(d: Draw, H: int, K: int, C: int, q_pos: Array, k_pos: Array, scale: float = 1.0) -> dict[str, Array]:
    q_pos, k_pos = np.atleast_2d(q_pos), np.atleast_2d(k_pos)
    (B, T), S = q_pos.shape, k_pos.shape[1]
    return {
        "q": d.normal(B, T, H, C, scale=scale), "k": d.normal(B, S, K, C), "v": d.normal(B, S, K, C),
        "q_pos": q_pos, "k_pos": k_pos,
    }  # fmt: skip


def _attention() -> list[Spec]:
    d, five = Draw("attention"), np.arange(5)
    padded = np.array([[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1]])
    rolled = np.array([[8, 9, 5, 6, 7], [4, 0, 1, 2, 3], [-1, -1, 2, 0, 1]])
    return [
        Spec(
            "attention/grouped",
            "Four query heads over two key/value heads: head h reads key/value head h // 2. Tiling the heads (h mod 2) "
            "has the same shapes and wrong numbers. Query scores are spread, so a missing 1/√C shows too.",
            _inputs(d, 4, 2, 6, five, five, 2.0), {"window": None},
        ),
        Spec(
            "attention/multi-head",
            "K = H: every query head has its own keys, the case in which both ways of repeating heads agree.",
            _inputs(d, 3, 3, 4, five, five), {"window": None},
        ),
        Spec(
            "attention/multi-query",
            "K = 1: all heads read the same keys and values; code that takes K from H, or repeats heads wrongly, "
            "fails here.",
            _inputs(d, 3, 1, 4, five, five), {"window": None},
        ),
        Spec(
            "attention/decode",
            "One query against eight keys, the shape of decoding: a causal mask built from row numbers (query 0 sees "
            "only key 0) instead of positions hides all the past.",
            _inputs(d, 4, 2, 4, np.array([7]), np.arange(8)), {"window": None}, tags=("cache",),
        ),
        Spec(
            "attention/padding",
            "Left padding in the first row, right padding in the second: keys of position -1 are never seen, and a "
            "query of position -1 sees nothing and is exactly zero, not NaN and not the mean of the values.",
            _inputs(d, 2, 1, 4, padded, padded), {"window": None}, tags=("padding",),
        ),
        Spec(
            "attention/nothing-visible",
            "Queries older than every key, and a cache whose slots are all empty: a row of the softmax without any "
            "entry. The pinned answer is zeros.",
            _inputs(d, 2, 2, 4, np.array([[0, 4], [3, 5]]), np.array([[2, 3, 9], [-1, -1, -1]])), {"window": None},
            tags=("padding",),
        ),
        Spec(
            "attention/rolled-slots",
            "Keys stand in the order of a rolled cache's slots, some of them empty: what a query sees follows from "
            "positions, not from where a key stands.",
            _inputs(d, 4, 2, 4, np.array([[9], [4], [2]]), rolled), {"window": 5}, tags=("cache", "window"),
        ),
        _large(),
        _larger(),
        Spec(
            "attention/digits",
            "Full float32 numbers: operands rounded to 16 bits, or float32 products done in TF32, leave the bound.",
            _inputs(Draw("attention/digits", grid=False), 4, 2, 8, five, five, 2.0), {"window": None}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _large() -> Spec:
    """Scores that are exact in every format and at least 32 apart: their softmax is one-hot to the last digit."""
    d = Draw("attention/large-scores")
    q, k = np.zeros((1, 4, 2, 4)), np.zeros((1, 4, 1, 4))
    q[..., 0], q[..., 1] = 32, np.array([1, -1])
    k[0, :, 0, 0] = [4, -4, 12, 24]  # scores 64, -64, 192, 384
    k[0, :, 0, 1] = [32, 64, -32, 16]  # and 16, 32, -16, 8 more, or less in the second head
    return Spec(
        "attention/large-scores",
        "Scores of some hundred, as trained models have them: exp(300) overflows float32 and exp(12) float16 unless "
        "the maximum is subtracted first. The last query also shows a score that must not be scaled after the softmax.",
        {"q": q, "k": k, "v": d.normal(1, 4, 1, 4), "q_pos": np.arange(4)[None], "k_pos": np.arange(4)[None]},
        {"window": None}, tags=("overflow",),
    )  # fmt: skip


def _larger() -> Spec:
    """Products that float16 cannot hold, of which the scores, a quarter of them, are exact again."""
    d = Draw("attention/product-overflow")
    q = np.broadcast_to(np.array([64.0, -64.0])[:, None], (1, 4, 2, 16)).copy()
    k = np.broadcast_to(np.array([16.0, 64.0, 32.0, -64.0])[:, None, None], (4, 1, 16))[None].copy()
    return Spec(
        "attention/product-overflow",
        "q · k reaches 65536, just beyond float16's 65504, and with C = 16 the score is a quarter of that: scaling "
        "after a product that was rounded to float16 is too late. Scale the queries first, or accumulate in float32.",
        {"q": q, "k": k, "v": d.normal(1, 4, 1, 16), "q_pos": np.arange(4)[None], "k_pos": np.arange(4)[None]},
        {"window": None}, tags=("overflow",),
    )  # fmt: skip


def _windows() -> list[Spec]:
    d = Draw("attention/windows")
    q_pos = np.array([[6, 7, 8]])
    found = [
        Spec(
            f"attention/window-{name}",
            f"W = 4 over T = {T} tokens. {says}",
            _inputs(d, 2, 1, 4, np.arange(T), np.arange(T)), {"window": 4}, tags=("window",),
        )
        for name, T, says in (
            ("unfilled", 3, "T = W - 1: the window hides nothing yet, and must not."),
            ("full", 4, "T = W: the last query still sees the first key; a window of W - 1 keys hides it."),
            ("slides", 5, "T = W + 1: the first key has just left the last query's window of W keys, itself included; "
             "a window of W + 1 keys still sees it."),
            ("long", 9, "Most queries have lost keys: off by one either way shows in every late row."),
        )
    ]  # fmt: skip
    return [
        *found,
        Spec(
            "attention/window-one",
            "W = 1: every query sees itself alone, and the output is v itself.",
            _inputs(d, 2, 2, 4, np.arange(4), np.arange(4)),
            {"window": 1},
            tags=("window",),
        ),
        Spec(
            "attention/chunk-over-cache",
            "A chunk of three tokens attends to a cache of W = 4 slots *and* to itself, before it is written: its "
            "first query still needs position 3, which the chunk's last token is going to overwrite.",
            _inputs(d, 4, 2, 4, q_pos, np.array([[4, 5, 2, 3, 6, 7, 8]])),
            {"window": 4},
            tags=("cache", "window"),
        ),
    ]


def _capped() -> list[Spec]:
    """Grok-1's scores: a scale that is given, and a cap that most of them exceed, several times over."""
    d, five = Draw("attention/cap"), np.arange(5)
    padded = np.array([[-1, -1, 0, 1, 2], [0, 1, 2, 3, -1]])

    def spec(name: str, why: str, inputs: dict[str, Array], *tags: str, **settings: float | None) -> Spec:
        return Spec(
            f"attention/{name}", why, inputs, {"window": None} | settings, tags=(GROK, *tags), profiles=OURS
        )  # fmt: skip

    return [
        spec(
            "scale",
            "The scores' factor is given, 0.75, and is not 1/√C = 0.41: it stands in its place, not beside it.",
            _inputs(d, 4, 2, 6, five, five), scale=0.75,
        ),
        spec(
            "cap",
            "Scores of up to ten are bounded by cap · tanh(score / cap), cap = 2.5, and scaled by 1/√C before. Without "
            "the cap, with a cap that clips, or with tanh that is not multiplied again, all late rows differ.",
            _inputs(d, 4, 2, 6, five, five, 4.0), cap=2.5,
        ),
        spec(
            "scale-and-cap",
            "Scaled first, capped then: the other order bounds the scores by scale · cap.",
            _inputs(d, 2, 1, 4, five, five, 2.0), scale=1.25, cap=3.0,
        ),
        spec(
            "cap-decode",
            "One query against eight keys, the shape of decoding, where kernels often take another path: it caps too.",
            _inputs(d, 4, 2, 4, np.array([7]), np.arange(8), 4.0), "cache", scale=0.625, cap=2.0,
        ),
        spec(
            "cap-window",
            "A cap of 0.5 under a window of 3: what is invisible is -inf after the cap. Masked first, it is capped to "
            "-0.5, and every key is seen a little.",
            _inputs(d, 2, 1, 4, np.arange(7), np.arange(7), 2.0), "window", window=3, cap=0.5,
        ),
        spec(
            "cap-padding",
            "Padding on either side: its keys are not capped to something that counts, and a query of position -1 is "
            "exactly zero.",
            _inputs(d, 2, 2, 4, padded, padded, 2.0), "padding", cap=1.0,
        ),
    ]  # fmt: skip


def _backward_capped() -> list[Spec]:
    d, six = Draw("attention.backward/cap"), np.arange(6)

    def spec(name: str, why: str, inputs: dict[str, Array], *tags: str, **settings: float | None) -> Spec:
        given = inputs | {"dout": d.normal(*inputs["q"].shape)}
        return Spec(f"attention.backward/{name}", why, given, {"window": None} | settings, None, (GROK, *tags), EXACT)

    return [
        spec(
            "cap",
            "The cap has a slope, 1 - tanh², which is near 0 where a score is far beyond it; the given scale stands in "
            "dq and in dk.",
            _inputs(d, 4, 2, 6, six, six, 2.0), scale=0.75, cap=2.5,
        ),
        spec(
            "cap-window",
            "Capped and under a window: keys outside of it still get exactly nothing.",
            _inputs(d, 2, 1, 4, six, six, 2.0), "window", window=3, cap=1.0,
        ),
    ]  # fmt: skip


def _backward() -> list[Spec]:
    d = Draw("attention.backward")
    padded = np.array([[-1, 0, 1, 2, 3], [0, 1, 2, -1, -1]])

    def spec(name: str, why: str, window: int | None, inputs: dict[str, Array], *tags: str) -> Spec:
        dout = d.normal(*inputs["q"].shape)
        return Spec(f"attention.backward/{name}", why, inputs | {"dout": dout}, {"window": window}, None, tags, EXACT)

    return [
        spec(
            "grouped",
            "Key/value heads collect the gradients of all the query heads that read them; the softmax's gradient "
            "subtracts Σ probs · dprobs; the scale 1/√C stands in dq and in dk.",
            None, _inputs(d, 4, 2, 6, np.arange(5), np.arange(5)),
        ),
        spec(
            "window",
            "Keys outside of the window get exactly nothing from a query that cannot see them.",
            3, _inputs(d, 2, 1, 4, np.arange(6), np.arange(6)), "window",
        ),
        spec(
            "padding",
            "Queries and keys of position -1 have zero gradients, also those of queries that see no key at all.",
            None, _inputs(d, 4, 2, 4, padded, padded), "padding",
        ),
    ]  # fmt: skip


def _cache(d: Draw, held: list[list[int]], new: list[list[int]], K: int = 2, C: int = 4) -> dict[str, Array]:
    """A cache whose slots hold the positions `held`, and tokens at the positions `new` to write."""
    cache_positions, positions = np.array(held), np.array(new)
    full = (cache_positions >= 0)[..., None, None]
    shape, written = (*cache_positions.shape, K, C), (*positions.shape, K, C)
    return {
        "k_cache": np.where(full, d.normal(*shape), 0.0), "v_cache": np.where(full, d.normal(*shape), 0.0),
        "cache_positions": cache_positions, "k": d.normal(*written), "v": d.normal(*written), "positions": positions,
    }  # fmt: skip


def _kv_cache() -> list[Spec]:
    d = Draw("kv_cache")
    cases = [
        ("empty", "Three tokens into an empty cache of five slots; the slots behind them stay empty (position -1).",
         _cache(d, [[-1] * 5], [[0, 1, 2]])),
        ("wraps", "Position 5 goes to slot 0 of five, where position 0 was: the slot is position mod R, so an offset "
         "by one, or a cache that shifts instead of rolling, puts keys elsewhere.",
         _cache(d, [[0, 1, 2, 3, 4]], [[5, 6]])),
        ("decode", "One token per sequence, each at its own position and so in its own slot.",
         _cache(d, [[0, 1, 2, -1], [4, 5, 2, 3], [-1, -1, -1, -1]], [[3], [6], [0]])),
        ("longer-than-cache", "A chunk of seven into four slots: only its last four positions stay. Writing all in "
         "some order leaves whatever came last in each slot.",
         _cache(d, [[0, 1, -1, -1]], [[2, 3, 4, 5, 6, 7, 8]])),
        ("padding", "Padding (position -1) is not written: -1 mod R would be the last slot, and its key would be "
         "overwritten by nothing.", _cache(d, [[-1] * 4, [0, 1, 2, 3]], [[-1, -1, 0, 1], [4, 5, -1, -1]])),
        ("one-slot", "R = 1, a window of one key: every token replaces the one before.",
         _cache(d, [[3], [-1]], [[4, 5], [0, 1]])),
        ("far", "Positions far out in a cache of six slots: 32,767 mod 6 = 1.",
         _cache(d, [[32_766, 32_761, 32_762, 32_763, 32_764, 32_765]], [[32_767, 32_768]])),
    ]  # fmt: skip
    return [Spec(f"kv_cache/{name}", why, inputs, tags=("cache",)) for name, why, inputs in cases]
