"""The source of an op in its three dialects, as text."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from functools import cache
from types import CodeType, ModuleType
from typing import Any

from minimoe.backends import DIALECT_FILES

_BOUNDS = re.compile(r"__launch_bounds__\([^)]*\)")
DIALECTS = {"numpy": "array code", "numba": "Numba loops", "cuda": "CUDA"}


@cache
def sources(room: str, function: str) -> dict[str, str]:
    """Return the code of one op by backend: the function, and what it calls in the same file, in the file's order.

    A dialect that has no code of its own says what runs in its place.
    """
    return {name: _dialect(room, function, file) for name, file in DIALECT_FILES.items()}


def _dialect(room: str, function: str, file: str) -> str:
    path = f"minimoe.ops.{room}.{file}"
    module = importlib.import_module(path) if importlib.util.find_spec(path) else None
    if not hasattr(module, function):
        return "# not written: the array code runs in its place" + (" over CuPy" if file == "cupy_gpu" else "")
    assert module is not None
    found: dict[str, str] = {}
    _collect(module, function, found)
    order = sorted(found, key=lambda name: inspect.getsourcelines(_plain(getattr(module, name)))[1])
    code = "\n\n".join(found[name] for name in order)
    return "\n\n".join([code, *(_launched(room, code) if file == DIALECT_FILES["cuda"] else ())])


def kernels(room: str) -> dict[str, str]:
    """Return the CUDA kernels of a room by name, each with the comment above it, which says what a thread computes."""
    module = importlib.import_module(f"minimoe.ops.{room}.{DIALECT_FILES['cuda']}")
    if not hasattr(module, "KERNELS"):
        return {}
    lines, found = module.KERNELS.read_text(encoding="utf-8").splitlines(), {}
    for i, line in enumerate(lines):
        if "__global__" in line:
            first = next((j + 1 for j in reversed(range(i)) if not lines[j]), 0)  # a blank line parts definitions
            text = "\n".join(lines[first : lines.index("}", i) + 1])
            declared = _BOUNDS.sub("", text[text.index("__global__") :])
            found[declared[: declared.index("(")].split()[-1]] = text
    return found


def _launched(room: str, code: str) -> list[str]:
    """The kernels that `code` launches by name."""
    return [text for name, text in kernels(room).items() if re.search(rf"\"{name}[<{{\"]", code)]


def _collect(module: ModuleType, name: str, found: dict[str, str]) -> None:
    """Add a function's source, and those of all functions of the same module that it names."""
    function = _plain(getattr(module, name, None))
    if name in found or not inspect.isfunction(function) or function.__module__ != module.__name__:
        return
    found[name] = inspect.getsource(function).rstrip()
    for other in _names(function.__code__):
        _collect(module, other, found)


def _names(code: CodeType) -> list[str]:
    """The global names that a function uses, those of functions inside it too."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for each in inner for name in _names(each))]


def _plain(function: Any) -> Any:
    """The Python function behind a jitted one."""
    return inspect.unwrap(getattr(function, "py_func", function)) if callable(function) else function
