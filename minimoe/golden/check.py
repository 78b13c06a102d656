"""One op at a time, in a notebook: `minimoe.check("gating", my_function)`.

The function gets the inputs and settings of every case of that call, and what it returns is held against the truth.
Nothing that it does wrong is raised: all is printed, the first failure at some length.
"""

from __future__ import annotations

import html
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.checkpoint import load_params
from minimoe.golden import calls, report
from minimoe.golden.adapters import NotOffered, outputs_of
from minimoe.golden.calls import CALLS, Arrays, Call
from minimoe.golden.verify import Case, CaseResult, Report, compare, describe, details, read_kit, select
from minimoe.golden.verify.words import brief, cut, similar
from minimoe.params import named

_WIDTH = 105  # what a notebook's page holds
# What block, model and training functions may ask for by name, besides inputs and settings.
_MODEL = ("params", "config", "folder")


@dataclass
class Checked:
    """What `check` found: true where every case that the function takes passes, and it takes some.

    Attributes
    ----------
    results : one per case, with every tensor's error ÷ bound
    skipped : {case: why}, cases with an input that the function does not take
    likely : lines that name the likely mistake
    """

    call: str
    results: list[CaseResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    likely: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[CaseResult]:
        """The cases that fail."""
        return [result for result in self.results if result.status != "pass"]

    def __bool__(self) -> bool:
        return bool(self.results) and not self.failures

    def __repr__(self) -> str:
        passed, tried = len(self.results) - len(self.failures), len(self.results)
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.call}: {passed} of {tried} cases pass{skipped}"

    def _repr_html_(self) -> str:
        colour, mark = ("#1a7f37", "✓") if self else ("#cf222e", "✗")
        return f'<span style="color: {colour}">{mark} {html.escape(repr(self))}</span>'


def check(
    call: str, function: Callable[..., Any] | Any, *, profile: str = "float32", kit: str | Path | None = None
) -> Checked:
    """Hold a function against every case of a call of the golden kit, and print what is found.

    Parameters
    ----------
    call : an entry of the kit's table, as "rmsnorm", "attention", "gating", "experts", "gating.backward", "block";
        or one case of it, as "gating/ties-all"
    function : called with copies of a case's inputs and settings: by keyword if its parameters have their names,
        else by position in the order of the table, inputs before settings. It returns {name: array}, or the array, or a
        tuple of arrays in the order of the table. For a block or model it may ask for `params` ({name: array}),
        `config` and `folder` too. An object with a method `run` is taken for an adapter.
    profile : numeric profile, with "float64" for functions that compute in float64; inputs are float32 in the others
    kit : folder of another kit than the bundled one

    Raises
    ------
    ValueError
        If there is no such call, or the parameters of the function are not those of the call.
    """
    name = _call_of(call)
    _, cases = read_kit(report.VECTORS if kit is None else kit)
    chosen = select(cases, profile, [call if "/" in call else name])
    found = Checked(call)
    entries: list[tuple[Case, CaseResult, Mapping[str, Any]]] = []
    for case in chosen:
        result, outputs = CaseResult(case.id, case.call, case.level, case.why), None
        try:
            outputs = _outputs(case, function, profile)
        except NotOffered as reason:
            found.skipped[case.id] = str(reason)
            continue
        except _Raised as error:
            result.problem = str(error)
        else:
            result = compare(case, outputs, profile)
        found.results.append(result)
        entries.append((case, result, outputs or {}))
    found.likely = report.likely(Report("", profile, entries, len(cases)))
    print("\n".join(_lines(found, {case.id: case for case in chosen})))
    return found


class _Raised(Exception):
    """The function raised an exception, or returned what is no output."""


def _call_of(call: str) -> str:
    wanted = call.partition("/")[0]
    name = next((known for known in CALLS if wanted in (known, known.replace(".", "_"))), None)
    if name is None:
        raise ValueError(f"there is no call {wanted!r}{similar(wanted, list(CALLS))} The calls: {', '.join(CALLS)}")
    return name


def _outputs(case: Case, function: Any, profile: str) -> Arrays:
    if callable(adapted := getattr(function, "run", None)):
        run = partial(adapted, case)
    else:
        dtype = np.float64 if profile == "float64" else np.float32
        copies = {name: np.array(x) for name, x in case.inputs.items()}
        values = calls.cast(case.call, copies, dtype, dtype) | dict(case.settings)
        args, kwargs = _arguments(case, function, values, dtype)
        run = partial(function, *args, **kwargs)
    try:
        returned = run()
        if returned is None:
            wanted = [tensor.name for tensor in CALLS[case.call].outputs if not tensor.optional]
            raise _Raised(f"your function returns nothing yet; it should return {', '.join(wanted)}")
        return outputs_of(case, returned)
    except (NotOffered, _Raised):
        raise
    except Exception as error:  # whatever the function raises is shown, and the other cases are still checked
        raise _Raised(brief(error) + _place(error)) from error


