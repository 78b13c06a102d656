"""How a known mistake is planted: our own code with a line edited, other parameters, or another config.

An edit names a right line of ours and the wrong one to stand in its place. Copies of the modules are made from the
edited source, and every module of the decoder that uses them gets a copy of its own that calls the edited ones; the
modules that everybody else has imported stay as they are. So a mistake in the middle of a block needs no hook in the
block, gradients that an implementation would derive from a wrong forward are edited beside it, and the right line says
by itself in which file and where the right way stands.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from minimoe.backends import ROOMS, Backend

# Each may use those before it; the rooms come before all, by way of the backend.
DECODER = ("inputs", "layers", "mixtral", "generate", "trace", "golden.calls")


@dataclass(frozen=True)
class Edit:
    """A line of ours, or several, and what stands there in the mutant.

    Attributes
    ----------
    module : without `minimoe.`
    right : occurs once in the module's source
    """

    module: str
    right: str
    wrong: str

    @property
    def where(self) -> tuple[Path, int]:
        """File and line of the right way."""
        source, path = _source(self.module)
        return path, source[: source.index(self.right)].count("\n") + 1 + self.right.startswith("\n")

    @property
    def function(self) -> str:
        """Name of the function that is edited."""
        source, _ = _source(self.module)
        return source[: source.index(self.right)].rpartition("\ndef ")[2].partition("(")[0]


def room(name: str, right: str, wrong: str) -> Edit:
    """Return an edit of a room's reference."""
    return Edit(f"ops.{name}.reference", right, wrong)


def edited_backend(ops: Backend, edits: Sequence[Edit]) -> Backend:
    """Return `ops` with the edited reference in every room that an edit names; the others stay as they are."""
    changed: dict[str, Any] = {}
    for name in ROOMS:
        mine = tuple(edit for edit in edits if edit.module == f"ops.{name}.reference")
        if mine:
            functions = vars(_copy(f"ops.{name}.reference", mine))
            old = vars(getattr(ops, name))
            changed[name] = SimpleNamespace(**{key: functions.get(key, old[key]) for key in old})
    return dataclasses.replace(ops, **changed)


@functools.cache
def edited_calls(edits: tuple[Edit, ...]) -> Any:
    """Return `minimoe.golden.calls`, or a copy of it whose decoder is edited."""
    copies: dict[str, ModuleType] = {}
    for module in DECODER:
        mine = tuple(edit for edit in edits if edit.module == module)
        if mine or copies:
            copies[f"minimoe.{module}"] = _copy(module, mine, copies)
    return copies.get("minimoe.golden.calls") or importlib.import_module("minimoe.golden.calls")


def _copy(name: str, edits: tuple[Edit, ...], copies: dict[str, ModuleType] | None = None) -> ModuleType:
    """Execute a module's edited source anew; what it imported from the modules in `copies` is taken from there."""
    original = sys.modules.get(f"minimoe.{name}") or importlib.import_module(f"minimoe.{name}")
    copy = ModuleType(original.__name__)
    vars(copy)["__file__"] = original.__file__
    exec(_compiled(name, edits), vars(copy))
    for key, value in list(vars(copy).items()):
        if isinstance(value, ModuleType):
            vars(copy)[key] = (copies or {}).get(value.__name__, value)
        elif inspect.isclass(value):  # there is one class of each name, so that instances are of the same type
            vars(copy)[key] = getattr(original, key)
        elif inspect.isfunction(value) and value.__module__ in (copies or {}):
            vars(copy)[key] = getattr((copies or {})[value.__module__], value.__name__)
    return copy


@functools.cache
def _compiled(name: str, edits: tuple[Edit, ...]) -> Any:
    source, path = _source(name)
    for edit in edits:
        if source.count(edit.right) != 1:
            raise LookupError(f"{path} must hold once what a mutant edits: {edit.right!r}")
        source = source.replace(edit.right, edit.wrong)
    return compile(source, str(path), "exec", dont_inherit=True)


@functools.cache
def _source(name: str) -> tuple[str, Path]:
    original = importlib.import_module(f"minimoe.{name}")
    assert original.__file__ is not None
    return Path(original.__file__).read_text(), Path(original.__file__)
