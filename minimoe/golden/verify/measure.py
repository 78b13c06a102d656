"""One array against its truth: is it of the right type and shape, and how far off?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kit import Output
from .results import Element, TensorResult

HIDDEN = -1e4  # a score at or below it counts as that of a key that cannot be seen, where the truth is -inf
_WORDS = {
    "N": "token", "B": "sequence", "T": "position", "S": "key", "H": "head", "K": "key/value head", "E": "expert",
    "k": "slot", "V": "vocabulary id", "L": "layer", "R": "cache slot", "I": "input", "O": "output", "c": "pair",
    "F": "hidden unit", "steps": "step",
}  # fmt: skip


def read_array(value: Any, truth: np.ndarray, output: Output) -> tuple[np.ndarray | None, str, str]:
    """Return a candidate's array in float64 or int64, or None, a status, and what is wrong with it."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever a foreign object raises when it is asked for its numbers
        return None, "dtype", f"{type(value).__name__} cannot be read as an array ({error})"
    if array.dtype.name == "bfloat16":  # ml_dtypes
        array = array.astype(np.float32)
    exact = truth.dtype.kind in "iu"
    if array.dtype.kind not in ("iu" if exact else truth.dtype.kind):
        hint = "; store bfloat16 as float32" if array.dtype.kind == "V" else ""
        return None, "dtype", f"type {array.dtype}; {'integers are' if exact else 'floats are'} wanted{hint}"
    if array.shape != truth.shape and not (array.size == truth.size == 1 and array.ndim <= 1):
        hint = ": the axes are in another order" if sorted(array.shape) == sorted(truth.shape) else ""
        return None, "shape", f"shape {_shape(array.shape)} instead of {_shape(truth.shape)} ({output.letters}){hint}"
    if exact:
        biggest = np.iinfo(np.int64).max  # beyond it an unsigned number would wrap to -1, the mark of "not routed"
        array = np.minimum(array, np.uint64(biggest)) if array.dtype.kind == "u" else array
        return array.astype(np.int64).reshape(truth.shape), "pass", ""
    with np.errstate(all="ignore"):
        return array.astype(np.float64 if array.dtype.kind == "f" else array.dtype).reshape(truth.shape), "pass", ""


def measure(
    result: TensorResult, output: Output, array: np.ndarray, truth: np.ndarray, keep: np.ndarray, bound: float
) -> TensorResult:
    """Fill in how far an array is from the truth, over the elements to keep."""
    a, b = array.astype(np.float64), truth.astype(np.float64)
    keep = keep & ~np.isnan(b)
    with np.errstate(all="ignore"):
        error = np.where(array == truth, 0.0, np.abs(a - b))
    if output.kind == "exact":
        bound, error = 0.0, np.where((error == 0) & (array != truth), 1.0, error)  # beyond 2**53
    error = np.where(np.isnan(error), np.inf, error)
    error[np.isneginf(b) & (a <= HIDDEN)] = 0.0
    error[~keep] = 0.0
    wrong = error > bound
    strange = keep & (np.isnan(a) | (np.isinf(a) & np.isfinite(b)))
    result.size, result.compared, result.wrong, result.bound = b.size, int(keep.sum()), int(wrong.sum()), bound
    if b.size and not result.compared:
        result.status, result.says = "not comparable", "all of it follows another choice of experts, or is padding"
    if not wrong.any():
        result.error = float(error.max(initial=0.0))
        result.ratio = result.error / bound if bound else 0.0
        return result
    result.status = "nan" if strange.any() else "fail"
    worst, first = int(error.argmax()), int((strange if strange.any() else wrong).argmax())
    result.worst, result.first = (_element(output, array, truth, i) for i in (worst, first))
    result.error = float(error.flat[worst])
    result.ratio = result.error / bound if bound else math.inf
    result.says = f"{result.wrong:,} of {result.compared:,} wrong, the first at {result.first}"
    return result


def _element(output: Output, array: np.ndarray, truth: np.ndarray, flat: int) -> Element:
    index = tuple(int(i) for i in np.unravel_index(flat, truth.shape))
    letters = output.letters.split()
    if len(letters) == len(index):
        where = ", ".join(f"{_WORDS.get(letter, 'channel')} {i}" for letter, i in zip(letters, index, strict=True))
    else:
        where = str(list(index))
    return Element(index, where or "the number", array[index].item(), truth[index].item())


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "() (one number)"
