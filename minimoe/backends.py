"""The switchboard: which dialect of each op a backend uses.

A `Backend` is a value with one field per room. The model is handed one and calls `ops.linear.forward(...)`; it never
asks which. A missing cell is filled by the reference, which runs over NumPy or CuPy, and `dialects` shows that it is.
Because a backend is a value, it can be wrapped: recording, counting or disturbing the ops needs no code in the model.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from minimoe import threads
from minimoe.arrays import cupy_module
from minimoe.cuda import FEW, Captured
from minimoe.ops.adamw import AdamW
from minimoe.ops.attention import Attention
from minimoe.ops.balance_loss import BalanceLoss
from minimoe.ops.cross_entropy import CrossEntropy
from minimoe.ops.embedding import Embedding
from minimoe.ops.experts import Experts
from minimoe.ops.gating import Gating
from minimoe.ops.kv_cache import KVCacheOp
from minimoe.ops.linear import Linear
from minimoe.ops.rmsnorm import RMSNorm
from minimoe.ops.rope import Rope
from minimoe.ops.sampling import Sampling
from minimoe.shapes import Array

DIALECT_FILES = {"numpy": "reference", "numba": "numba_cpu", "cuda": "cupy_gpu"}


SLOW_THREADS = (
    "Numba starts threads by its own work queue, which is slow (about 100 µs a loop) and must not be entered by two "
    "Python threads at once: install OpenMP (libgomp1) or TBB (pip install tbb)"
)


class BackendError(ValueError):
    """An unknown backend, or one that cannot run here; the message says how to get it."""


@dataclass(frozen=True)
class Backend:
    """One op per room, and where arrays live.

    Attributes
    ----------
    name : "numpy", "numba" or "cuda"
    dialects : {(room, function): dialect file}, the table of cells: "reference" marks a missing one
    xp : the array library, numpy or cupy
    graphs : whether a device may replay what it has captured. Whoever wraps an op to look at what it returns sets it to
        False: a replayed graph calls no Python
    """

    name: str
    embedding: Embedding
    rmsnorm: RMSNorm
    linear: Linear
    rope: Rope
    attention: Attention
    kv_cache: KVCacheOp
    gating: Gating
    experts: Experts
    cross_entropy: CrossEntropy
    balance_loss: BalanceLoss
    adamw: AdamW
    sampling: Sampling
    dialects: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)
    xp: Any = field(default=np, repr=False)
    graphs: bool = field(default=True, repr=False)

    def asarray(self, x: Array) -> Array:
        """Return `x` where this backend computes: as it is, or copied to the device."""
        return self.xp.asarray(x)

    def captured(self, run: Callable[[], Array], tokens: int) -> Callable[[], Array]:
        """Return a function that does what `run` does, for many calls on the same arrays: on a device, one CUDA graph.

        Parameters
        ----------
        run : reads and writes arrays that stay where they are, and returns an array
        tokens : N of its calls of ops; more than `cuda.FEW` may have to ask the host, and are run as they stand
        """
        return Captured(self.xp, run) if self.xp is not np and self.graphs and tokens <= FEW else run


ROOMS = tuple(f.name for f in dataclasses.fields(Backend) if f.name not in ("name", "dialects", "xp", "graphs"))


def make_backend(name: str = "auto") -> Backend:
    """Return the backend called `name`.

    Parameters
    ----------
    name : {"numpy", "numba", "cuda", "auto"}
        "auto" is numba.

    Raises
    ------
    BackendError
        If there is no such backend, or "cuda" has no CuPy or no device.
    """
    if name == "auto":
        name = "numba"
    if name not in DIALECT_FILES:
        raise BackendError(f"unknown backend {name!r}; there are {', '.join(DIALECT_FILES)} and auto")
    xp: Any = np
    if name == "cuda":
        try:
            xp = cupy_module()
        except ValueError as error:
            raise BackendError(str(error)) from None
    if name == "numba":
        threads.check()
        if threads.layer() == "workqueue":
            warnings.warn(SLOW_THREADS, RuntimeWarning, stacklevel=2)
    dialects: dict[tuple[str, str], str] = {}
    rooms: dict[str, Any] = {room: _cells(room, DIALECT_FILES[name], dialects) for room in ROOMS}
    return Backend(name=name, dialects=dialects, xp=xp, **rooms)


def reference_over(ops: Backend) -> Backend:
    """Return the backend that computes where `ops` does, every cell by the reference: what its own are held against."""
    dialects: dict[tuple[str, str], str] = {}
    rooms: dict[str, Any] = {room: _cells(room, "reference", dialects) for room in ROOMS}
    return dataclasses.replace(ops, dialects=dialects, graphs=False, **rooms)


def _cells(room: str, dialect: str, dialects: dict[tuple[str, str], str]) -> Any:
    """The functions of one room: those of the dialect, and the reference's where it has none."""
    reference = importlib.import_module(f"minimoe.ops.{room}.reference")
    contract = importlib.import_module(f"minimoe.ops.{room}")
    own = reference
    if dialect != "reference" and importlib.util.find_spec(f"minimoe.ops.{room}.{dialect}"):
        own = importlib.import_module(f"minimoe.ops.{room}.{dialect}")
    (protocol,) = (
        value
        for value in vars(contract).values()
        if getattr(value, "_is_protocol", False) and value.__module__ == contract.__name__
    )
    functions = {}
    for name in sorted(_public(protocol)):
        has = hasattr(own, name)
        functions[name] = getattr(own if has else reference, name)
        dialects[room, name] = dialect if has and own is not reference else "reference"
    if hasattr(reference, "explain"):  # what happens inside an op is shown by the reference, whatever the dialect
        functions["explain"] = reference.explain
    return SimpleNamespace(**functions)


def _public(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]
