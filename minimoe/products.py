"""Matrix products on the CPU: NumPy's BLAS on one thread per block, the blocks dealt to threads of our own.

out = Σ left · right

BLAS could share out a product itself, but OpenBLAS's threads go on spinning for milliseconds after each one and take
half a core from the Numba loop that follows; beside another busy process they wait for each other, and training was
seen to slow down tenfold. So BLAS is held to the thread that calls it for as long as our products last (what a user
has set holds again afterwards), and several Python threads call it at once: NumPy lets go of the GIL meanwhile.

A product is cut into blocks by its shape alone, and each number is computed within one block: results are the same to
the last bit for any number of threads, ours or BLAS's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from minimoe.arrays import is_bfloat16
from minimoe.loops import jit, rounded, weight_view, widen
from minimoe.quantized import Int8
from minimoe.shapes import Array
from minimoe.stages import share, threads_if

GRAIN = 1 << 23  # multiplications worth a block, or a thread, of their own: about 0.1 ms
LEAST_SIDE = 128  # of a block; narrower ones are slower per multiplication
MOST_BLOCKS = 64  # of one product: enough to keep 16 threads evenly busy
FEW_ROWS = 16  # with fewer, a block takes as long as with these: the time is that of reading `right`
SMALL = 1 << 15  # numbers; below, waking threads (tens of µs where they sleep) costs more than they save
BLOCK_OF_WEIGHTS = 1 << 20  # widened from bfloat16 at a time: 4 MiB in float32, which a cache holds


class Product(NamedTuple):
    """A sum of matrix products to compute.

    Attributes
    ----------
    pairs : the factors (left, right), added up in this order; each of shapes (M, K) and (K, N), K may differ. A `right`
        that is stored in bfloat16 or int8 is widened, a `left` must have been (see `operand`)
    out : (M, N) array to fill, of any strides
    """

    pairs: Sequence[tuple[Array, Array | Int8]]
    out: Array


def operand(x: Array, *others: Array | Int8) -> Array:
    """Return the matrix `x` as the left factor of products with `others`: rounded if any is stored in bfloat16."""
    if not any(is_bfloat16(w) for w in others):
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, np.float32)
    _round_all(np.ascontiguousarray(x, np.float32), threads_if(x.size >= SMALL), out)
    return out


def multiply(left: Array, right: Array) -> Array:
    """Return left · right in a new array."""
    out = np.empty((left.shape[0], right.shape[1]), np.result_type(left, right))
    compute([Product([(left, right)], out)])
    return out


def compute(products: Sequence[Product]) -> None:
    """Fill the `out` of all products, which must not overlap, on up to `numba.get_num_threads()` threads.

    Blocks are begun in the order given: with the large products first, threads finish together. Whatever is raised in
    one of them (Ctrl-C, too) is raised here, once none is writing any more.
    """
    waiting = deque(block for product in products for block in cut(product))
    threads = min(len(waiting), sum(map(_work, products)) // GRAIN)
    if threads > 1:
        threads = min(threads, numba.get_num_threads())

    def work() -> None:
        try:
            while waiting:
                try:
                    block = waiting.popleft()
                except IndexError:  # another thread has just taken the last one
                    return
                _fill(*block)
        except BaseException:
            waiting.clear()
            raise

    helpers: list[Future[None]] = []
    with _blas():
        try:
            with suppress(RuntimeError):  # no thread can be started, as when Python ends: those there are do the work
                for _ in range(threads - 1):
                    helpers.append(_pool().submit(copy_context().run, work))  # numpy.errstate is part of the context
            work()
        finally:
            _settle(helpers)
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def cut(product: Product) -> list[tuple[Product, slice, slice]]:
    """Cut a product into blocks of rows or of columns of `out`, along its longer side.

    So with few rows and large weights every weight is read by one block only. Where weights are to be widened, blocks
    are no wider than BLOCK_OF_WEIGHTS allows.

    >>> x, w, out = np.ones((1000, 512)), np.ones((512, 64)), np.ones((1000, 64))
    >>> [rows for _, rows, _ in cut(Product([(x, w)], out))]
    [slice(0, 334, None), slice(334, 668, None), slice(668, 1002, None)]
    """
    M, N = product.out.shape
    longer = max(M, N)
    pieces = max(1, min(_work(product) // GRAIN, longer // LEAST_SIDE, MOST_BLOCKS))
    step = -(-longer // pieces)
    height, width = (step, N) if M >= N else (M, step)
    for _, right in product.pairs:
        if is_bfloat16(right) or isinstance(right, Int8):
            width = min(width, max(1, BLOCK_OF_WEIGHTS // max(1, len(right))))
    if not product.out.size:
        return []
    return [
        (product, slice(m, m + height), slice(n, n + width)) for m in range(0, M, height) for n in range(0, N, width)
    ]


def _work(product: Product) -> int:
    """Multiplications; reading `right` counts as FEW_ROWS of them per number."""
    M, N = product.out.shape
    K = 0
    for _, right in product.pairs:
        K += len(right)
    return max(M, FEW_ROWS) * N * K


def _fill(product: Product, rows: slice, columns: slice) -> None:
    """Compute one block, on this thread."""
    out = product.out[rows, columns]
    (left, right), *rest = product.pairs
    np.matmul(left[rows], _widened(right[:, columns], left.dtype), out=out)
    for left, right in rest:
        np.add(out, left[rows] @ _widened(right[:, columns], left.dtype), out=out)


def _widened(right: Array | Int8, dtype: Any) -> Array:
    """Return the matrix in a type that BLAS takes, int8 in `dtype`; ml_dtypes would widen slowly."""
    if isinstance(right, Int8):
        return _scaled(right.T, dtype).T if right.turned else _scaled(right, dtype)
    if not is_bfloat16(right):
        return right
    if not right.flags.c_contiguous and right.T.flags.c_contiguous:  # wᵀ, as in every forward
        return _widened(right.T, dtype).T
    out = np.empty(right.shape, np.float32)
    _widen_all(weight_view(right), out)
    return out


def _scaled(right: Int8, dtype: Any) -> Array:
    out = np.empty(right.shape, dtype)
    _scale_all(np.ascontiguousarray(right.values), np.ascontiguousarray(right.scale), out)
    return out


def _settle(helpers: Sequence[Future[None]]) -> None:
    """Wait until no helper runs any more, also where Ctrl-C ends the wait: then once more."""
    try:
        for helper in helpers:
            if not helper.cancel():
                helper.exception()
    except BaseException:
        _settle(helpers)
        raise


class _Blas:
    """The BLAS libraries of this process, held to the calling thread from the first `with` to the last exit."""

    def __init__(self) -> None:
        libraries = ThreadpoolController().lib_controllers
        self._libraries = [library for library in libraries if library.user_api == "blas"]
        self._lock = Lock()
        self._inside = 0
        self._before: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [library.get_num_threads() for library in self._libraries]
                self._set([1] * len(self._libraries))
            self._inside += 1

    def __exit__(self, *raised: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._before)

    def _set(self, numbers: Sequence[int]) -> None:
        for library, before, number in zip(self._libraries, self._before, numbers, strict=True):
            if before != 1:
                _let_go(library)
                library.set_num_threads(number)
                _let_go(library)


def _let_go(library: Any) -> None:
    """Let any thread set OpenBLAS's number: from threadpoolctl 3.8 on the first one keeps others from it, silently."""
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)


@cache
def _blas() -> _Blas:
    return _Blas()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, numba.config.NUMBA_NUM_THREADS - 1), "minimoe-products")


def _forget() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that nobody will open."""
    _pool.cache_clear()
    _blas.cache_clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget)


@jit()
def _widen_all(x, out):  # on one thread: it runs in those of the pool
    for row in range(x.shape[0]):
        source, target = x[row], out[row]
        for i in range(x.shape[1]):
            target[i] = widen(source[i])


@jit()
def _scale_all(values, scale, out):
    for row in range(values.shape[0]):
        source, target, factor = values[row], out[row], scale[row]
        for i in range(values.shape[1]):
            target[i] = out.dtype.type(source[i]) * factor


@jit()
def _round_all(x, threads, out):
    share(_round_rows, len(x), (x, out), threads)


@jit()
def _round_rows(start, stop, x, out):
    for row in range(start, stop):
        round_row(x[row], out[row])


@jit()
def round_row(source, target):
    """Round every number to bfloat16."""
    for i in range(len(source)):
        target[i] = rounded(source[i])
