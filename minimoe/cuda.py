"""CUDA kernels: each room's `kernels.cu`, compiled on the machine when a kernel is first called, and launched.

Kernels are C++ templates, called by their instantiation: ``launch(FILE, "rmsnorm_forward<float, bfloat16>", ...)``.
CuPy hands the source to NVRTC, CUDA's runtime compiler, and keeps what it makes on disk, so that the second run
compiles nothing. This file never imports CuPy: whoever has an array on the device has done so.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16, is_bfloat16, xp_of
from minimoe.quantized import Int8
from minimoe.shapes import Array

SHARED = Path(__file__).with_name("kernels.cuh")
OPTIONS = ("--std=c++17", "-default-device")  # NVRTC takes a generic lambda for a function of the host otherwise
_INCLUDE = '#include "../../kernels.cuh"'
_TYPES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    BFLOAT16: "bfloat16",
    np.dtype(np.int8): "signed char",
}
# A kernel gets 48 KiB of shared memory without asking, what its source declares (never more than half of it) included.
_UNASKED_SHARED = 24 * 1024

# Calls with so many tokens or fewer are served by kernels that read every weight once and never ask the host: such a
# call can be captured in a graph. More go to cuBLAS, for which the host must know how many tokens each expert has.
FEW = 16
FEW_SIZES = (1, 4, FEW)  # tokens that a kernel is made for; the rest of the next larger one does nothing
FEW_QUEUE = 48 * 1024  # bytes of shared memory in which weights arrive (`stream` in kernels.cuh)
# All types that `few_work` may name.
FEW_WORKS = (
    "Tiles<1>", "Tiles<2>",
    *(
        f"Dots<{stored}, {width}, {tokens}>"
        for stored, widths in {"float": (1, 4), "double": (1, 2), "bfloat16": (1,), "signed char": (1, 16)}.items()
        for width in widths
        for tokens in FEW_SIZES
    ),
)  # fmt: skip


def c_type(x: Array) -> str:
    """Return the C++ name of the type of `x`: float, double, bfloat16 or signed char."""
    return _TYPES[np.dtype(x.dtype)]


def source(file: Path) -> str:
    """Return a room's CUDA source with the shared header in place of its include.

    CuPy's cache of compiled kernels looks at the text it is given, not at what the text includes.
    """
    text = file.read_text(encoding="utf-8")
    assert text.count(_INCLUDE) == 1, f"{file} must include the shared header once"
    header = SHARED.read_text(encoding="utf-8").replace("#pragma once", "")
    before = text[: text.index(_INCLUDE)].count("\n")
    return text.replace(_INCLUDE, f'{header}\n#line {before + 2} "{file.parent.name}/{file.name}"', 1)


@functools.cache
def compiled(cupy: ModuleType, file: Path, kernel: str) -> Any:
    """Return one instantiation of a kernel template, compiled once per process (CuPy looks into its disk cache)."""
    return cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=[kernel]).get_function(kernel)


@functools.cache
def _roomy(cupy: ModuleType, file: Path, kernel: str) -> Any:
    """Return the kernel, allowed all the dynamic shared memory that a block can have.

    Asked for once, and not as each launch needs it: another thread's smaller launch must not take it back in between.
    """
    function = compiled(cupy, file, kernel)
    most = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    function.max_dynamic_shared_size_bytes = most - function.shared_size_bytes
    return function


def launch(
    file: Path,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Sequence[Array | int | float | None],
    shared: int = 0,
) -> None:
    """Launch a kernel on the current stream.

    Parameters
    ----------
    file : the room's kernels.cu
    kernel : an instantiation, such as ``"rope<float>"``
    grid, block : blocks, and threads of a block; a grid of no blocks launches nothing
    arguments : contiguous arrays (None is a null pointer), int (in C++ `Index`), float (`double`)
    shared : bytes of dynamic shared memory of a block
    """
    grid = (grid,) if isinstance(grid, int) else grid
    block = (block,) if isinstance(block, int) else block
    if 0 in grid:
        return
    function = (_roomy if shared > _UNASKED_SHARED else compiled)(sys.modules["cupy"], file, kernel)
    function(grid, block, tuple(_argument(a) for a in arguments), shared_mem=shared)


def _argument(value: Any) -> Any:
    if value is None:
        return np.intp(0)
    if isinstance(value, bool | int | np.integer):
        return np.int64(value)
    if isinstance(value, float | np.floating):
        return np.float64(value)
    assert value.flags.c_contiguous, "kernels take contiguous arrays"
    return value


def contiguous(x: Array) -> Array:
    """Return `x` as a contiguous array: itself, or a copy."""
    return xp_of(x).ascontiguousarray(x)


def int64(x: Array) -> Array:
    """Return ids, as a kernel takes them: contiguous, `Index` in C++."""
    return contiguous(x.astype(np.int64, copy=False))


def threads(size: int) -> int:
    """Threads of a block that share `size` numbers: about four each, whole warps, at most 1024."""
    return min(1024, 32 * max(1, -(-size // 128)))


def rounded(x: Array) -> Array:
    """Return `x` stored in bfloat16."""
    return x if is_bfloat16(x) else x.astype(BFLOAT16)


def few_work(tokens: int, x: Array, weights: Sequence[Array]) -> tuple[str, int] | None:
    """Return how a kernel multiplies up to FEW tokens with weights: the C++ type (see kernels.cuh), threads of a block.

    Parameters
    ----------
    tokens : that share a weight, at most
    x : what they are read from, in the type that is computed in, or in bfloat16 where weights are
    weights : contiguous; a row is as long as one of x, and their type is the same

    Returns
    -------
    None where no kernel serves these types: x in float64 and weights in another type, or weights of several
    """
    kind = weights[0].dtype
    if any(w.dtype != kind for w in weights) or x.dtype not in ((kind,) if kind == np.float64 else (kind, np.float32)):
        return None
    width = 16 // kind.itemsize
    if x.shape[-1] % width or any(a.data.ptr % 16 for a in (x, *weights)):
        width = 1
    if kind == BFLOAT16 and width > 1:
        return f"Tiles<{-(-tokens // 8)}>", 256
    return f"Dots<{_TYPES[kind]}, {width}, {next(n for n in FEW_SIZES if n >= tokens)}>", 128


def product(x: Array, w: Array | Int8, out: Array | None = None) -> Array:
    """Return ``x · wᵀ`` for x (N, I) and w (O, I), by cuBLAS: on tensor cores where w is stored in bfloat16.

    The rule of `minimoe.arrays.matmul`: both operands are then rounded to bfloat16, and products add in float32. The
    result is written to `out` (N, O), if given.
    """
    if isinstance(w, Int8) or not is_bfloat16(w):
        y = x @ w.T
    elif out is not None and out.dtype == np.float32 and out.flags.c_contiguous:
        _gemm(xp_of(x), contiguous(rounded(x)), contiguous(w), out)
        return out
    else:
        y = product(x, w, xp_of(x).empty((len(x), len(w)), np.float32))
    if out is None:
        return y
    out[...] = y
    return out


def _gemm(xp: Any, x: Array, w: Array, y: Array) -> None:
    """y = x · wᵀ, x and w in bfloat16, y in float32; cuBLAS counts by columns, so it is told yᵀ = w · xᵀ."""
    if not y.size:
        return
    (rows, inner), columns = x.shape, len(w)
    cublas, one, zero = xp.cuda.cublas, np.ones(1, np.float32), np.zeros(1, np.float32)
    bfloat16, float32, compute_float32, any_algorithm = 14, 0, 68, -1  # cudaDataType, cublasComputeType, cublasGemmAlgo
    cublas.gemmEx(
        xp.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, columns, rows, inner,
        one.ctypes.data, w.data.ptr, bfloat16, inner, x.data.ptr, bfloat16, inner,
        zero.ctypes.data, y.data.ptr, float32, columns, compute_float32, any_algorithm,
    )  # fmt: skip


class Captured:
    """A function of no arguments that is called again and again, as one CUDA graph: its launches cost one launch.

    The first call runs as it stands, so that kernels are compiled and memory is there; the second is captured; every
    later one replays the graph on the same arrays. Nothing in it may read a number back to the host. What it returns is
    overwritten by the next call, and lives as long as this object. One thread at a time may call it; others may work on
    the device meanwhile, also while it captures: allocators, streams and cuBLAS handles are each thread's own in CuPy.

    A graph writes to the same addresses each time, and nobody else may be given them: all arrays made inside come from
    a pool of its own, which takes memory from CuPy's common pool and gives it back when this object goes. Inside, the
    pool may hand an address out again once its array is gone, since the operations of a graph keep their order. It
    never frees one: a pool of CuPy's does when CUDA itself says that there is no more; here the common pool says so,
    by another exception.
    """

    def __init__(self, cupy: Any, run: Callable[[], Array]) -> None:
        around = cupy.cuda.get_current_stream()

        def more(size: int) -> Any:  # as the stream around would take it, so that it can use it again afterwards
            with around:
                return cupy.get_default_memory_pool().malloc(size)

        self._cupy, self._run, self._pool = cupy, run, cupy.cuda.MemoryPool(more)
        self._stream = cupy.cuda.Stream(non_blocking=True)  # what others do on the legacy stream must not be waited for
        self._graph: Any = None
        self._result: Array | None = None

    def __call__(self) -> Array:
        if self._result is None:
            self._result = self._first()
            return self._result
        if self._graph is None:
            self._capture()
        self._graph.launch()  # on the stream that everything else runs on
        return self._result

    def _first(self) -> Array:
        self._cupy.cuda.get_current_stream().synchronize()
        with self._cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            try:
                return self._run()
            finally:
                self._stream.synchronize()  # also where it was interrupted: what follows runs on another stream

    def _capture(self) -> None:
        with self._cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            try:
                self._stream.begin_capture()
                result = self._run()
                graph = self._stream.end_capture()
            except BaseException:
                with contextlib.suppress(Exception):
                    self._stream.end_capture()  # the stream must not stay in this state
                raise
        self._graph, self._result = graph, result
