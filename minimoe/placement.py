"""Moving weights between the host and a CUDA device; where its memory does not suffice, saying how much there is."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from minimoe.arrays import to_host, xp_of
from minimoe.backends import Backend, BackendError
from minimoe.params import Params, leaves, map_leaves, stack_experts
from minimoe.quantized import Int8
from minimoe.shapes import Array

_LARGE = 1 << 30  # bytes from which a progress bar is shown


class DeviceMemoryError(BackendError, MemoryError):
    """More memory than the device has free; the message says how much was needed, and how much there is."""


def placed(params: Params, ops: Backend) -> Params:
    """Return the same weights where the backend computes.

    On a device a layer's experts become one array each. Weights are copied tensor by tensor, straight from a mapped
    file if they lie in one, so that the host needs no memory for them; a terminal shows the progress of large ones.

    Raises
    ------
    DeviceMemoryError
        If they need more than the device has free; nothing is copied then.
    """
    if ops.xp is np:
        return map_leaves(params, to_host)
    moving = sum(_nbytes(leaf) for _, leaf in leaves(params) if _on_host(leaf))
    require(ops, moving, "the weights")
    with tqdm(total=moving, unit="B", unit_scale=True, desc="to the device", disable=_quiet(moving)) as bar:

        def copy(x: Array) -> Array:
            if xp_of(x) is not np:
                return x
            bar.update(x.nbytes)
            return ops.asarray(x)

        def stack(experts: Sequence[Any]) -> Any:
            if isinstance(experts[0], Int8):
                values, scale = stack([w.values for w in experts]), stack([w.scale for w in experts])
                return Int8(values, scale, experts[0].source)
            whole = ops.xp.empty((len(experts), *experts[0].shape), experts[0].dtype)
            for e, w in enumerate(experts):
                whole[e] = copy(w)
            return whole

        with explained(ops):
            return map_leaves(stack_experts(params, stack), copy)


def require(ops: Backend, size: int, what: str) -> None:
    """Raise DeviceMemoryError if a device has fewer than `size` bytes free; the host is not asked."""
    if ops.xp is np:
        return
    free, total = _free(ops)
    if size > free:
        raise DeviceMemoryError(
            f"{what} need {_gigabytes(size)} on the device; {_gigabytes(free)} of its {_gigabytes(total)} are free"
        )


@contextlib.contextmanager
def explained(ops: Backend) -> Iterator[None]:
    """Turn CuPy's error of memory into a DeviceMemoryError with the figures; what was taken is given back."""
    try:
        yield
    except MemoryError as error:
        if ops.xp is np or isinstance(error, DeviceMemoryError):
            raise
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep the arrays of its calls
        free, total = _free(ops)
        raise DeviceMemoryError(
            f"the device has too little memory: {' '.join(str(error).split())}; {_gigabytes(free)} of its "
            f"{_gigabytes(total)} are free"
        ) from None


def _free(ops: Backend) -> tuple[int, int]:
    """Bytes that can be had, and all that the device has."""
    ops.xp.get_default_memory_pool().free_all_blocks()
    free, total = ops.xp.cuda.runtime.memGetInfo()
    return int(free), int(total)


def _nbytes(leaf: Any) -> int:
    return sum(w.nbytes for w in leaf) if isinstance(leaf, list) else int(leaf.nbytes)


def _on_host(leaf: Any) -> bool:
    first = leaf[0] if isinstance(leaf, list) else leaf
    return xp_of(first.values if isinstance(first, Int8) else first) is np


def _quiet(size: int) -> bool | None:
    return None if size >= _LARGE else True  # None: shown in a terminal only


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
