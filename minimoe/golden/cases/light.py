"""Cases of the ops that treat every token alone: embedding, rmsnorm, linear, rope."""

from __future__ import annotations

import numpy as np

from minimoe.golden.cases.draw import EXACT, Draw, Spec


def specs() -> list[Spec]:
    """Return the cases of this file."""
    return [*_embedding(), *_rmsnorm(), *_rmsnorm_backward(), *_linear(), *_rope()]


def _embedding() -> list[Spec]:
    d, D = Draw("embedding"), 6
    tokens = np.array([0, 9, 3, 3, 9, 0, 7])
    return [
        Spec(
            "embedding/gather",
            "Rows are copied, not computed. The first and the last row of the table are asked for, and some twice, so "
            "ids shifted by one (a padding row in front, 1-based indices) give other rows.",
            {"tokens": tokens, "table": d.normal(10, D)},
        ),
        Spec(
            "embedding/square",
            "V = D: a table that was stored transposed passes every check of shapes and shows only in the numbers.",
            {"tokens": np.array([5, 0, 2, 4]), "table": d.normal(6, 6)},
        ),
        Spec(
            "embedding.backward/repeats",
            "A token that occurs several times collects the gradients of all its places; assigning instead of adding "
            "keeps only the last. Rows of tokens that do not occur are exactly zero.",
            {"tokens": tokens, "dx": d.normal(7, D)}, {"vocab_size": 10}, profiles=EXACT,
        ),
        Spec(
            "embedding.backward/one-token",
            "The whole batch is one token: all gradients meet in one row, the worst case for unordered additions.",
            {"tokens": np.full(5, 2), "dx": d.normal(5, 4)}, {"vocab_size": 4}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _rmsnorm() -> list[Spec]:
    d, N, D = Draw("rmsnorm"), 5, 10
    weight = d.uniform(D, low=0.5, high=1.5)
    zero_row = d.normal(3, 8)
    zero_row[1] = 0
    return [
        Spec(
            "rmsnorm/plain",
            "The norm's weight is unlike one in every element, and means are unlike zero: forgetting the weight, or "
            "subtracting the mean as LayerNorm does, shows at once.",
            {"x": d.round(d.normal(N, D) + 0.5), "weight": weight}, {"eps": 1e-5},
        ),
        Spec(
            "rmsnorm/eps-inside",
            "The inputs are so small that eps matters as much as they do. Inside the root it adds to the mean square; "
            "added outside, to the root itself, or left out, it gives clearly other numbers.",
            {"x": d.normal(N, D, scale=0.25), "weight": weight}, {"eps": 0.0625},
        ),
        Spec(
            "rmsnorm/large",
            "Squares of these numbers exceed 65504, the largest float16: the mean square has to be taken in float32, "
            "or the row becomes zero or infinite.",
            {"x": d.normal(N, D, scale=300.0), "weight": weight}, {"eps": 1e-5},
        ),
        Spec(
            "rmsnorm/zero-row",
            "A row of zeros is divided by sqrt(eps) and stays zero; without eps it is NaN, which then spreads.",
            {"x": zero_row, "weight": d.uniform(8, low=0.5, high=1.5)}, {"eps": 1e-5},
        ),
        Spec(
            "rmsnorm/residual",
            "The norm reads x + residual and hands that sum on as h. Norming x alone, or handing on y or x in the "
            "place of h, puts the residual stream wrong from here on.",
            {"x": d.normal(N, D), "weight": weight, "residual": d.normal(N, D)}, {"eps": 1e-5},
        ),
        Spec(
            "rmsnorm/digits",
            "Inputs with all of float32's digits: a cast to 16 bits anywhere inside is far outside float32's bound.",
            {name: Draw("rmsnorm/digits", grid=False).normal(*shape) for name, shape in
             {"x": (4, 13), "weight": (13,)}.items()},
            {"eps": 1e-6}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _rmsnorm_backward() -> list[Spec]:
    d, N, D = Draw("rmsnorm.backward"), 5, 10
    weight = d.uniform(D, low=0.5, high=1.5)
    return [
        Spec(
            "rmsnorm.backward/plain",
            "The root depends on every element of its row, so dx has a second term, the projection on x; without it dx "
            "is only the scaled dy. dweight adds up over tokens.",
            {"x": d.normal(N, D), "weight": weight, "dy": d.normal(N, D)}, {"eps": 1e-5}, profiles=EXACT,
        ),
        Spec(
            "rmsnorm.backward/residual",
            "What reaches h past the norm (dh) is added to what comes through it; dropping it cuts the residual "
            "stream's gradient, overwriting doubles the mistake.",
            {"x": d.normal(N, D), "weight": weight, "dy": d.normal(N, D), "residual": d.normal(N, D),
             "dh": d.normal(N, D)},
            {"eps": 1e-5}, profiles=EXACT,
        ),
        Spec(
            "rmsnorm.backward/eps",
            "With an eps as large as the mean square, a gradient that takes r for 1 / rms without eps is clearly off.",
            {"x": d.normal(N, D, scale=0.25), "weight": weight, "dy": d.normal(N, D)}, {"eps": 0.0625}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _linear() -> list[Spec]:
    d, digits = Draw("linear"), Draw("linear/digits", grid=False)
    wide, square = {"x": d.normal(5, 7), "w": d.normal(4, 7)}, {"x": d.normal(3, 6), "w": d.normal(6, 6)}
    return [
        Spec("linear/wide", "Weights are stored (out, in), and the product is x · wᵀ without a bias.", wide),
        Spec(
            "linear/square",
            "A square matrix: a weight that should have been transposed fits all the same, and gives other numbers.",
            square,
        ),
        Spec(
            "linear/one-token",
            "A single row, the shape of every product in decoding, where many implementations take another path.",
            {"x": d.normal(1, 17), "w": d.normal(3, 17)},
        ),
        Spec(
            "linear/digits",
            "Sums of 96 products of full float32 numbers: accumulating in 16 bits, or TF32 products on a GPU, leave "
            "float32's bound by a factor of a hundred or more.",
            {"x": digits.normal(3, 96), "w": digits.normal(5, 96)}, profiles=EXACT,
        ),
        Spec(
            "linear.backward/wide",
            "dx = dy · w and dw = dyᵀ · x, summed over tokens and not averaged.",
            {**wide, "dy": d.normal(5, 4)}, profiles=EXACT,
        ),
        Spec(
            "linear.backward/square",
            "All three matrices could be transposed without an error of shape: dw against dwᵀ, w against wᵀ.",
            {**square, "dy": d.normal(3, 6)}, profiles=EXACT,
        ),
    ]  # fmt: skip


def _rope() -> list[Spec]:
    d, N, H, C = Draw("rope"), 6, 2, 8
    far = np.array([29_990, 29_999, 30_000, 30_001, 31_234, 32_767])
    near = np.arange(N)
    return [
        Spec(
            "rope/half-split",
            "Element i is paired with element i + C/2, as in Hugging Face's checkpoints. Pairing neighbours (2i, "
            "2i + 1), as Mistral's own files do, gives the same norms but other elements from position 1 on.",
            {"x": d.normal(N, H, C), "positions": near}, {"theta": 1e4},
        ),
        Spec(
            "rope/theta-1e6",
            "Mixtral's base is 1e6; with the older 1e4 (or a default that nobody set) all pairs but the first turn too "
            "fast. The next case has 1e4, so one that passes only one of them has a base built in.",
            {"x": d.normal(N, H, C), "positions": near + 40}, {"theta": 1e6},
        ),
        Spec(
            "rope/theta-1e4",
            "Mistral 7B's base 1e4 at the same positions: see rope/theta-1e6.",
            {"x": d.normal(N, H, C), "positions": near + 40}, {"theta": 1e4},
        ),
        Spec(
            "rope/far",
            "Near position 30,000 an angle taken in float32 is off by about 1e-3: angles belong in float64, and cos "
            "and sin are rounded once. In 16-bit positions even the integers are not representable any more.",
            {"x": d.normal(N, H, C), "positions": far}, {"theta": 1e6}, tags=("long",),
        ),
        Spec(
            "rope/scattered",
            "Positions that neither start at 0 nor rise: they belong to the tokens, and are not counted from the row "
            "number. Position 0 leaves its token as it is.",
            {"x": d.normal(5, 3, 6), "positions": np.array([7, 0, 100, 3, 3])}, {"theta": 1e4},
        ),
        Spec(
            "rope/one-pair",
            "C = 2: a single pair turns by exactly one radian per position, whatever theta is. It separates a wrong "
            "sense of rotation from a wrong frequency.",
            {"x": d.normal(4, 1, 2), "positions": np.arange(1, 5)}, {"theta": 1e6},
        ),
        Spec(
            "rope.backward/plain",
            "The gradient is turned back by the same angle; turning it forward again is the common mistake.",
            {"dy": d.normal(N, H, C), "positions": near + 3}, {"theta": 1e4}, profiles=EXACT,
        ),
        Spec(
            "rope.backward/far",
            "Turning back far out: only the same float64 angles as in the forward undo it.",
            {"dy": d.normal(N, H, C), "positions": far}, {"theta": 1e6}, tags=("long",), profiles=EXACT,
        ),
    ]  # fmt: skip
