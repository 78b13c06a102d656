"""Adapters: how an implementation written in Python takes the kit's cases.

    class Mine(Adapter):
        profile = "float32"

        def rmsnorm(self, inputs, settings, folder):
            return {"y": my_norm(inputs["x"], inputs["weight"], settings["eps"])}

A method per call of the table in `calls`, dots written as underscores (`gating_backward`); what has no method is not
offered, and skipped. `pytest --minimoe-adapter my_module:Mine` then holds it against the kit.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16, to_host
from minimoe.backends import Backend, make_backend
from minimoe.checkpoint import load_params
from minimoe.golden import calls
from minimoe.golden.calls import CALLS, Arrays, GoldenModel
from minimoe.golden.cases.draw import GROK
from minimoe.golden.profiles import PROFILES, Profile
from minimoe.golden.verify import Case
from minimoe.params import map_leaves

METHODS = {name.replace(".", "_"): name for name in CALLS}


class AdapterError(ValueError):
    """An adapter that cannot be used as it is written; the message says what to change."""


class NotOffered(Exception):
    """The implementation does not have what a case asks for: the case is skipped."""


class Adapter:
    """Base of adapters: `run` hands a case to the method named after its call.

    Attributes
    ----------
    profile : the numeric profile to be held to; see `profiles`
    forces_routing : whether methods take `inputs["ids"]` where the table offers it, and route by it. If so, the golden
        choices can be imposed, which tells a wrong router from what follows a different choice.
    grok : whether methods obey the optional settings and the configs of Grok-1; if not, its cases are skipped
    """

    profile = "float32"
    forces_routing = False
    grok = False

    def __init_subclass__(cls, **settings: Any) -> None:
        """Refuse a method that is nearly a call's name: it would silently never be called."""
        super().__init_subclass__(**settings)
        bare = {method.replace("_", ""): method for method in METHODS if not hasattr(cls, method)}
        for name, value in vars(cls).items():
            if name.startswith("_") or not callable(value) or name in METHODS or hasattr(Adapter, name):
                continue
            if near := difflib.get_close_matches(name.replace("_", "").lower(), bare, n=1, cutoff=0.85):
                raise AdapterError(
                    f"{cls.__name__}.{name}: there is no call of this name; {bare[near[0]]!r} is meant, it seems "
                    "(helpers of your own may begin with an underscore)"
                )

    @property
    def deviations(self) -> Mapping[str, str]:
        """What the implementation does otherwise on purpose: {pattern of cases: why}; these cases must fail."""
        return {}

    def run(self, case: Case, ids: Any = None) -> Arrays:
        """Return the outputs of a case by name.

        Parameters
        ----------
        case : its `inputs` are float32, ids and positions int64, masks bool; copies, so a method may change them
        ids : the routing to impose, where the adapter supports that

        Raises
        ------
        NotOffered
            If there is no method for the case's call, or routing cannot be imposed.
        AdapterError
            If the method returns what cannot be read as the call's outputs.
        """
        method = getattr(self, case.call.replace(".", "_"), None)
        if method is None:
            raise NotOffered(f"{type(self).__name__} has no method {case.call.replace('.', '_')}")
        if GROK in case.tags and not self.grok:
            raise NotOffered(f"{type(self).__name__} does not do what Grok-1 does otherwise (grok is False)")
        inputs = {name: np.array(x) for name, x in case.inputs.items()}
        if ids is not None:
            self.check_forcing(case)
            inputs["ids"] = np.array(ids)
        return outputs_of(case, method(inputs, dict(case.settings), case.model_folder))

    def check_forcing(self, case: Case) -> None:
        """Raise NotOffered unless routing can be imposed on this call."""
        if not self.forces_routing:
            raise NotOffered(f"{type(self).__name__} does not force routing (forces_routing is False)")
        if not any(tensor.name == "ids" for tensor in CALLS[case.call].inputs):
            raise NotOffered(f"{case.call} takes no routing")


