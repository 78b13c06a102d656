"""Mistakes in the light ops: norms, embedding, cross-entropy, AdamW, sampling."""

from __future__ import annotations

from minimoe.golden.mutants.mutant import Mutant
from minimoe.golden.mutants.planting import Edit, room

_R = "r = 1 / xp.sqrt((h * h).mean(axis=-1) + eps)"
_Y = "y = h * r[:, None] * widen(weight)"
_DX = "dx = r[:, None] * (dnormed - normed * (dnormed * normed).mean(axis=-1, keepdims=True))"
_DW, _DN = "dweight = (dy * normed).sum(axis=0)", "dnormed = dy * widen(weight)"
_NORM = "x · rsqrt(mean(x²) + eps) · weight"


def _norm(
    name: str, says: str, remedy: str, *edits: tuple[str, str], seen: str = "", profiles: tuple[str, ...] = (),
    harmless: str = "",
) -> Mutant:  # fmt: skip
    changes = tuple(room("rmsnorm", *edit) for edit in edits)
    return Mutant(name, says, remedy, "op", changes, seen=seen, profiles=profiles, harmless=harmless)


NORM = [
    _norm(
        "eps-outside-the-root",
        "eps is added to the root of the mean square instead of to the mean square",
        _NORM + ": eps stands inside the root",
        (_R, "r = 1 / (xp.sqrt((h * h).mean(axis=-1)) + eps)"),
        (_DX, "rms = xp_of(h).maximum(xp_of(h).sqrt((h * h).mean(axis=-1, keepdims=True)), 1e-300)\n"
         "    dx = r[:, None] * dnormed - normed * (dnormed * normed).mean(axis=-1, keepdims=True) / rms"),
    ),
    _norm(
        "eps-forgotten",
        "eps is not added at all",
        _NORM,
        (_R, _R.replace(" + eps", "")),
    ),
    _norm(
        "norm-weight-missing",
        "the norm's weight is not applied",
        _NORM,
        (_Y, "y = h * r[:, None]"), (_DW, "dweight = 0 * weight"), (_DN, "dnormed = dy"),
    ),
    _norm(
        "norm-weight-plus-one",
        "the normed states are multiplied by 1 + weight",
        _NORM + ": the weight as it is stored",
        (_Y, "y = h * r[:, None] * (1 + widen(weight))"), (_DN, "dnormed = dy * (1 + widen(weight))"),
        seen="Gemma means it so",
    ),
    _norm(
        "mean-subtracted",
        "the mean is subtracted first, as LayerNorm does",
        _NORM + ": no mean is subtracted",
        (_R, "h, whole = h - h.mean(axis=-1, keepdims=True), h\n    " + _R),
        (_Y, f"{_Y}\n    h = whole"),
        ("normed = h * r[:, None]\n", "normed = (h - h.mean(axis=-1, keepdims=True)) * r[:, None]\n"),
        (_DX, _DX.replace("(dnormed - ", "(dnormed - dnormed.mean(axis=-1, keepdims=True) - ")),
    ),
    _norm(
        "sum-of-squares-instead-of-mean",
        "squares are added instead of averaged: states are divided by their length",
        _NORM,
        (_R, _R.replace("mean", "sum")), (_DX, _DX.replace("mean", "sum")),
    ),
    _norm(
        "norm-weight-inside-the-statistics",
        "states are multiplied by the weight before their mean square is taken",
        _NORM + ": the weight multiplies what has been normed",
        (_R, "h, whole = h * widen(weight), h\n    " + _R),
        (_Y, "y = h * r[:, None]\n    h = whole"),
        ("normed = h * r[:, None]\n", "normed = h * widen(weight) * r[:, None]\n"),
        (_DN, "dnormed = dy"),
        (_DX, "dg = " + _DX[5:] + "\n    dx, dweight = dg * widen(weight), (dg * h).sum(axis=0)"),
    ),
    _norm(
        "norm-statistics-in-float16",
        "squares are taken in float16, where those of numbers above 255 are infinite",
        "take the mean square in float32",
        (_R, _R.replace("(h * h)", "(h * h).astype(xp.float16).astype(h.dtype)")),
        profiles=("float16",),
    ),
    _norm(
        "norm-rounded-before-its-weight",
        "the normed states are rounded to bfloat16 before they are multiplied by the weight",
        "multiply in float32; in this profile the norm's output is not rounded at all",
        (_Y, "y = (h * r[:, None]).astype(BFLOAT16).astype(h.dtype) * widen(weight)"),
        ("from minimoe.arrays import", "from minimoe.arrays import BFLOAT16,"),
        seen="transformers, whose profile is hf_bfloat16", profiles=("bfloat16", "float32"),
    ),
    _norm(
        "norm-weight-before-the-cast",
        "the norm's weight is multiplied in before the result is rounded to 16 bits, instead of after it",
        "to match Hugging Face bit by bit, round the normed states first, then multiply by the weight",
        (_Y, "y = (h * r[:, None] * widen(weight)).astype(BFLOAT16).astype(h.dtype)"),
        ("from minimoe.arrays import", "from minimoe.arrays import BFLOAT16,"),
        seen="implementations that fuse the weight into the norm", profiles=("hf_bfloat16", "mistral_bfloat16"),
        harmless="one rounding less than the profile's own: it is nearer to the truth",
    ),
    _norm(
        "norm-gradient-without-projection",
        "the gradient of the norm lacks its second term: the root depends on every element",
        "dx = r · (dnormed - normed · mean(dnormed · normed))",
        (_DX, "dx = r[:, None] * dnormed"),
    ),
    _norm(
        "residual-gradient-dropped",
        "what reaches the stream past the norm is not added to its gradient",
        "add the residual's gradient to the norm's",
        ("(dx if dh is None else dx + dh)", "dx"),
    ),
]  # fmt: skip
EMBEDDING = [
    Mutant(
        "embeddings-scaled",
        "embeddings are multiplied by sqrt(D)",
        "take the rows of the table as they are",
        "op",
        (
            room("embedding", "return widen(table[tokens])", "return widen(table[tokens]) * table.shape[1] ** 0.5"),
            room("embedding", "xp.add.at(dtable, tokens, dx)", "xp.add.at(dtable, tokens, dx * D**0.5)"),
        ),
        seen="Gemma means it so",
    ),
    Mutant(
        "embedding-gradient-overwritten",
        "a token that occurs several times keeps the gradient of its last place only",
        "add the gradients of all its places",
        "op",
        (room("embedding", "xp.add.at(dtable, tokens, dx)", "dtable[tokens] = dx"),),
    ),
]
_COUNT = "max(int(counted.sum()), 1)"
_SHIFT = "targets[:, :-1] = np.where(both, inputs.tokens[:, 1:], -1)"
CROSS_ENTROPY = [
    Mutant(
        "cross-entropy-over-padding",
        "the sum of the losses is divided by all positions, those without a target among them",
        "divide by the number of targets",
        "op",
        (
            room("cross_entropy", f"return float(losses.sum(dtype=xp.float64) / {_COUNT})",
                 "return float(losses.sum(dtype=xp.float64) / targets.size)"),
            room("cross_entropy", f"(dloss / {_COUNT})", "(dloss / targets.size)"),
        ),
    ),
    Mutant(
        "cross-entropy-summed",
        "losses are added instead of averaged",
        "divide by the number of targets",
        "op",
        (
            room("cross_entropy", f"return float(losses.sum(dtype=xp.float64) / {_COUNT})",
                 "return float(losses.sum(dtype=xp.float64))"),
            room("cross_entropy", f"(dloss / {_COUNT})", "(dloss)"),
        ),
    ),
    Mutant(
        "cross-entropy-in-bits",
        "losses are in bits",
        "the natural logarithm: nats",
        "op",
        (
            room("cross_entropy", "lse - target_logits, 0)", "(lse - target_logits) * 1.4426950408889634, 0)"),
            room("cross_entropy", f"(dloss / {_COUNT})", f"(1.4426950408889634 * dloss / {_COUNT})"),
        ),
    ),
    Mutant(
        "cross-entropy-overflows",
        "exp is taken without subtracting the maximum, and overflows float32 above 88",
        "subtract each row's largest logit before exp",
        "op",
        (
            room("cross_entropy", "    top = logits.max(axis=-1, keepdims=True)\n",
                 "    top = xp.zeros_like(logits[:, :1])\n    logits = logits.astype(xp.float32)\n"),
        ),
    ),
    Mutant(
        "targets-not-shifted",
        "every position is to predict its own token",
        "the target of position t is token t + 1",
        "block",
        (Edit("inputs", _SHIFT, _SHIFT.replace("1:]", ":-1]")),),
    ),
    Mutant(
        "padding-is-a-target",
        "padding is predicted, and predicts",
        "a token is a target where it and its predecessor are unmasked",
        "block",
        (Edit("inputs", "both = inputs.mask[:, :-1] & inputs.mask[:, 1:]", "both = True"),),
    ),
    Mutant(
        "tied-gradient-of-one-use",
        "the tied table has the gradient of its use as embedding only",
        "add the gradients of both uses",
        "block",
        (Edit("mixtral", "dtable, dhead = dtable + dhead, None", "dtable, dhead = dtable, None"),),
    ),
]  # fmt: skip


