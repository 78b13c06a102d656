"""What the machine can do: how fast it reads memory and multiplies matrices, measured by loops of its own.

A backend's limits are those of the device it computes on: the numpy and the numba backend share the CPU's. A backend on
another device joins `DEVICES`, and its device `PROBES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any, Protocol

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from minimoe.arrays import BFLOAT16
from minimoe.bench import measure
from minimoe.bench.device import GpuProbe
from minimoe.checkpoint.memory import require_memory
from minimoe.loops import FAST, jit
from minimoe.products import Product, compute, operand
from minimoe.quantized import quantize
from minimoe.shapes import Array
from minimoe.threads import use

READ_BYTES = 1 << 30
SIDE = 2048  # of the square matrices: 17 GFLOP, far more than what starting a product costs
_PARTS = 64


class Probe(Protocol):
    """Measures one device; every call is one measurement, of which there should be several (see `measure.turn`)."""

    def bandwidth(self) -> float:
        """Bytes per second, reading READ_BYTES once."""

    def rate(self, dtype: str) -> float:
        """Floating-point operations per second of a product with weights stored in `dtype`."""


class CpuProbe:
    """The CPU: a parallel sum over 1 GiB; NumPy's BLAS; our products for weights stored in bfloat16 or int8."""

    def __init__(self) -> None:
        require_memory(READ_BYTES + 9 * SIDE * SIDE * 4, "the benchmark's read test and matrix products")
        rng = np.random.default_rng(0)
        # Whole numbers so small that every sum of a part is exact; random, as a host may merge pages that are equal.
        self._read = rng.integers(0, 4, READ_BYTES // 4, np.uint8).astype(np.float32)
        self._total = self._read.sum(dtype=np.float64)
        self._sums = np.zeros(_PARTS, np.float32)
        self._left, right = rng.standard_normal((2, SIDE, SIDE), np.float32)
        self._right = {"float32": right, "float64": right.astype(np.float64)}
        self._narrow = {"bfloat16": right.astype(BFLOAT16).T, "int8": quantize(right).T}
        self._left64, self._rounded = self._left.astype(np.float64), operand(self._left, self._narrow["bfloat16"])
        self.bandwidth()  # compiles

    def bandwidth(self) -> float:
        """Read the gigabyte."""
        seconds = _timed(lambda: _sum_parts(self._read, self._sums))
        assert self._sums.sum(dtype=np.float64) == self._total, "the read test did not read everything"
        return READ_BYTES / seconds

    def rate(self, dtype: str) -> float:
        """Multiply each way there is; the faster counts.

        Narrow weights have two ways: as they are stored, by us, or, where a model would widen them, as float32 by BLAS.
        """
        left = self._left64 if dtype == "float64" else self._left
        out = np.empty((SIDE, SIDE), left.dtype)
        right = self._right.get(dtype, self._right["float32"])
        times = [_timed(lambda: np.matmul(left, right.T, out=out))]
        if dtype in self._narrow:
            sleep(measure.SETTLE)
            left, rounded = (self._rounded, True) if dtype == "bfloat16" else (self._left, False)
            product = Product([(left, self._narrow[dtype])], out, rounded)
            times += [_timed(lambda: compute([product])) for _ in range(2)]
        return 2 * SIDE**3 / min(times)


DEVICES = {"numpy": "cpu", "numba": "cpu", "cuda": "gpu"}  # which device a backend computes on
PROBES: dict[str, Callable[[], Probe]] = {"cpu": CpuProbe, "gpu": GpuProbe}


def device_of(backend: str) -> str:
    """Return the device whose limits are a backend's.

    Raises
    ------
    ValueError
        If there is no probe for it.
    """
    if backend not in DEVICES:
        raise ValueError(f"minimoe bench knows no limits for backend {backend!r} yet; it does for {', '.join(DEVICES)}")
    return DEVICES[backend]


@contextmanager
def held_to(threads: int) -> Iterator[None]:
    """Give our loops and BLAS so many threads.

    Raises
    ------
    ThreadsError
        If Numba was started with fewer.
    """
    before = numba.get_num_threads()
    use(threads, "--threads")
    try:
        with threadpool_limits(threads, "blas"):
            yield
    finally:
        numba.set_num_threads(before)


def threading_layer() -> str | None:
    """The library that runs our parallel loops; None before one has run."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


def _timed(work: Any) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


@jit(parallel=True, fastmath=FAST)
def _sum_parts(x: Array, sums: Array) -> None:
    """Sum each of `len(sums)` equal parts of x, read as four streams: one alone was measured 7% slower."""
    size = len(x) // len(sums)
    quarter = size // 4
    for i in numba.prange(len(sums)):
        streams = x[i * size : (i + 1) * size].reshape(4, quarter)
        a, b, c, d = streams[0], streams[1], streams[2], streams[3]
        s0 = s1 = s2 = s3 = np.float32(0)
        for j in range(quarter):
            s0 += a[j]
            s1 += b[j]
            s2 += c[j]
            s3 += d[j]
        sums[i] = s0 + s1 + s2 + s3