def _arguments(case: Case, function: Any, values: dict[str, Any], dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and keyword arguments for one case; NotOffered where the function has no room for one."""
    call = CALLS[case.call]
    order = [*(tensor.name for tensor in call.inputs), *call.settings, *call.optional]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin
        parameters = [inspect.Parameter("values", inspect.Parameter.VAR_POSITIONAL)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        if more := [name for name in call.optional if name in values]:
            raise NotOffered(f"your function does not name {' and '.join(more)}")
        return [values[name] for name in order if name in values], {}
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    free = {p.name for p in parameters if p.default is not p.empty}
    known = {*order, *(_MODEL if case.model is not None else ())}
    if not all(name in known or name in free for name in names):
        return _by_position(call, [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY], order, values), {}
    if len(names) < len(parameters):  # **others
        names += [name for name in values if name not in names]
    optional = {*(tensor.name for tensor in call.inputs if tensor.optional), *call.optional}
    if lacking := [name for name in values if name not in names and name not in optional]:
        raise ValueError(f"the function takes no {' and no '.join(lacking)}; {call.name} has {', '.join(order)}")
    if more := [name for name in values if name not in names]:
        raise NotOffered(f"your function takes no {' and no '.join(more)}")
    values = values | _model_values(case, names, dtype)
    return [], {name: values.get(name) for name in names if name in values or name not in free}


def _by_position(call: Call, places: list[str], order: list[str], values: dict[str, Any]) -> list[Any]:
    """The function has names of its own: give it what the case has, or everything, with None for what it has not."""
    present = [name for name in order if name in values]
    usual = order[: len(order) - len(call.optional)]
    layout = next((names for names in (order, usual) if len(places) >= len(names)), present)
    optional = [*(tensor.name for tensor in call.inputs if tensor.optional), *call.optional]
    short = len(places) < len(layout)
    if more := [name for name in optional if name in values and (short or name not in layout)]:
        raise NotOffered(f"your function has no place for {' and '.join(more)}")
    swapped = any(place != name and place in order for place, name in zip(places, layout, strict=False))
    if swapped or len(places) != len(layout):
        raise ValueError(
            f"the function's parameters ({', '.join(places)}) are neither named nor ordered as those of {call.name}: "
            f"{', '.join(order)}"
        )
    return [values.get(name) for name in layout]


def _model_values(case: Case, names: list[str], dtype: Any) -> dict[str, Any]:
    if case.model_folder is None or not any(name in names for name in _MODEL):
        return {}
    config, params = load_params(case.model_folder)
    arrays = {name: w.astype(dtype) for name, w in named(params)} if "params" in names else {}
    return {"params": arrays, "config": config, "folder": case.model_folder}


def _place(error: BaseException) -> str:
    """Where in the user's code an exception was raised."""
    here = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != here]
    return f" in line {frames[0].lineno}: {frames[0].line}" if frames else ""


def _lines(found: Checked, cases: dict[str, Case]) -> list[str]:
    """What is printed: a line per case, then the first failure, its cause and what to look at."""
    width = max((len(case_id.partition("/")[2]) for case_id in cases), default=0) + 2
    lines = [repr(found)]
    problems = {result.problem for result in found.results}
    same = len(found.results) > 1 and len(problems) == 1 and problems != {""}
    if same:  # a function that is not written yet fails in one way only
        lines.append(cut(f"  FAIL  every case: {found.results[0].problem}", _WIDTH))
    for result in () if same else found.results:
        passed = result.status == "pass"
        says = f"error ÷ bound {result.ratio:.2g}" if passed else describe(result)
        name = result.id.partition("/")[2]
        lines.append(cut(f"  {'pass' if passed else 'FAIL'}  {name:<{width}}{says}", _WIDTH))
    lines += [f"  skip  {name.partition('/')[2]:<{width}}{why}" for name, why in found.skipped.items()]
    if found.failures:
        first = found.failures[0]
        lines += ["", f"{first.id}: {describe(first)}", *(f"  {line}" for line in details(first))]
        lines.append(f"  its inputs: {_shapes(cases[first.id])}")
    if found.likely:
        lines += ["", "likely mistake", *(f"  {line}" for line in found.likely)]
    return lines


def _shapes(case: Case) -> str:
    sizes = {name: "(" + ", ".join(map(str, x.shape)) + ")" for name, x in case.inputs.items()}
    return ", ".join([*(f"{n} {s}" for n, s in sizes.items()), *(f"{n} = {v}" for n, v in case.settings.items())])
