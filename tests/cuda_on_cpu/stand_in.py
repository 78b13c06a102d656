"""A stand-in for CuPy that keeps its arrays in NumPy: strict where CuPy is strict, and where it is easy to go wrong.

- A NumPy array among the arguments of an array function, or an implicit conversion to NumPy, is an error, as in CuPy.
- Memory fresh from `empty` is NaN; every array has guards on both sides, looked at after each kernel launch.
- `Stream.begin_capture` to `end_capture` records a graph: reading a number back to the host in between is an error,
  and so is taking memory from outside a pool of one's own; `Graph.launch` runs what was recorded on the same buffers.
- Memory is finite, and counted: STATE.total bytes, of which STATE.used are taken by arrays that live.
- What is being captured, and which pool memory comes from, is each thread's own, as with CuPy.
- Only functions that CuPy 14 has are there (NAMES; look before you add one).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
import types
import weakref
from typing import Any

import ml_dtypes
import numpy as np

from tests.cuda_on_cpu import compiling

NAMES = frozenset(
    """
    abs absolute add all any arange argmax argmin argsort array_equal asarray ascontiguousarray bincount broadcast_to
    clip concatenate copysign copyto cos count_nonzero cumsum divide dot empty empty_like equal exp expand_dims float32
    float64 floor full full_like greater greater_equal inf int32 int64 int8 isfinite isinf isnan isneginf less
    less_equal log logical_and logical_not logical_or matmul max maximum mean min minimum multiply nan negative newaxis
    nonzero not_equal ones ones_like power put_along_axis repeat rint searchsorted sin sort split sqrt square squeeze
    stack subtract sum swapaxes take take_along_axis tanh tile transpose uint16 uint32 uint64 uint8 where zeros
    zeros_like bool_ ndarray expm1 log1p round moveaxis unique allclose diff isin
    """.split()
)
METHODS = frozenset(
    """
    all any argmax argmin argsort astype clip conj copy cumsum diagonal dot fill flatten max mean min nonzero prod put
    ravel repeat reshape round sort squeeze std sum swapaxes take transpose var view
    """.split()
)
GUARD = 256  # bytes on either side of an array


class State:
    """What a process has of one device."""

    def __init__(self) -> None:
        self.order = 0  # of threads between barriers, see compiling.run
        self.launches: list[str] = []  # every kernel launched, by name
        self.syncs = 0  # numbers read back to the host
        self.used, self.total = 0, 8 << 30  # bytes
        self.lock = threading.RLock()  # of `used`; the garbage collector may come while it is held
        self._of_thread = threading.local()

    @property
    def recording(self) -> list[Any] | None:
        """The operations of the graph that this thread is capturing."""
        return getattr(self._of_thread, "recording", None)

    @recording.setter
    def recording(self, operations: list[Any] | None) -> None:
        self._of_thread.recording = operations

    @property
    def pool(self) -> Any:
        """Where this thread's memory comes from; None is the common pool."""
        return getattr(self._of_thread, "pool", None)

    @pool.setter
    def pool(self, allocator: Any) -> None:
        self._of_thread.pool = allocator

    def take(self, size: int) -> None:
        """Count memory that is taken, or, where negative, given back."""
        with self.lock:
            if size > 0 and self.used + size > self.total:
                so_far = f"(allocated so far: {self.used:,} bytes)"
                raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes {so_far}.")
            self.used += size


class OutOfMemoryError(MemoryError):
    """CuPy's; no error of CUDA's own."""


STATE = State()


def _read_back() -> None:
    if STATE.recording is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: a number was read back to the host during capture")
    STATE.syncs += 1