def _adamw(name: str, says: str, remedy: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, says, remedy, "op", tuple(room("adamw", *edit) for edit in edits))


_STEP = "w[...] = w - lr * weight_decay * w - lr * m_hat / (xp.sqrt(v_hat) + eps)"
ADAMW = [
    _adamw("adam-decay-in-the-gradient", "weight decay is added to the gradient, as Adam with L2 does",
           "shrink w by lr · weight_decay · w beside the step: decoupled",
           ("g = g * scale", "g = g * scale + weight_decay * w"),
           (_STEP, _STEP.replace(" - lr * weight_decay * w", ""))),
    _adamw("adam-decay-without-lr", "weight decay is not multiplied by the learning rate",
           "shrink w by lr · weight_decay · w", (_STEP, _STEP.replace("lr * weight_decay", "weight_decay"))),
    _adamw("adam-bias-uncorrected", "the moments are not corrected for their start at zero",
           "divide m by 1 - beta1^step and v by 1 - beta2^step",
           ("m_hat = m / (1 - beta1**step)", "m_hat = m"), ("v_hat = v / (1 - beta2**step)", "v_hat = v")),
    _adamw("adam-step-from-zero", "steps are counted from 0 in the bias correction: one power too few",
           "the first step is step 1",
           ("m_hat = m / (1 - beta1**step)", "m_hat = m / (1 - beta1 ** (step - 1))"),
           ("v_hat = v / (1 - beta2**step)", "v_hat = v / (1 - beta2 ** (step - 1))")),
    _adamw("adam-eps-inside-the-root", "eps is added to v inside the root",
           "sqrt(v_hat) + eps", (_STEP, _STEP.replace("(xp.sqrt(v_hat) + eps)", "xp.sqrt(v_hat + eps)"))),
    _adamw("adam-eps-before-correction", "eps is added to the root before the bias correction of v",
           "correct v, then take its root, then add eps",
           (_STEP, _STEP.replace("(xp.sqrt(v_hat) + eps)",
                                 "((xp.sqrt(v) + eps) / xp.sqrt(1 - beta2**step))"))),
    _adamw("gradient-unclipped", "the scale of clipping is not applied to the gradient",
           "multiply every gradient by min(1, clip / norm of all gradients)", ("g = g * scale", "g = g * 1.0")),
    Mutant("norms-decayed", "weight decay shrinks the norms' weights, too", "decay matrices only", "block",
           (Edit("golden.calls", "weight_decay=weight_decay if w.ndim > 1 else 0.0", "weight_decay=weight_decay"),)),
]  # fmt: skip


