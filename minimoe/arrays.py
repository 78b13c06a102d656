"""NumPy or CuPy, and bfloat16: the few helpers that let one file serve both array libraries.

bfloat16 is a *storage* type here (ml_dtypes gives it to NumPy and CuPy): weights and the key/value cache are kept
in it, arithmetic runs in float32. The one rule: **both operands of a matrix product are rounded to bfloat16 if
either is stored in it; the product accumulates in float32.** It is what tensor cores and AMX compute.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from minimoe.shapes import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def xp_of(x: Array) -> Any:
    """Return the array library that `x` belongs to: the module numpy or cupy."""
    if type(x).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    return np


def cupy_module() -> ModuleType:
    """Import CuPy, or say what is missing.

    Raises
    ------
    ValueError
        If CuPy is not installed, or no CUDA device answers.
    """
    try:
        import cupy
    except ImportError:
        raise ValueError(
            "backend 'cuda' needs CuPy, which is not installed: pip install 'minimoe[cuda12]' or 'minimoe[cuda13]'"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise ValueError(f"backend 'cuda' found CuPy but no usable CUDA driver or device: {error}") from None
    if count == 0:
        raise ValueError("backend 'cuda' found CuPy but no CUDA device (is one visible? CUDA_VISIBLE_DEVICES)")
    return cupy  # type: ignore[no-any-return]


def to_host(x: Array) -> Array:
    """Return `x` as a NumPy array, copied from the device if it lies there."""
    return x.get() if xp_of(x) is not np else x


def is_bfloat16(x: Array) -> bool:
    """Whether `x` is stored in bfloat16."""
    return bool(x.dtype == BFLOAT16)


def widen(x: Array) -> Array:
    """Return `x` in a type that arithmetic may use: bfloat16 becomes float32, anything else is returned as it is."""
    return x.astype(np.float32) if is_bfloat16(x) else x


def operands(a: Array, b: Any) -> tuple[Array, Any]:
    """Return `a` and `b` as the operands of a matrix product, both rounded if either is stored in bfloat16."""
    if is_bfloat16(a) or is_bfloat16(b):
        a, b = (widen(x if is_bfloat16(x) else x.astype(BFLOAT16)) for x in (a, b))
    return a, b


def matmul(a: Array, b: Any) -> Array:
    """Return ``a @ b`` under the storage rule of this module.

    >>> a = np.array([[1.00390625]], np.float32)               # 1 + 2**-8 needs nine significant bits
    >>> float(matmul(a, np.ones((1, 1), np.float32))[0, 0])
    1.00390625
    >>> float(matmul(a, np.ones((1, 1), BFLOAT16))[0, 0])      # bfloat16 keeps eight; the tie goes to even
    1.0
    """
    a, b = operands(a, b)
    return a @ b
