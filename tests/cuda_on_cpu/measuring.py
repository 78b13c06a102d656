"""Hold the CUDA dialect of a room against the reference: inputs go to the device, results come back."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np

from minimoe.quantized import Int8
from tests.cuda_on_cpu.stand_in import STATE


def to_device(xp: Any, value: Any) -> Any:
    """Copy the arrays of a value, of a sequence or of a dataclass to the device."""
    return _mapped(value, lambda x: xp.asarray(x) if isinstance(x, np.ndarray) else x)


def to_host(value: Any) -> Any:
    """Copy them back."""
    return _mapped(value, lambda x: x.get() if hasattr(x, "get") and hasattr(x, "dtype") else x)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Int8):
        return value.map(change)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, change) for item in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: _mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return change(value)


class OnDevice:
    """A module of `cupy_gpu` whose functions take and return host arrays.

    Arrays that a function changes in place are copied back into those that were given.
    """

    def __init__(self, xp: types.ModuleType, module: types.ModuleType) -> None:
        self._xp, self._module = xp, module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            moved = [to_device(self._xp, a) for a in args]
            result = function(*moved, **{key: to_device(self._xp, value) for key, value in kwargs.items()})
            for given, there in zip(args, moved, strict=True):
                if isinstance(given, np.ndarray) and given.flags.writeable:
                    given[...] = there.get()
            return to_host(result)

        return call


def assert_same_bits_in_any_order(xp: types.ModuleType, call: Any) -> None:
    """Run `call()`, which returns host arrays, with threads in three orders: a race between them would show.

    On a device, which has its own order, it runs three times.
    """
    found = []
    for order in range(3):
        STATE.order = order
        found.append([np.asarray(a).tobytes() for a in call()])
    STATE.order = 0
    assert found[0] == found[1] == found[2]