class OurBackend(Adapter):
    """One of this package's own backends, in float64, float32 or its own bfloat16."""

    forces_routing = True

    def __init__(self, backend: str | Backend = "auto", profile: str = "float32") -> None:
        self.profile = profile
        if self._profile.compute is None:
            known = ", ".join(name for name, p in PROFILES.items() if p.compute is not None)
            raise AdapterError(f"our backends have no profile {profile!r}; they have {known}")
        self._backend = backend
        self._models: dict[Path, GoldenModel] = {}

    @cached_property
    def ops(self) -> Backend:
        """The backend, made when it is first needed."""
        return make_backend(self._backend) if isinstance(self._backend, str) else self._backend

    @property
    def _profile(self) -> Profile:
        if self.profile not in PROFILES:
            raise AdapterError(f"there is no profile {self.profile!r}; there are {', '.join(PROFILES)}")
        return PROFILES[self.profile]

    def run(self, case: Case, ids: Any = None) -> Arrays:
        """Compute a case; outputs stored in bfloat16 are widened to float32."""
        inputs = dict(case.inputs)
        if ids is not None:
            self.check_forcing(case)
            inputs["ids"] = np.asarray(ids)
        inputs = calls.cast(case.call, inputs, self._profile.compute, self._profile.store)
        model = None if case.model_folder is None else self._model(case.model_folder)
        return {name: _as_numpy(x) for name, x in calls.run(case.call, self.ops, inputs, case.settings, model).items()}

    def _model(self, folder: Path) -> GoldenModel:
        if folder not in self._models:
            config, params = load_params(folder)
            params = map_leaves(params, lambda w: w.astype(self._profile.store, copy=False))
            self._models = {folder: GoldenModel(config, params)}  # one at a time: a user's own may be large
        return self._models[folder]


def outputs_of(case: Case, result: Any) -> Arrays:
    """Read what an implementation returned as the outputs of a case.

    Parameters
    ----------
    result : {name: array}; or one array, or a tuple of arrays, in the order of the required outputs (of all outputs,
        where there are so many). Arrays are whatever NumPy can read, also torch tensors on any device.

    Raises
    ------
    AdapterError
    """
    if isinstance(result, Mapping):
        return {str(name): _as_numpy(x, f"output {name!r}") for name, x in result.items()}
    found = list(result) if isinstance(result, tuple | list) and not _is_number(result) else [result]
    every = [output.name for output in case.outputs]
    required = [output.name for output in case.outputs if output.required]
    names = next((names for names in (required, every) if len(names) == len(found)), None)
    if names is None or result is None:
        what = "nothing" if result is None else f"{len(found)} arrays" if len(found) != 1 else "one array"
        raise AdapterError(f"{case.call} returned {what}; it should return {_wanted(required, every)}")
    return {name: _as_numpy(x, f"output {name!r}") for name, x in zip(names, found, strict=True)}


def load(spec: str) -> Adapter:
    """Return the adapter that `module:Name` or `path/to/file.py:Name` names: a class or function is called, without
    arguments.

    Raises
    ------
    AdapterError
        If there is no such file, module or name, or it has no `run`.
    """
    where, colon, name = spec.rpartition(":")
    if not (where and colon and name):
        raise AdapterError(f"{spec!r}: an adapter is given as module:Name or path/to/file.py:Name")
    module = _import(where)
    if not hasattr(module, name):
        raise AdapterError(f"{where} has no {name!r}{_similar(name, [n for n in vars(module) if n[0] != '_'])}")
    made = getattr(module, name)
    if isinstance(made, type) or (callable(made) and not hasattr(made, "run")):
        made = made()
    if not callable(getattr(made, "run", None)):
        raise AdapterError(f"{spec}: has no method `run`; derive it from minimoe.golden.adapters.Adapter")
    return made  # type: ignore[no-any-return]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer: an adapter that loops or waits for ever. 0: no limit.

    Only Python's main thread can be interrupted so, where there is SIGALRM, and only between two steps of Python code:
    for what hangs inside a library, start a program of its own with `minimoe golden run`.
    """
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"gave no answer within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        # The command pytest does not put the current folder on the path, as `python -m pytest` does.
        sys.path.append(str(Path.cwd()))
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
                raise AdapterError(f"there is no module {where!r} here; a file is given as path/to/file.py") from None
            raise
        finally:
            sys.path.remove(str(Path.cwd()))
    path = Path(where)
    if not path.is_file():
        raise AdapterError(f"{where}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _similar(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _wanted(required: list[str], every: list[str]) -> str:
    names = ", ".join(required)
    more = [name for name in every if name not in required]
    tail = f" (and, if you have them, {', '.join(more[:4])}{', …' if len(more) > 4 else ''})" if more else ""
    return (names if len(required) == 1 else f"the {len(required)} arrays {names}, in this order or in a dict") + tail


def _is_number(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float | list) for x in value)


def _as_numpy(value: Any, what: str = "an output") -> np.ndarray:
    """Read an array of whatever library; bfloat16, which NumPy lacks, is widened."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(to_host(value) if hasattr(value, "dtype") else value)
    except Exception as error:
        raise AdapterError(f"{what} is no array: {type(value).__name__} ({error})") from None
    if array.dtype == BFLOAT16:
        return array.astype(np.float32)
    if array.dtype == object or array.dtype.kind in "USV":
        raise AdapterError(f"{what} is no array of numbers: {type(value).__name__}")
    return array
