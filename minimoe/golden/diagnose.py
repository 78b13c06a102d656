"""Name the mistake: whose outputs do the candidate's match?

Every known mistake is planted in our own code, and what it outputs for the failing cases is held against what the
candidate gave. Ops come first: a mistake that shows there is not looked for in a model. Of the mistakes that match, the
one that explains most is named, then that which explains most of the rest, and so on. Mistakes that nothing given tells
apart are named together. What no known mistake explains may still have a symptom (see `symptoms`).

A passing case *contradicts* a mistake that would have made it fail: fully where it is the same call, less where it is
another one, since an implementation often has separate code for its ops and its model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minimoe.golden import symptoms, verify
from minimoe.golden.matching import Outputs, Planted, alike, fails
from minimoe.golden.mutants import MUTANTS, Mutant
from minimoe.golden.verify import Case, CaseResult

SLACK = 2.0  # bounds within which outputs are the same: a mistake may enlarge roundings
MISSES = 3  # cases of a model that do not match, after which a mistake is given up
LEVELS = ("op", "block", "model", "training")
Results = Sequence[tuple[Case, CaseResult, Outputs]]


@dataclass(frozen=True)
class Finding:
    """A mistake, several that nothing given tells apart, or a symptom.

    Attributes
    ----------
    names, says, remedies, where : of each mistake; `where` is the file and line that show the right way
    explained : ids of the failing cases that it explains
    failing : number of cases that fail
    confidence : "certain", "likely", "possible", or "symptom"
    together : further cases that it explains together with the findings before it
    """

    names: tuple[str, ...]
    says: tuple[str, ...]
    remedies: tuple[str, ...]
    where: tuple[tuple[Path, int] | None, ...]
    explained: tuple[str, ...]
    failing: int
    confidence: str
    together: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The finding in words."""
        share = f"explains {len(self.explained)} of {self.failing} failing cases"
        share += f", and {len(self.together)} more together with the one before" if self.together else ""
        what = self.names[0] if len(self.names) == 1 else f"one of {len(self.names)}"
        found = [f"{self.confidence}: {what}, {share}"]
        for name, says, remedy, where in zip(self.names, self.says, self.remedies, self.where, strict=True):
            found.append(f"  {says}" if len(self.names) == 1 else f"  {name}: {says}")
            found.append(f"    mend: {remedy}" + (f" ({_short(*where)})" if where else ""))
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(eq=False)
class _Suspect:
    """A mutant that matches some failing case."""

    mutant: Mutant
    explained: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)  # of these, those whose optional outputs match, too
    strong: int = 0
    weak: int = 0


def diagnose(results: Results, profile: str = "float32") -> list[Finding]:
    """Return what explains the failing cases, the best explanation first; nothing where nothing fails.

    Parameters
    ----------
    results : (case, how it compares, the candidate's outputs) of every case, passing ones included
    """
    failing = [(case, outputs) for case, result, outputs in results if result.status == "fail"]
    passing = [case for case, result, _ in results if result.status == "pass"]
    if not failing:
        return []
    number = len(failing)
    findings: list[Finding] = []
    if unwritten := symptoms.unwritten(failing):
        findings.append(_symptom(unwritten, number))
        failing = [(case, outputs) for case, outputs in failing if case.id not in unwritten.cases]
    planted = Planted()
    suspects = [s for s in _suspects(failing, profile, planted) if _stands(s, passing, profile, planted)]
    rest = {case.id for case, _ in failing}
    chosen: list[Mutant] = []
    while group := _best(suspects, [case for case, _ in failing if case.id in rest]):
        explained = group[0].explained & rest
        chosen.append(group[0].mutant)
        joint = _joint(chosen, [pair for pair in failing if pair[0].id in rest - explained], profile, planted)
        findings.append(_finding(group, explained, number, joint))
        rest -= explained | set(joint)
    if _random(results, profile):
        unsteady = {case.id for case, _ in failing if case.id in rest and case.level != "op"}
        jitter = next(mutant for mutant in MUTANTS if mutant.planted == "random")
        findings.append(_finding([_Suspect(jitter, unsteady)], unsteady, number, ()))
        rest -= unsteady
    left = [(case, outputs) for case, outputs in failing if case.id in rest]
    return [*findings, *(_symptom(symptom, number) for symptom in symptoms.find(left, profile))]