def _guarded(shape: Any, dtype: Any) -> np.ndarray:
    """Memory between two guards; its first 16 bytes say where the array lies."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    assert STATE.recording is None or STATE.pool is not None, "memory from the common pool during capture"
    STATE.take(size)
    raw = np.full(size + 2 * GUARD + 256, 0xFF, np.uint8)
    start = GUARD + -(raw.ctypes.data + GUARD) % 256
    raw[:16].view(np.int64)[:] = start, size
    weakref.finalize(raw, STATE.take, -size).atexit = False
    return raw[start : start + size].view(dtype).reshape(shape)


def _guards_hold(array: np.ndarray) -> bool:
    raw: Any = array
    while isinstance(raw.base, np.ndarray):
        raw = raw.base
    start, size = raw[:16].view(np.int64)
    return bool((raw[16:start] == 0xFF).all() and (raw[start + size :] == 0xFF).all())


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device."""

    def __init__(self, array: np.ndarray) -> None:
        self._a = array

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    flags = property(lambda self: self._a.flags)
    T = property(lambda self: ndarray(self._a.T))
    data = property(lambda self: types.SimpleNamespace(ptr=self._a.ctypes.data))

    def __repr__(self) -> str:
        return f"on the device: {self._a!r}"

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Any:
        return (ndarray(row) for row in self._a)

    def get(self) -> np.ndarray:
        _read_back()
        return self._a.copy()

    def item(self) -> Any:
        _read_back()
        return self._a.item()

    def tolist(self) -> Any:
        _read_back()
        return self._a.tolist()

    def set(self, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray) and array.shape == self.shape and array.dtype == self.dtype
        assert STATE.recording is None, "a copy from pageable memory during capture"
        self._a[...] = array

    def __float__(self) -> float:
        _read_back()
        return float(self._a)

    def __int__(self) -> int:
        _read_back()
        return int(self._a)

    def __index__(self) -> int:
        _read_back()
        return self._a.__index__()

    def __bool__(self) -> bool:
        _read_back()
        return bool(self._a)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **settings: Any) -> Any:
        function = getattr(ufunc, method)
        _refuse(ufunc.__name__, inputs)
        out = settings.pop("out", None)
        if method == "at":
            return _in_place(lambda: function(*_unwrap(inputs)))
        if out is not None:
            target = out[0]._a
            _in_place(lambda: np.copyto(target, function(*_unwrap(inputs), **settings), casting="same_kind"))
            return out[0]
        if ufunc is np.matmul:
            _check_matmul(inputs)
        return _result(lambda: function(*_unwrap(inputs), **_unwrap(settings)), inputs)

    def __array_function__(self, function: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return _function(function.__name__)(*args, **kwargs)

    def __getitem__(self, key: Any) -> ndarray:
        _refuse("getitem", (key,), indices=True)
        return _result(lambda: self._a[_unwrap(key)], (self,))

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse("setitem", (value,))
        _in_place(lambda: self._a.__setitem__(_unwrap(key), _unwrap(value)))

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(f"the stand-in's arrays have no {name}: if CuPy's have, add it")

        def method(*args: Any, **kwargs: Any) -> Any:
            _refuse(name, (args, kwargs))
            if name in ("fill", "sort", "put"):
                return _in_place(lambda: getattr(self._a, name)(*_unwrap(args), **_unwrap(kwargs)))
            return _result(lambda: getattr(self._a, name)(*_unwrap(args), **_unwrap(kwargs)), (self,))

        return method


ndarray.__module__ = "cupy"


def _unwrap(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, tuple | list):
        return type(value)(_unwrap(item) for item in value)
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    return value


def _refuse(name: str, value: Any, indices: bool = False) -> None:
    """Raise where a NumPy array stands among arrays of the device (as indices CuPy takes them, and copies)."""
    if isinstance(value, np.ndarray) and value.ndim:
        if not indices:
            raise TypeError(f"Unsupported type <class 'numpy.ndarray'> in {name}")
        assert STATE.recording is None, "an index array of the host during capture"
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ():
        _refuse(name, item, indices)


def _check_matmul(inputs: Any) -> None:
    bfloat16 = any(x.dtype == ml_dtypes.bfloat16 for x in inputs)
    if bfloat16 and any(x.ndim > 2 for x in inputs):
        raise TypeError("CuPy 14 multiplies no batches of bfloat16 matrices")


def _in_place(change: Any) -> None:
    """Change an array, or note that a graph will: what is captured does not run."""
    if STATE.recording is None:
        change()
    else:
        STATE.recording.append(change)


def _result(compute: Any, inputs: Any) -> Any:
    """Wrap what an operation returns: views stay views, everything else gets guarded memory of its own."""
    with np.errstate(all="ignore" if STATE.recording is not None else None):  # captured: its inputs hold anything yet
        result = compute()
    if isinstance(result, tuple | list):
        return type(result)(_result(lambda i=i: compute()[i], inputs) for i in range(len(result)))
    if not isinstance(result, np.ndarray | np.generic):
        return result
    result = np.asarray(result)
    if any(np.shares_memory(result, x) for x in _arrays(inputs)) and result.size:
        return ndarray(result)
    kept = _guarded(result.shape, result.dtype)
    kept[...] = result
    if STATE.recording is not None:
        STATE.recording.append(lambda: np.copyto(kept, compute()))
    return ndarray(kept)


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, ndarray):
        return [value._a]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [array for item in value for array in _arrays(item)] if isinstance(value, tuple | list) else []


