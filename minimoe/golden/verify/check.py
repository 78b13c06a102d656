"""All chosen cases of a kit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .compare import compare
from .files import read_outputs, unknown_files
from .kit import Case, KitError, read_kit
from .report import Report
from .results import CaseResult
from .words import brief, similar


def select(
    cases: Sequence[Case], profile: str, only: Sequence[str] = (), inference: bool = False, mixtral: bool = False
) -> list[Case]:
    """Return the cases that have bounds for a profile and match one of the patterns, by id or by call.

    Parameters
    ----------
    inference, mixtral : leave out what only training needs, and what only Grok-1 does

    Raises
    ------
    KitError
        If there are none, or a pattern matches nothing.
    """
    known = sorted({name for case in cases for name in case.profiles})
    if profile not in known:
        raise KitError(f"no case has bounds for profile {profile!r}; there are {', '.join(known)}")
    out = {"training": inference, "grok": mixtral}
    found = [case for case in cases if profile in case.profiles and not any(out.get(tag, False) for tag in case.tags)]
    return matching(found, only) if only else found


def matching(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Return the cases whose id or call matches one of the patterns.

    Raises
    ------
    KitError
        If a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(_matches(case, [pattern]) for case in cases):
            near = similar(pattern, [*{case.call for case in cases}, *(case.id for case in cases)])
            raise KitError(f"no case matches {pattern!r}{near}")
    return [case for case in cases if _matches(case, patterns)]


def _matches(case: Case, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in (case.id, case.call) for pattern in patterns)


def check(
    cases: Iterable[Case],
    load: Callable[[Case], Mapping[str, Any] | None],
    profile: str,
    expected: Mapping[str, str] | None = None,
) -> list[tuple[Case, CaseResult, Mapping[str, Any]]]:
    """Compare the outputs that `load` returns; a call without any (None) is not offered.

    What `load` raises is that case's problem; the others are still checked. `expected` are patterns of the cases that
    must fail, with the reason.
    """
    entries: list[tuple[Case, CaseResult, Mapping[str, Any]]] = []
    for case in cases:
        result, outputs = CaseResult(case.id, case.call, case.level, case.why), None
        try:
            outputs = load(case)
        except (Exception, SystemExit) as error:  # whatever a candidate raises is its case's problem
            result.problem = str(error) if isinstance(error, KitError) else brief(error)
        else:
            result.absent = "missing" if outputs is None else ""
        if outputs is not None:
            result = compare(case, outputs, profile)
        result.deviation = next((why for pattern, why in (expected or {}).items() if _matches(case, [pattern])), "")
        entries.append((case, result, outputs or {}))
    offered = {case.call for case, result, _ in entries if result.absent != "missing"}
    for case, result, _ in entries:
        result.absent = "not offered" if result.absent and case.call not in offered else result.absent
    return entries


def check_folder(
    kit: str | Path, outputs: str | Path, profile: str = "float32", only: Sequence[str] = (), inference: bool = False,
    allow_missing: bool = False, expected: Sequence[str] = (), mixtral: bool = False,
) -> Report:  # fmt: skip
    """Hold a folder of outputs against a kit; `expected` names the cases that must fail, see `expected_failures`.

    Raises
    ------
    KitError
        If the kit or the folder cannot be read, nothing is selected, or there are no outputs at all.
    """
    _, cases = read_kit(kit)
    chosen = select(cases, profile, only, inference, mixtral)
    if not Path(outputs).is_dir():
        raise KitError(f"{outputs}: there is no such folder of outputs")
    entries = check(chosen, lambda case: read_outputs(outputs, case), profile, expected_failures(expected, chosen))
    warnings = unknown_files(outputs, cases)
    if all(result.absent for _, result, _ in entries):
        found = f" ({warnings[0]})" if warnings else ""
        raise KitError(f"{outputs}: holds no outputs of {chosen[0].id}.npz or any other chosen case{found}")
    return Report(str(kit), profile, entries, len(cases), warnings, allow_missing=allow_missing)


def expected_failures(given: Sequence[str], cases: Sequence[Case]) -> dict[str, str]:
    """Return {pattern: reason} of the cases that must fail.

    Parameters
    ----------
    given : patterns; or files that have a pattern a line, with its reason after a #

    Raises
    ------
    KitError
        If a pattern matches none of the cases.
    """
    found: dict[str, str] = {}
    for one in given:
        lines = Path(one).read_text(encoding="utf-8").splitlines() if Path(one).is_file() else [one]
        for line in lines:
            pattern, _, reason = (part.strip() for part in line.partition("#"))
            if pattern:
                found[pattern] = reason or "expected to fail"
    matching(cases, list(found))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose what is checked, and how the report is given."""
    parser.add_argument("--profile", default="float32", metavar="NAME", help="number formats (default float32)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cases or calls, as 'gating*'")
    parser.add_argument("--inference", action="store_true", help="leave out what only training needs")
    parser.add_argument("--mixtral", action="store_true", help="leave out what only Grok-1 does")
    parser.add_argument("--allow-missing", action="store_true", help="cases without outputs are no failures")
    parser.add_argument(
        "--expect-failure", action="append", default=[], metavar="PATTERN",
        help="these must fail: a pattern, or a file with one a line and its reason after a #",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--junit", metavar="FILE", help="also write a JUnit file")
