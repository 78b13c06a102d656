"""What this package adds to the stand-alone verifier: the likely mistake, and adapters held against a whole kit."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimoe.golden import verify
from minimoe.golden.adapters import Adapter, NotOffered, outputs_of, time_limit
from minimoe.golden.verify import Case, CaseResult, Report

VECTORS = Path(__file__).parent / "vectors"
LARGE = 1 << 26  # bytes of a checkpoint on which known mistakes are still tried
ANSI = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}


def likely(report: Report) -> list[str]:
    """Name the mistakes that the failures look like: lines for `Report.text`, the likeliest first."""
    given = [
        (case, result, outputs)
        for case, result, outputs in report.entries
        if outputs and not result.deviation and not _large(case.model_folder)
    ]
    if all(result.status == "pass" for _, result, _ in given):  # they count too: they contradict some mistakes
        return []
    from minimoe.golden import diagnose  # it takes the whole catalogue of mistakes with it

    findings = diagnose.diagnose(given, report.profile)
    return [line for finding in findings[:2] for line in str(finding).splitlines()]


def _large(folder: Path | None) -> bool:
    """Whether trying every known mistake on a checkpoint would take too long."""
    return folder is not None and sum(path.stat().st_size for path in folder.glob("*.safetensors")) > LARGE


def as_json(report: Report, lines: Sequence[str]) -> str:
    """The report for machines, with the likely mistake."""
    return json.dumps(json.loads(report.as_json()) | {"likely": list(lines)}, indent=1, ensure_ascii=False)


def paint(text: str, colour: str) -> str:
    """Colour a piece of text for a terminal."""
    return f"\x1b[{ANSI[colour]}m{text}\x1b[0m"


def check_adapter(
    adapter: Adapter,
    kit: str | Path = VECTORS,
    only: Sequence[str] = (),
    inference: bool = False,
    progress: Callable[[Sequence[Case]], Iterable[Case]] = lambda cases: cases,
    expected: Sequence[str] = (),
    timeout: float = 0.0,
    mixtral: bool = False,
) -> Report:
    """Hold an adapter against a kit, in its own profile; what it does not offer is no failure.

    Where it chooses other experts than the golden ones and can be made to take these, it is run a second time. Its
    deviations must fail, as must the cases that `expected` names (see `verify.expected_failures`).

    Parameters
    ----------
    progress : wraps the cases while they are run, as tqdm does
    timeout : seconds for one case (see `adapters.time_limit`); 0: no limit
    """
    _, cases = verify.read_kit(kit)
    chosen = verify.select(cases, adapter.profile, only, inference, mixtral)
    must_fail = verify.expected_failures(expected, chosen) | dict(getattr(adapter, "deviations", {}))

    def load(case: Case) -> Mapping[str, Any] | None:
        try:
            with time_limit(timeout):
                return outputs_of(case, adapter.run(case))
        except NotOffered:
            return None

    with contextlib.redirect_stdout(sys.stderr):  # what it prints is not part of the report
        entries = verify.check(progress(chosen), load, adapter.profile, must_fail)
        if getattr(adapter, "forces_routing", False):
            for case, result, _ in entries:
                _force(adapter, case, result, timeout)
    return Report(str(kit), adapter.profile, entries, len(cases), allow_missing=True)


def _force(adapter: Adapter, case: Case, result: CaseResult, timeout: float) -> None:
    def run(ids: Any) -> Mapping[str, Any]:
        with time_limit(timeout):
            return outputs_of(case, adapter.run(case, ids))

    verify.force_routing(case, result, run, adapter.profile)