def _function(name: str) -> Any:
    function = getattr(np, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        _refuse(name, (args, kwargs))
        if name in ("put_along_axis", "copyto"):
            return _in_place(lambda: function(*_unwrap(args), **_unwrap(kwargs)))
        if name == "nonzero":
            _read_back()  # the size of the result is not known before
        return _result(lambda: function(*_unwrap(args), **_unwrap(kwargs)), (args, kwargs))

    return call


def asarray(x: Any, dtype: Any = None) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None or x.dtype == np.dtype(dtype) else x.astype(dtype)
    assert STATE.recording is None, "a copy from the host during capture"
    array = np.asarray(x, dtype)
    kept = _guarded(array.shape, array.dtype)
    kept[...] = array
    return ndarray(kept)


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    return ndarray(_guarded(shape, dtype))  # NaN: its guards' bytes


class RawModule:
    def __init__(self, code: str, options: tuple[str, ...] = (), name_expressions: Any = None) -> None:
        self._code, self._names = code, list(name_expressions or ())

    def get_function(self, name: str) -> Any:
        assert name in self._names, f"{name} is not among name_expressions"
        return Kernel(self._code, name)


class Kernel:
    """One compiled kernel."""

    def __init__(self, code: str, name: str) -> None:
        self._code, self.name = code, name
        self.max_dynamic_shared_size_bytes, self.shared_size_bytes = 48 * 1024, 1024

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int = 0) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "ask for more dynamic shared memory first"
        STATE.launches.append(self.name)
        arrays = [a._a for a in args if isinstance(a, ndarray)]
        assert not any(isinstance(a, np.ndarray) for a in args), "a kernel was handed an array of the host"
        values = [np.uint64(a.data.ptr) if isinstance(a, ndarray) else a for a in args]
        packed = [(v.tobytes(), v.nbytes) for v in values]

        def launch() -> None:
            compiling.run(self._code, self.name, tuple(grid), tuple(block), packed, shared_mem, STATE.order)
            for i, array in enumerate(arrays):
                if not _guards_hold(array):
                    raise compiling.KernelError(f"{self.name} wrote beyond array {i}, of shape {array.shape}")

        _in_place(launch)


def _gemm_ex(handle, transa, transb, m, n, k, alpha, a, ta, lda, b, tb, ldb, beta, c, tc, ldc, compute, algo):
    """Column-major op(A) · op(B), operands in bfloat16 or float32, sums in float32."""
    kinds = {14: ml_dtypes.bfloat16, 0: np.float32}
    assert compute == 68 and tc == 0 and ta == tb
    factors = [ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))[0] for pointer in (alpha, beta)]

    def matrix(pointer: int, rows: int, columns: int, leading: int, kind: Any) -> np.ndarray:
        count = leading * (columns - 1) + rows
        raw = (ctypes.c_uint8 * (count * np.dtype(kind).itemsize)).from_address(pointer)
        flat = np.frombuffer(raw, kind)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (flat.itemsize, leading * flat.itemsize))

    def multiply() -> None:
        A = matrix(a, *((k, m) if transa else (m, k)), lda, kinds[ta]).astype(np.float32)
        B = matrix(b, *((n, k) if transb else (k, n)), ldb, kinds[tb]).astype(np.float32)
        C = matrix(c, m, n, ldc, np.float32)
        product = (A.T if transa else A) @ (B.T if transb else B)
        C[...] = factors[0] * product + (factors[1] * C if factors[1] else 0)

    STATE.launches.append("gemmEx")
    _in_place(multiply)


