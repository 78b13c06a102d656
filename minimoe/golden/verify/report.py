"""What was found over all cases: one screen of text, JSON, JUnit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compare import compare
from .kit import VERSION, Case
from .results import CaseResult, describe, details
from .words import cut

SHOWN = 3  # failing cases on the screen
LEVELS = ("op", "block", "model", "training")


@dataclass
class Report:
    """What was found over all cases.

    Attributes
    ----------
    entries : the cases that were checked, what was found, and the outputs
    total : cases in the kit
    warnings : files that belong to no case, and what else is strange
    problem : what ended the candidate's program, if anything
    allow_missing : whether cases without outputs are no failures
    """

    kit: str
    profile: str
    entries: list[tuple[Case, CaseResult, Mapping[str, Any]]]
    total: int
    warnings: list[str] = field(default_factory=list)
    problem: str = ""
    allow_missing: bool = False

    @property
    def results(self) -> list[CaseResult]:
        """One per case."""
        return [result for _, result, _ in self.entries]

    @property
    def failures(self) -> list[tuple[Case, CaseResult, Mapping[str, Any]]]:
        """Those with wrong outputs: ops before blocks before models, since what is built of wrong parts is wrong."""
        failed = [entry for entry in self.entries if entry[1].status == "fail"]
        return sorted(failed, key=lambda entry: LEVELS.index(entry[0].level) if entry[0].level in LEVELS else 9)

    @property
    def exit_status(self) -> int:
        """0 if all fits, else 1."""
        bad = {"fail"} if self.allow_missing else {"fail", "missing", "not offered"}
        return int(bool(self.problem) or any(result.status in bad for result in self.results))

    def as_json(self) -> str:
        """All of it, for machines; numbers that JSON does not have (NaN, Inf) are strings."""
        cases = [
            dataclasses.asdict(r) | {"status": r.status, "ratio": r.ratio, "routing": r.routing} for r in self.results
        ]
        found = {"kit": self.kit, "version": VERSION, "profile": self.profile, "exit_status": self.exit_status,
                 "counts": Counter(r.status for r in self.results), "problem": self.problem,
                 "warnings": self.warnings, "cases": cases}  # fmt: skip
        return json.dumps(_plain(found), indent=1, ensure_ascii=False, allow_nan=False)

    def write_junit(self, path: str | Path) -> None:
        """Write a JUnit file: one test per case."""
        suite = ET.Element("testsuite", name=f"golden kit {self.kit}", tests=str(len(self.results)))
        for result in self.results:
            test = ET.SubElement(suite, "testcase", classname=f"golden.{result.call}", name=result.id)
            says = "\n".join([describe(result), *details(result)])
            if result.status == "fail" or (result.absent and not self.allow_missing):
                ET.SubElement(test, "failure", message=_xml(describe(result))).text = _xml(says)
            elif result.absent or result.status == "deviates":
                ET.SubElement(test, "skipped", message=_xml(result.absent or f"expected to fail: {result.deviation}"))
        if self.problem:
            test = ET.SubElement(suite, "testcase", classname="golden", name="program")
            ET.SubElement(test, "error", message=_xml(self.problem))
        for kind in ("failure", "skipped", "error"):
            suite.set(kind + ("s" if kind != "skipped" else ""), str(len(suite.findall(f"testcase/{kind}"))))
        ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)

    def text(self, likely: Sequence[str] = (), paint: Callable[[str, str], str] = lambda text, colour: text) -> str:
        """One screen: a table by call, the first failures, the likely mistake, what to do next.

        Parameters
        ----------
        likely : lines about the likely mistake
        paint : paint(text, "red" | "green" | "yellow" | "bold") colours a piece of text
        """
        head = f"golden kit {self.kit}, version {VERSION} · profile {self.profile} · {len(self.entries)} cases"
        lines = [paint(head + (f" of {self.total}" if len(self.entries) < self.total else ""), "bold"), ""]
        lines += [*self._table(paint), *self._excused(), *self._deviations()]
        lines += [""] if self.failures else []
        for case, result, _ in self.failures[:SHOWN]:
            lines += [paint(f"{case.id}: {cut(describe(result), 150)}", "red")]
            lines += [f"  {cut(line, 150)}" for line in details(result)[:2]]
        if len(self.failures) > SHOWN:
            lines += [f"and {len(self.failures) - SHOWN} more cases fail (--json lists them)"]
        lines += ["", paint(f"the program: {self.problem}", "red")] if self.problem else []
        lines += [paint(f"warning: {cut(line, 150)}", "yellow") for line in self.warnings[:2]]
        lines += [f"and {len(self.warnings) - 2} more warnings"] if len(self.warnings) > 2 else []
        if likely:
            lines += ["", paint("likely mistake", "bold"), *(f"  {cut(line, 150)}" for line in likely[:6])]
        return "\n".join([*lines, "", *(paint(line, "bold") for line in self._next())])

    def _excused(self) -> list[str]:
        """Choices of passing cases that are not the golden ones, and what could not be compared because of them."""
        passing = [r for r in self.results if r.status == "pass"]
        lines = [f"{r.id}: {cut(r.notes[0], 150)}" for r in passing if r.doubted]
        cases = [r for r in passing if r.decisions]
        if not cases:
            return lines
        kinds = Counter(d.kind for r in cases for d in r.decisions)
        left = sum(t.size - t.compared for r in cases for t in r.tensors if r.forced is None)
        says = f"routing: {', '.join(f'{kind} ({n})' for kind, n in kinds.items())} in passing cases: no errors"
        return [says + (f"; {left:,} numbers that follow from them were not compared" if left else ""), *lines]

    def _deviations(self) -> list[str]:
        """The cases that fail as expected, by reason."""
        reasons: dict[str, list[str]] = {}
        for result in self.results:
            if result.status == "deviates":
                reasons.setdefault(result.deviation, []).append(result.id)
        lines = [cut(f"deviates: {', '.join(ids)}: {why}", 150) for why, ids in list(reasons.items())[:SHOWN]]
        more = sum(len(ids) for ids in list(reasons.values())[SHOWN:])
        return lines + ([f"and {more} more cases deviate (--json lists them)"] if more else [])

    def _table(self, paint: Callable[[str, str], str]) -> list[str]:
        """A row per call; where something is wrong, the calls that pass share one line."""
        calls: dict[str, list[CaseResult]] = {}
        for result in self.results:
            calls.setdefault(result.call, []).append(result)
        good = [call for call, found in calls.items() if all(r.status in ("pass", "deviates") for r in found)]
        rest = [call for call in calls if call not in good]
        rows = [call for call in calls if call in (rest[:7] if rest else good)]
        names = ("pass", "fail", "missing", "not offered")
        lines = [f"{'call':<24}{'pass':>6}{'fail':>6}{'missing':>9}{'not offered':>13}  error ÷ bound"]
        for call in rows:
            counts = Counter(r.status for r in calls[call])
            worst = max((r.ratio for r in calls[call] if r.status != "deviates"), default=0.0)
            cells = "".join(f"{counts[n] or '·':>{w}}" for n, w in zip(names, (6, 6, 9, 13), strict=True))
            colour = "red" if counts["fail"] else "green" if call in good else "yellow"
            shown = "not equal" if worst == math.inf else f"{worst:.3g}" if counts["pass"] + counts["fail"] else "·"
            lines.append(paint(f"{call:<24}{cells}  {shown}", colour))
        if len(rest) > 7:
            lines.append(f"and {len(rest) - 7} more calls: {cut(', '.join(rest[7:]), 120)}")
        if rest and good:
            cases = sum(r.status == "pass" for call in good for r in calls[call])
            lines.append(paint(f"all {cases} cases pass of {cut(', '.join(good), 120)}", "green"))
        return lines

    def _next(self) -> list[str]:
        """What to do next."""
        absent = [r for r in self.results if r.absent]
        if len(absent) == len(self.results):
            return [f"nothing was given; begin with one op: {self.results[0].id}.npz, --only '{self.results[0].call}*'"]
        if not self.failures:
            if not absent:
                but = " but the deviations" if any(r.deviation for r in self.results) else ""
                chosen = "" if len(self.entries) == self.total else " chosen"
                return [f"everything{chosen} fits{but}"]
            calls = ", ".join(dict.fromkeys(r.call for r in absent))
            return [f"everything given fits; not given: {cut(calls, 90)} (--allow-missing or --only if that is meant)"]
        if all(result.deviation for _, result, _ in self.failures):
            return ["next: strike what passes from the deviations or expected failures"]
        for profile in self.failures[0][0].profiles:
            if profile != self.profile and self._fits(profile):
                return [f"next: all that fails fits profile {profile}: if it computes that way, --profile {profile}"]
        case = self.failures[0][0]
        first = f"next: mend {case.call} first"
        if case.level == "op":
            return [f"{first}: --only '{case.call}*' checks it alone; what is built on it may then be right too"]
        if all(r.absent for r in self.results if r.level == "op"):
            return [f"{first}: outputs of the ops (rmsnorm, rope, attention, gating, experts) would narrow it down"]
        return [f"{first}: the ops given pass, so look at how they are put together"]

    def _fits(self, profile: str) -> bool:
        """Whether all that fails would pass in another profile."""
        return all(
            not result.problem and profile in case.profiles and compare(case, outputs, profile).status == "pass"
            for case, result, outputs in self.failures
        )


def _xml(text: str) -> str:
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
