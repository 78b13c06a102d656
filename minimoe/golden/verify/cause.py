"""Which step is wrong itself, and which only follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .kit import Case
from .results import TensorResult

_READS = {
    "attention_norm": "x", "attention.q": "attention_norm", "attention.k": "attention_norm",
    "attention.v": "attention_norm", "attention.q_rotated": "attention.q", "attention.k_rotated": "attention.k",
    "attention.scores": "attention.q_rotated attention.k_rotated", "attention.probs": "attention.scores",
    "attention.context": "attention.probs attention.v", "attention.out": "attention.context",
    "attention_residual": "x attention.out", "ffn_norm": "attention_residual", "gating.logits": "ffn_norm",
    "gating.ids": "gating.logits", "gating.weights": "gating.logits gating.ids",
    "experts.hidden": "ffn_norm gating.ids",
    "experts.slots": "experts.hidden", "experts.out": "experts.slots gating.weights",
    "out": "attention_residual experts.out", "norm": "x", "logits": "norm",
    "rope.y": "rope.cos rope.sin", "rmsnorm.y": "rmsnorm.h", "cross_entropy.loss": "cross_entropy.losses",
    "adamw.w": "adamw.m adamw.v", "training.loss": "training.cross_entropy training.balance_loss",
}  # fmt: skip

_READS_WITH_POST_NORMS = _READS | {
    "attention_post_norm": "attention.out", "attention_residual": "x attention_post_norm",
    "ffn_post_norm": "experts.out", "out": "attention_residual ffn_post_norm",
}  # fmt: skip


def split_layer(name: str) -> tuple[int | None, str]:
    """Split "layers.3.out" into 3 and "out"; other names are of no layer."""
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _reads(case: Case, name: str) -> list[str]:
    """The names of what an output is computed from."""
    layer, inner = split_layer(name)
    if case.level in ("op", "training"):
        return [n.removeprefix(f"{case.call}.") for n in _READS.get(f"{case.call}.{name}", "").split()]
    before = [o.name for o in case.outputs if split_layer(o.name)[1] == "out" and o.name != name]
    entered = before[-1:] if layer is None else [f"layers.{layer - 1}.out" if layer else "tok_embeddings"]
    prefix = "" if layer is None else f"layers.{layer}."
    normed = any(o.name.endswith("_post_norm") for o in case.outputs)
    reads = (_READS_WITH_POST_NORMS if normed else _READS).get(inner, "").split()
    return [n for read in reads for n in (entered if read == "x" and case.level == "model" else [prefix + read])]


def _behind(case: Case, name: str, given: Mapping[str, TensorResult]) -> tuple[list[str], list[str]]:
    """Return the given outputs that a step reads, and the absent ones; what an absent one reads counts in its place."""
    found: list[str] = []
    absent: list[str] = []
    for read in _reads(case, name):
        if read in given:
            found.append(read)
        else:
            absent += [read] if read in [o.name for o in case.outputs] else []
            more, lacking = _behind(case, read, given)
            found, absent = found + more, absent + lacking
    return list(dict.fromkeys(found)), list(dict.fromkeys(absent))


def find_cause(case: Case, tensors: Sequence[TensorResult]) -> str:
    """Say whether the first failing step is where the mistake is, and whether the later ones may follow from it."""
    given = {t.name: t for t in tensors if t.status not in ("missing", "extra")}
    failing = [t.name for t in given.values() if t.failed]
    if not failing:
        return ""
    found, absent = _behind(case, failing[0], given)
    if absent:
        shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        says = f"here, or in {shown}, which {'is' if len(absent) == 1 else 'are'} not given"
    elif found:
        says = f"its inputs ({', '.join(found)}) fit, so this step is wrong"
    else:
        says = "it is computed from the case's inputs, so this step is wrong"
    later = [(name, *_behind(case, name, given)) for name in failing[1:]]
    alone = [name for name, found, absent in later if not absent and not any(given[n].failed for n in found)]
    follow = len(later) - len(alone)
    says += f"; so is {', '.join(alone[:2])}{', …' if len(alone) > 2 else ''}" if alone else ""
    return says + (f"; {follow} later {'one' if follow == 1 else 'ones'} may follow from it" if follow else "")
