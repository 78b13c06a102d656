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

from minimoe.shapes import Array, Scalar

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_OLDEST_CUPY = 14  # takes bfloat16 arrays
_OLDEST_DEVICE = 80


def xp_of(x: Array) -> Any:
    """Return the array library that `x` belongs to: the module numpy or cupy."""
    if type(x).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    return np


def cupy_module() -> ModuleType:
    """Import CuPy and look for a device, or say what is missing and how to get it.

    Raises
    ------
    ValueError
        If CuPy is not installed, too old or cannot be imported, no CUDA driver or device answers, the driver is too old
        for this CuPy, the device is too old for bfloat16, or CUDA's libraries are not there.
    """
    install = "pip install 'minimoe[cuda12]' or 'minimoe[cuda13]', as the driver's CUDA is (nvidia-smi names it)"
    try:
        import cupy
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise ValueError(f"backend 'cuda' needs CuPy, which is not installed: {install}") from None
        raise ValueError(f"backend 'cuda' found CuPy, but it cannot be imported ({_line(error)}): {install}") from None
    if int(cupy.__version__.partition(".")[0]) < _OLDEST_CUPY:
        raise ValueError(f"backend 'cuda' found CuPy {cupy.__version__}; it needs {_OLDEST_CUPY} or later: {install}")
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except Exception as error:
        raise ValueError(f"backend 'cuda' found CuPy but {_what_is_wrong(runtime, error)}") from None
    if count == 0:
        raise ValueError("backend 'cuda' found CuPy but no CUDA device (is one visible? CUDA_VISIBLE_DEVICES)")
    if int(capability := cupy.cuda.Device().compute_capability) < _OLDEST_DEVICE:
        raise ValueError(
            f"backend 'cuda' found a device of compute capability {capability[:-1]}.{capability[-1]}; it needs 8.0 "
            "(Ampere) or later, whose tensor cores know bfloat16"
        )
    try:  # cuBLAS and the runtime compiler are looked for when they are first asked for
        _ = cupy.cuda.cublas.gemmEx, cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        raise ValueError(f"backend 'cuda' does not find CUDA's libraries ({_line(error)}): {install}") from None
    return cupy  # type: ignore[no-any-return]


def _what_is_wrong(runtime: Any, error: Exception) -> str:
    """Why no device answers: most often there is no driver, or one too old for the CUDA that CuPy was built for."""
    try:
        driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception:
        driver = built = 0
    if 0 < driver < built:
        return (
            f"the driver is too old: it serves CUDA {cuda_version(driver)}, this CuPy is built for "
            f"{cuda_version(built)}; update the driver, or install the CuPy of an older CUDA"
        )
    if driver == 0 < built:
        return "no CUDA driver: this machine has none, or it is not visible here (does nvidia-smi work?)"
    return f"no usable CUDA driver or device: {_line(error)}"


def cuda_version(number: int) -> str:
    """Write a version as people do.

    >>> cuda_version(12080)
    '12.8'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_host(x: Array) -> Array:
    """Return `x` as a NumPy array, copied from the device if it lies there."""
    return x.get() if xp_of(x) is not np else x


def numbers(*scalars: Scalar) -> list[float]:
    """Return scalars as floats; those that lie on a device are read together, so that it is waited for once."""
    there = [i for i, x in enumerate(scalars) if xp_of(x) is not np]
    found: list[Any] = list(scalars)
    if there:
        xp = xp_of(found[there[0]])
        read = to_host(xp.stack([found[i].astype(np.float64, copy=False) for i in there]))
        for i, x in zip(there, read, strict=True):
            found[i] = x
    return [float(x) for x in found]


def overwrite(x: Array, values: Array) -> None:
    """Write host `values` of the shape and type of `x` into it, wherever it lies."""
    if xp_of(x) is np:
        x[...] = values
    else:
        x.set(values)


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
