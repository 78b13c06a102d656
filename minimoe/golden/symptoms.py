"""What wrong outputs look like where no known mistake explains them: scaled, transposed, permuted, shifted, rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minimoe.golden.matching import Outputs, alike
from minimoe.golden.verify import Case, Output
from minimoe.shapes import Array

_SIXTEEN = ("hf_bfloat16", "mistral_bfloat16", "float16", "bfloat16")
_ALIKE = 1e-3  # of the largest number: how near an array must be to its changed truth to look like it
Given = tuple[Case, Outputs]


@dataclass(frozen=True)
class Symptom:
    """What the first wrong outputs of some cases have in common; `says` tells of the first of them."""

    name: str
    says: str
    hint: str
    cases: tuple[str, ...]


def find(failing: Iterable[Given], profile: str) -> list[Symptom]:
    """Return the symptoms of failing cases, the most frequent first."""
    found: dict[str, Symptom] = {}
    for case, outputs in failing:
        if seen := _symptom(case, outputs, profile):
            first = found.get(seen[0], Symptom(*seen, ()))
            found[seen[0]] = dataclasses.replace(first, cases=(*first.cases, case.id))
    return sorted(found.values(), key=lambda symptom: -len(symptom.cases))


def unwritten(failing: Sequence[Given]) -> Symptom | None:
    """Tell outputs that nobody wrote from a mistake that makes one gradient 0: most failing cases are 0 throughout."""
    zero = [case for case, outputs in failing if _all_zero(case, outputs)]
    if len({case.call for case in zero}) < 3 or 2 * len(zero) <= len(failing):
        return None
    says = "every number is 0: the outputs were allocated, but nothing was written into them"
    hint = "look whether results are copied into the arrays that are given back, and after they have been computed"
    return Symptom("all-zero", says, hint, tuple(case.id for case in zero))


def _all_zero(case: Case, outputs: Outputs) -> bool:
    given = [np.asarray(outputs[o.name]) for o in case.outputs if o.name in outputs]
    return bool(given) and all(x.dtype.kind in "fiub" and not x.any() for x in given)


def repeated(results: Sequence[Given]) -> list[tuple[Given, Given]]:
    """Return the pairs of cases that ask for the very same."""
    found, asked = [], dict[tuple[object, ...], Given]()
    for case, outputs in results:
        if case.level == "op":
            continue
        numbers = tuple((name, x.tobytes()) for name, x in sorted(case.inputs.items()))
        key = (case.call, case.model, repr(case.settings), numbers)
        if key in asked:
            found.append((asked[key], (case, outputs)))
        asked.setdefault(key, (case, outputs))
    return found


def _symptom(case: Case, outputs: Outputs, profile: str) -> tuple[str, str, str] | None:
    """Name, words and hint for the first output that is wrong."""
    for output in case.outputs:
        name, truth = output.name, case.truth[output.name]
        if name not in outputs or truth.dtype.kind != "f":
            continue
        array = np.asarray(outputs[name])
        if array.dtype.kind not in "f" or alike(_only(case, output), outputs, case.truth, profile):
            continue
        array = array.astype(np.float64)
        if array.shape == truth.shape and (np.isfinite(truth) & ~np.isfinite(array)).any():
            return _strange(case)
        seen = _changed(array, truth, output)
        return seen if seen or profile not in ("float32", "float64") else _rounded(case, outputs)
    return None


def _only(case: Case, output: Output) -> Case:
    """The case with one required output."""
    one = Case(
        case.kit, case.id, case.call, case.level, case.why, case.settings, case.model, case.tags, case.profiles,
        (dataclasses.replace(output, required=True),),
    )  # fmt: skip
    one.__dict__["_tensors"] = case._tensors
    return one


def _strange(case: Case) -> tuple[str, str, str]:
    return (
        "not-a-number",
        f"NaN or Inf in {case.call}: an overflow, 0 / 0, or a row in which everything is masked",
        "subtract the maximum before exp, take squares and sums in float32, and guard rows that see nothing",
    )


def _rounded(case: Case, outputs: Outputs) -> tuple[str, str, str] | None:
    for profile in _SIXTEEN:
        if profile in case.profiles and alike(case, outputs, case.truth, profile):
            return (
                "looks-like-16-bits",
                f"too far off for this profile, but within the bounds of {profile}",
                "look for a cast to 16 bits, or for TF32 products on a GPU; or check with --profile " + profile,
            )
    return None


def _changed(a: Array, b: Array, output: Output) -> tuple[str, str, str] | None:
    """What was done to the truth b that it looks like a."""
    b = np.where(np.isfinite(b), b, 0.0)
    a = np.where(np.isfinite(a), a, 0.0)
    if a.ndim >= 2 and (turned := a.swapaxes(-1, -2)).shape == b.shape and _looks_like(turned, b):
        return "transposed", f"{output.name} is transposed", "exchange its last two axes"
    if a.shape != b.shape or a.size < 2 or _looks_like(a, b):  # alike: roundings, and nothing to name
        return None
    square = float((b * b).sum())
    factor = float((a * b).sum()) / square if square else 0.0
    if factor and _looks_like(a, factor * b):
        says = f"{output.name} is {factor:.3g} times what it should be"
        return f"scaled-by-{factor:.3g}", says, "look for a factor, or a mean for a sum"
    for axis, letter in enumerate(output.letters.split() if len(output.letters.split()) == a.ndim else []):
        if order := _permutation(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)):
            return "permuted", f"{output.name} is permuted along {letter}: {order}", "look at the order along that axis"
    return None


def _looks_like(a: Array, b: Array) -> bool:
    return bool(np.abs(a - b).max(initial=0.0) <= _ALIKE * np.abs(b).max(initial=0.0) and np.abs(b).any())


def _permutation(a: Array, b: Array) -> str:
    """The slices of b that stand in a, or by how many rows a is off; "" where neither is so."""
    n = len(a)
    if not 2 <= n <= 64:
        return ""
    for shift in (1, -1):
        shared = slice(max(0, -shift), n - max(0, shift))  # the rows that have a counterpart
        if n > 2 and _looks_like(np.roll(a, -shift, axis=0)[shared], b[shared]):
            return f"off by one, index i holds what belongs to {'i - 1' if shift > 0 else 'i + 1'}"
    flat, wanted = a.reshape(n, -1), b.reshape(n, -1)
    apart = np.abs(flat[:, None] - wanted[None]).max(axis=2, initial=0.0)  # (n, n)
    order = apart.argmin(axis=1)
    fits = (apart.min(axis=1) <= _ALIKE * np.abs(b).max(initial=0.0)).all()
    if not fits or sorted(order) != list(range(n)) or not np.abs(b).any():
        return ""
    return " ".join(map(str, order[:8])) + (" …" if n > 8 else "")