def _sampling(name: str, says: str, remedy: str, right: str, wrong: str) -> Mutant:
    return Mutant(name, says, remedy, "op", (room("sampling", right, wrong),))


_SIZE = "xp.minimum((mass < top_p).sum(axis=-1), mass.shape[1] - 1) + 1"
SAMPLING = [
    _sampling("top-p-excludes-the-crossing-token", "the token whose probability carries the mass past top_p is cut off",
              "keep the smallest set whose mass reaches top_p", _SIZE,
              "xp.maximum((mass <= top_p).sum(axis=-1), 1)"),
    _sampling("top-p-takes-one-more", "the nucleus takes one token more when it reaches top_p exactly",
              "keep the smallest set whose mass reaches top_p", "(mass < top_p)", "(mass <= top_p)"),
    _sampling("nucleus-not-renormalised", "the random number is held against the mass of the whole distribution",
              "scale it to the mass of the nucleus", "uniform[:, None] * total", "uniform[:, None]"),
    _sampling("greedy-ties-to-the-highest-id", "of equal largest logits the highest id is taken",
              "temperature 0 takes the first of equals", "return logits.argmax(axis=-1)",
              "return logits.shape[-1] - 1 - logits[:, ::-1].argmax(axis=-1)"),
    _sampling("temperature-multiplied", "logits are multiplied by the temperature",
              "divide by it", "/ temperature", "* temperature"),
    _sampling("sampling-in-order-of-ids", "the random number runs through the tokens in order of their ids",
              "run through them in order of falling probability",
              'order = xp.argsort(-probs, axis=-1, kind="stable")',
              "order = xp.argsort(0 * probs, axis=-1, kind='stable')"),
]  # fmt: skip
MUTANTS = [*NORM, *EMBEDDING, *CROSS_ENTROPY, *ADAMW, *SAMPLING]