@functools.cache
def tells_apart(mutant: Mutant, kit: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Return, by profile, the cases of a kit (the bundled one) in which a mistake leaves the bounds."""
    _, cases = verify.read_kit(kit or Path(__file__).parent / "vectors")
    found: dict[str, tuple[str, ...]] = {}
    planted = Planted()
    for case in cases:
        outputs = planted([mutant], case)
        for profile in case.profiles:
            if outputs is not None and _allowed(mutant, profile) and fails(case, outputs, profile):
                found[profile] = (*found.get(profile, ()), case.id)
    return found


def twins(profile: str = "float32") -> list[tuple[str, ...]]:
    """Return the sets of mistakes that no output of the bundled kit tells apart, by name.

    A mistake that is random, or that no case of this profile shows, is in none.
    """
    groups: dict[tuple[str, ...], list[list[Mutant]]] = {}
    cases = {case.id: case for case in verify.read_kit(Path(__file__).parent / "vectors")[1]}
    planted = Planted()

    def same(one: Mutant, other: Mutant, ids: tuple[str, ...]) -> bool:
        pairs = ((cases[id], planted([one], cases[id]), planted([other], cases[id])) for id in ids)
        return all(
            a is not None
            and b is not None
            and all(alike(case, a, b, profile, 1.0, required) for required in (True, False))
            for case, a, b in pairs
        )

    for mutant in MUTANTS:
        ids = tells_apart(mutant).get(profile, ())
        if not ids or mutant.planted == "random":
            continue
        sets = groups.setdefault(ids, [])
        mine = next((found for found in sets if same(mutant, found[0], ids)), None)
        if mine is None:
            sets.append([mutant])
        else:
            mine.append(mutant)
    return [tuple(m.name for m in found) for sets in groups.values() for found in sets if len(found) > 1]


def _allowed(mutant: Mutant, profile: str) -> bool:
    return not mutant.profiles or profile in mutant.profiles


def _suspects(failing: Iterable[tuple[Case, Outputs]], profile: str, planted: Planted) -> list[_Suspect]:
    """The mutants that match a failing case. Cases of ops are all tried, of models until some do not match."""
    failing = sorted(failing, key=lambda pair: (LEVELS.index(pair[0].level), _cost(pair[0])))
    found = []
    for mutant in MUTANTS:
        if mutant.planted == "random" or mutant.harmless or not _allowed(mutant, profile):
            continue
        suspect, misses = _Suspect(mutant), 0
        for case, outputs in failing:
            if case.level != "op" and misses >= MISSES and not suspect.explained:
                break
            match = _matches([mutant], case, outputs, profile, planted)
            if match:
                suspect.explained.add(case.id)
                wrong = planted([mutant], case)
                if alike(case, outputs, wrong or {}, profile, SLACK, required=False):
                    suspect.inner.add(case.id)
            misses += match is False and case.level != "op"
        if suspect.explained:
            found.append(suspect)
    return found


def _matches(mutants: Sequence[Mutant], case: Case, outputs: Outputs, profile: str, planted: Planted) -> bool | None:
    """Whether the candidate's outputs are those of the mutants; None where the mistake would not make the case fail."""
    wrong = planted(mutants, case)
    if wrong is None:
        return None
    if not alike(case, wrong, case.truth, profile):
        return alike(case, outputs, wrong, profile, SLACK)
    given = {name: x for name, x in wrong.items() if name in outputs}  # it may show only in what was given beyond need
    if not alike(case, given, case.truth, profile, required=False):
        return alike(case, outputs, given, profile, SLACK, required=False)
    return None


def _cost(case: Case) -> int:
    return sum(math.prod(output.shape) for output in case.outputs)


def _stands(suspect: _Suspect, passing: Sequence[Case], profile: str, planted: Planted) -> bool:
    """Count the passing cases that the mistake would have made fail; False where they outweigh what it explains."""
    calls = {id.partition("/")[0] for id in suspect.explained}
    for case in passing:
        wrong = planted([suspect.mutant], case)
        if wrong is not None and fails(case, wrong, profile):
            suspect.strong += case.call in calls
            suspect.weak += case.call not in calls
    return suspect.strong < len(suspect.explained)


def _best(suspects: list[_Suspect], rest: Sequence[Case]) -> list[_Suspect]:
    """The suspect that explains most of the rest, nearest to the ops, and is contradicted least; several if equal.

    A few token ids may agree by chance: they count where a suspect explains nothing else.
    """
    level = {case.id: LEVELS.index(case.level) for case in rest}
    numbers = {case.id for case in rest if any(o.required and o.kind == "float" for o in case.outputs)}
    gains = {suspect: gain for suspect in suspects if (gain := suspect.explained & set(level))}
    if not gains:
        return []
    gains = {suspect: gain & numbers or gain for suspect, gain in gains.items()}
    first = min(level[id] for gain in gains.values() for id in gain)

    def key(suspect: _Suspect) -> tuple[int, ...]:
        gain = gains[suspect]
        nearest = sum(level[id] == first for id in gain)
        return nearest - suspect.strong, bool(gain & numbers), len(gain), -suspect.weak, len(suspect.inner & gain)

    best = max(map(key, gains))
    return [suspect for suspect in gains if key(suspect) == best and gains[suspect] == gains[max(gains, key=key)]]


def _joint(
    mutants: Sequence[Mutant], rest: Sequence[tuple[Case, Outputs]], profile: str, planted: Planted
) -> tuple[str, ...]:
    """The failing cases that several mistakes explain together."""
    if len(mutants) < 2:
        return ()
    return tuple(case.id for case, outputs in rest if _matches(mutants, case, outputs, profile, planted))


def _finding(group: Sequence[_Suspect], explained: set[str], failing: int, joint: tuple[str, ...]) -> Finding:
    mutants = [suspect.mutant for suspect in group]
    sure = len(explained) > 1 and not group[0].strong
    return Finding(
        tuple(m.name for m in mutants), tuple(m.says for m in mutants), tuple(m.remedy for m in mutants),
        tuple(m.where for m in mutants), tuple(sorted(explained)), failing,
        "certain" if sure else "likely" if not group[0].strong else "possible", joint,
    )  # fmt: skip


def _random(results: Results, profile: str) -> bool:
    """Whether two cases that ask for the same were answered differently."""
    pairs = symptoms.repeated([(case, outputs) for case, result, outputs in results if not result.absent])
    return any(not alike(one, a, b, profile) for (one, a), (_, b) in pairs)


def _symptom(symptom: symptoms.Symptom, failing: int) -> Finding:
    return Finding(
        (symptom.name,), (symptom.says,), (symptom.hint,), (None,), symptom.cases, failing, "symptom"
    )  # fmt: skip


def _short(path: Path, line: int) -> str:
    parts = path.parts
    start = len(parts) - 1 - parts[::-1].index("minimoe") if "minimoe" in parts else 0
    return f"{'/'.join(parts[start:])}:{line}"
