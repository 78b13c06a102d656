"""While the tests run, every call of an op is held to the shapes and dtypes its annotations promise.

Only the launchers that a room's contract names are wrapped, by replacing them in their modules: never a jitted function
(its globals are read when it is compiled), and never in production, where a checked call would cost more than a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import AbstractArray, jaxtyped

import minimoe.ops
from minimoe.arrays import cupy_module
from tests.cuda_on_cpu import compiling
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE

ROOMS = sorted(path.parent.name for path in Path(minimoe.ops.__path__[0]).glob("*/reference.py"))
DIALECTS = ("reference", "numba_cpu", "cupy_gpu")


def contract(room: str) -> type:
    """The Protocol that a room's __init__.py defines."""
    package = importlib.import_module(f"minimoe.ops.{room}")
    [protocol] = [
        c for c in vars(package).values() if getattr(c, "_is_protocol", False) and c.__module__ == package.__name__
    ]
    return protocol


def launchers(room: str) -> dict[str, Callable[..., Any]]:
    """The functions that a contract names."""
    return {name: f for name, f in vars(contract(room)).items() if inspect.isfunction(f) and name[0] != "_"}


def module_of(room: str, dialect: str) -> types.ModuleType | None:
    """A dialect of a room, or None where it is not written."""
    name = f"minimoe.ops.{room}.{dialect}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def problem(value: Any, hint: Any) -> str | None:
    """What is wrong with a value under its annotation; None where nothing is, or where the annotation is no shape."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        if isinstance(value, hint):
            return None
        return f"{getattr(value, 'dtype', type(value))} {getattr(value, 'shape', '')} is not {hint.__name__}"
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        problems = [problem(value, part) for part in parts if (part is type(None)) == (value is None)]
        return None if None in problems else " and ".join(map(str, problems)) or f"{value!r} is not {hint}"
    if origin is tuple:
        if not isinstance(value, tuple) or len(value) != len(parts):
            return f"{type(value)} is not {hint}"
        return next((p for p in map(problem, value, parts) if p), None)
    if origin in (list, Sequence):  # an array of stacked weights is as good as a list of them
        return next((p for p in (problem(item, parts[0]) for item in value) if p), None)
    if hint in (float, int, bool) and value is not None:
        numbers = {float: (int, float), int: int, bool: bool}[hint]
        return None if isinstance(value, numbers) else f"{type(value)} is not {hint}"
    return None


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a launcher: one letter means one size, in all arguments and results of a call."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            for name, value in bound.items():
                if wrong := problem(value, hints[name]):
                    raise TypeError(f"{function.__module__}.{function.__name__}, argument {name}: {wrong}")
            result = function(*args, **kwargs)
            if wrong := problem(result, hints["return"]):
                raise TypeError(f"{function.__module__}.{function.__name__}, result: {wrong}")
        return result

    return call


@pytest.fixture(scope="session", autouse=True)
def _shapes_are_checked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for room in ROOMS:
            for dialect in DIALECTS:
                if (module := module_of(room, dialect)) is not None:
                    for name in [*launchers(room), "explain"]:
                        if name in vars(module):
                            patch.setattr(module, name, checked(getattr(module, name)))
        yield


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """CuPy on a device where there is one, and in any case the stand-in, whose kernels run on the processor."""
    if request.param == "device":
        return device_cupy()
    if compiling.COMPILER is None:
        pytest.skip("g++ is not installed: CUDA kernels cannot be compiled for the processor")
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    monkeypatch.setattr(STATE, "order", 0)
    monkeypatch.setattr(STATE, "recording", None)
    return STAND_IN


def device_cupy() -> types.ModuleType:
    """CuPy, or a skip with the reason."""
    try:
        return cupy_module()
    except ValueError as error:
        pytest.skip(str(error))
