"""Helpers for jitted CPU loops that several rooms need.

`jit` is numba.njit with an on-disk cache that knows its sources: Numba's own cache looks at the file of a function
only, not at the files of what it calls, so the cache directory carries a hash of all sources of this package.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from minimoe.arrays import is_bfloat16
from minimoe.compiling import OwnCopies
from minimoe.shapes import Array

# Threads of GNU OpenMP spin for milliseconds after a parallel loop, in case another follows, and so take a core from
# another process, or from another library's threads. Asleep they cost 7 µs more per loop when the machine is idle, 50
# where a sleeping core is slow to wake; when it is busy the same loop takes 8 µs instead of a scheduler's slice of
# 17 ms. libgomp reads this when the first parallel loop is compiled. What the user has set stays, $GOMP_SPINCOUNT
# too, and so does Numba's order of layers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What a reduction needs to vectorise; NaN and Inf keep their meaning (no nnan, no ninf).
FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
FMA = FAST - {"reassoc"}  # for elementwise loops, which need no other order of additions
# One number at a time, and called in the innermost loops: LLVM puts such a function in its caller's place. Numba's own
# inlining would infer its types anew in each caller, which took longer than all else in compiling some of them.
INLINED = {"forceinline": True, "error_model": "numpy", "fastmath": False}  # unsaid, it is what the first caller has

COMPILED = {"cache": True, "error_model": "numpy", "pipeline_class": OwnCopies}

FEW_PRODUCTS = 300_000  # below, one core is done before others have woken up

# What has jitted code besides the rooms.
JITTED = ("compiling.py", "loops.py", "stages.py", "tiles.py", "few_rows.py", "products.py", "compiled_step.py")

F = TypeVar("F", bound=Callable[..., Any])


@cache
def cache_folder() -> str:
    """The folder of compiled loops: $NUMBA_CACHE_DIR or the user's cache, then a hash of this package's sources."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("ops/*/numba_cpu.py"), *map(package.joinpath, JITTED)]):
        digest.update(path.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    base = os.environ.get("NUMBA_CACHE_DIR") or str(Path(home, "minimoe"))
    tag = f"py{sys.version_info.major}{sys.version_info.minor}-{digest.hexdigest()[:16]}"
    return str(Path(base, tag))


@contextmanager
def _cached_in_folder() -> Iterator[None]:
    """Let Numba keep what is declared meanwhile in `cache_folder`; its own setting holds again afterwards."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = cache_folder()
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def jit(**options: Any) -> Callable[[F], F]:
    """Compile with Numba at the first call: no GIL, cached in `cache_folder`, without changing Numba's own settings.

    A function is compiled by itself and then once more in each that calls it, and in each that calls that one. What is
    large and called in one place only says `inline="always"`: then it is compiled there alone.
    """

    options.setdefault("fastmath", False)  # unsaid, it is what the first caller has that is compiled

    def decorate(function: F) -> F:
        with _cached_in_folder():
            return numba.njit(nogil=True, **COMPILED, **options)(function)

    return decorate


def by_address(signature: Any) -> Callable[[F], Any]:
    """Compile with Numba now, cached like `jit`, a function that jitted code calls at its `address` (see `call`).

    Its callers hold its address and none of its code, so it is compiled once, and not once more in each of them.
    """

    def decorate(function: F) -> Any:
        with _cached_in_folder():
            return numba.cfunc(signature, **COMPILED)(function)

    return decorate


@intrinsic
def call(typingctx, function, *arguments):
    """Call the function at an address, which takes int64 numbers (see `by_address`, `stages.together`)."""

    def codegen(context, builder, signature, args):
        numbers = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(numbers))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple(arguments)), codegen


def storage(x: Array) -> Array:
    """View a bfloat16 array as the uint16 that Numba takes; any other array is returned as it is."""
    return x.view(np.uint16) if is_bfloat16(x) else x


def weight_view(w: Array) -> Array:
    """View a weight as the loops take it: contiguous, `storage`, and of one type whether it is mapped or not.

    A mapped weight is read-only, which to Numba is another type: everything would be compiled twice. The loops only
    read weights, so they get a view that is not marked.
    """
    w = storage(np.ascontiguousarray(w))
    return w if w.flags.writeable else np.asarray(_Unmarked(w))


class _Unmarked:
    """An array's memory by NumPy's array interface, without the mark that it is read-only."""

    def __init__(self, x: Array) -> None:
        self.x = x  # kept alive by what is made of it
        self.__array_interface__ = {**x.__array_interface__, "data": (address(x), False)}


def widen(x: Any) -> Any:
    """One stored number in arithmetic type, inside jitted code: uint16 holds a bfloat16; it and int8 become float32."""
    raise NotImplementedError("for jitted code only")


@overload(widen, jit_options=INLINED)
def _widen(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int8:
        return lambda x: np.float32(x)
    return lambda x: x


def holds_bfloat16(w: Any) -> Any:
    """Whether a weight, or a type, is bfloat16 (held as uint16), inside jitted code: known when it is compiled."""
    raise NotImplementedError("for jitted code only")


@overload(holds_bfloat16, jit_options=INLINED)
def _holds_bfloat16(w):
    answer = w.dtype == types.uint16
    return lambda w: answer


def bytes_of(dtype: Any) -> Any:
    """How many bytes a number of this type takes, inside jitted code: known when it is compiled."""
    raise NotImplementedError("for jitted code only")


@overload(bytes_of, jit_options=INLINED)
def _bytes_of(dtype):
    number = dtype.dtype.bitwidth // 8
    return lambda dtype: number


def holds_pairs(x: Any) -> Any:
    """Whether an array holds `tiles.PAIR`, inside jitted code: known when it is compiled."""
    raise NotImplementedError("for jitted code only")


@overload(holds_pairs, jit_options=INLINED)
def _holds_pairs(x):
    answer = x.dtype == types.uint32
    return lambda x: answer


@jit(forceinline=True)
def pair(a, b):
    """Two bfloat16, held as float32, as one `tiles.PAIR`."""
    return np.uint32(
        (np.float32(a).view(np.uint32) >> np.uint32(16)) | (np.float32(b).view(np.uint32) & np.uint32(0xFFFF0000))
    )


@jit(forceinline=True)
def narrow(x):
    """Round a float32 to the nearest bfloat16, ties to even, as uint16. NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


def stored(x: Any, like: Any) -> Any:
    """One computed number as an array that holds `like` takes it, inside jitted code: uint16 holds a bfloat16."""
    raise NotImplementedError("for jitted code only")


@overload(stored, jit_options=INLINED)
def _stored(x, like):
    if like == types.uint16 and x != types.uint16:
        return lambda x, like: narrow(x)
    return lambda x, like: x


@jit(forceinline=True)
def rounded(x):
    """Round a float32 to bfloat16 and back: an operand of a bfloat16 product. NaN stays NaN. Vectorises."""
    bits = np.float32(x).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    near = np.uint32(np.uint32(bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
    return near if x == x else np.float32(np.nan)


def exp(x: Any) -> Any:
    """e^x inside jitted code; the float32 form vectorises (the C library's does not)."""
    raise NotImplementedError("for jitted code only")


@overload(exp, jit_options=INLINED)
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: np.exp(x)


@jit(forceinline=True, fastmath=FMA)
def _exp_float32(x):
    # x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (relative error at most 7e-9); 2^n is
    # added to the exponent bits. Results below the smallest normal number (x < -87.3) become 0.
    inside = min(max(x, np.float32(-87.3)), np.float32(88.72283))
    n = np.floor(inside * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (inside - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = (p * r * r + r) + np.float32(1.0)
    y = np.int32(np.float32(p).view(np.int32) + np.int32(np.int32(n) << np.int32(23))).view(np.float32)
    y = np.float32(np.inf) if x > np.float32(88.72283) else y
    y = np.float32(0) if x < np.float32(-87.3) else y
    return x if x != x else y


def sigmoid(z: Any) -> Any:
    """1 / (1 + e^-z) inside jitted code, from e^-|z|, which never overflows."""
    raise NotImplementedError("for jitted code only")


@overload(sigmoid, jit_options=INLINED)
def _sigmoid(z):
    one = np.float32(1) if z == types.float32 else np.float64(1)  # an int would promote float32 to float64

    def impl(z):
        small = exp(-abs(z))
        return (one if z >= 0 else small) / (one + small)

    return impl


def tanh(x: Any) -> Any:
    """The hyperbolic tangent inside jitted code; the float32 form vectorises."""
    raise NotImplementedError("for jitted code only")


@overload(tanh, jit_options=INLINED)
def _tanh(x):
    if x == types.float32:
        return lambda x: _tanh_float32(x)
    return lambda x: np.tanh(x)


@jit(forceinline=True, fastmath=FMA)
def _tanh_float32(x):
    # Near 0 1 - 2 / (e^2x + 1) would cancel: there x + x³ p(x²), p of degree 4 interpolating (tanh(x) / x - 1) / x² at
    # Chebyshev points of 0 <= x² <= 0.36 (relative error 1.1e-8).
    z = x * x
    p = np.float32(-0.00627639073)
    p = p * z + np.float32(0.0211162165)
    p = p * z + np.float32(-0.0538751389)
    p = p * z + np.float32(0.13332924)
    p = p * z + np.float32(-0.333333304)
    far = np.float32(1) - np.float32(2) / (exp(np.float32(2) * abs(x)) + np.float32(1))
    far = -far if x < np.float32(0) else far
    return x + x * z * p if abs(x) < np.float32(0.6) else far


@intrinsic
def _pointer(typingctx, address):
    """Turn an integer address into the void pointer that numba.carray takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), codegen


@jit(inline="always")
def at_address(place, shape, dtype):
    """Return the contiguous array that lies at an address, inside jitted code. It keeps nothing alive."""
    return numba.carray(_pointer(np.uintp(place)), shape, dtype)


def address(x: Array | None) -> int:
    """Where an array begins; 0 where there is none. It keeps nothing alive."""
    return 0 if x is None else int(x.__array_interface__["data"][0])


@jit()
def copy(source, target):
    """Copy a row: target[:] = source, for which Numba compiles a check of shapes, and its message takes seconds."""
    for i in range(len(target)):
        target[i] = source[i]


def keep_freed_memory() -> bool:
    """Let the C library keep up to 1 GiB of freed memory for the next arrays; say whether it can (glibc only).

    By default it returns every large array to the system, and the next one is paid for with a page fault per 4 KiB. In
    training that is half the time of the experts: 11.3 ms a forward and 22.9 a backward, 6.6 and 14.0 with this (4096
    tokens of the tiny preset on one core). It holds for the whole process, so a program decides it, not an op.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(trim_threshold, 1 << 30) and mallopt(mmap_threshold, 1 << 26))