class Graph:
    def __init__(self, operations: list[Any]) -> None:
        self._operations = operations

    def launch(self, stream: Any = None) -> None:
        for operation in self._operations:
            operation()

    def upload(self, stream: Any = None) -> None:
        pass


class Stream:
    null: Any

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr, self.is_null = id(self), null

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        assert STATE.recording is None, "a stream was waited for during capture"

    def begin_capture(self, mode: Any = None) -> None:
        assert not self.is_null and STATE.recording is None
        STATE.recording = []

    def end_capture(self) -> Graph:
        recorded, STATE.recording = STATE.recording, None
        assert recorded is not None
        return Graph(recorded)


class Event:
    """A mark in a stream, where all is done as soon as it is asked for."""

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert STATE.recording is None, "an event was waited for during capture"


class MemoryPool:
    def __init__(self, allocator: Any = None) -> None:
        self._allocator = allocator

    def malloc(self, size: int) -> Any:
        raise NotImplementedError("the stand-in takes memory from NumPy")

    def free_all_blocks(self) -> None:
        pass

    def used_bytes(self) -> int:
        return STATE.used

    def total_bytes(self) -> int:
        return STATE.used


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Any:
    before, STATE.pool = STATE.pool, allocator
    try:
        yield
    finally:
        STATE.pool = before


def make_cupy() -> types.ModuleType:
    """Return the module that the tests put in place of CuPy."""
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.0.0"
    for name in NAMES:
        found = getattr(np, name)
        setattr(cupy, name, found if isinstance(found, type | float) or found is None else _function(name))
    cupy.add = _Ufunc(np.add)
    cupy.ndarray, cupy.asarray, cupy.empty, cupy.RawModule = ndarray, asarray, empty, RawModule
    cupy.asnumpy = lambda x: x.get() if isinstance(x, ndarray) else np.asarray(x)
    cupy.empty_like = lambda x, dtype=None: empty(x.shape, dtype or x.dtype)
    cupy.get_default_memory_pool = functools.cache(MemoryPool)
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (STATE.total - STATE.used, STATE.total),
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDeviceProperties=lambda device: {
            "name": b"stand-in", "multiProcessorCount": 4, "major": 9, "minor": 0, "totalGlobalMem": STATE.total,
        },
        deviceSynchronize=lambda: None,
        CUDARuntimeError=RuntimeError,
    )  # fmt: skip
    stream = Stream(null=True)
    Stream.null = stream
    cupy.cuda = types.SimpleNamespace(
        runtime=runtime,
        cublas=types.SimpleNamespace(gemmEx=_gemm_ex, CUBLAS_OP_N=0, CUBLAS_OP_T=1),
        device=types.SimpleNamespace(get_cublas_handle=lambda: 0),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
        Device=lambda *a: types.SimpleNamespace(
            id=0,
            attributes={"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 227 * 1024},
            compute_capability="90",
        ),
        Stream=Stream,
        get_current_stream=lambda: stream,
        Event=Event,
        get_elapsed_time=lambda start, end: 1e3 * (end.at - start.at),
        MemoryPool=MemoryPool,
        using_allocator=using_allocator,
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    )
    return cupy


class _Ufunc:
    """A ufunc with its `at`."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self._ufunc = ufunc

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self._ufunc.__name__)(*args, **kwargs)

    def at(self, array: ndarray, index: Any, values: Any) -> None:
        _refuse("at", (array, index, values))
        _in_place(lambda: self._ufunc.at(array._a, _unwrap(index), _unwrap(values)))


STAND_IN = make_cupy()
