"""What a comparison finds: of an element, a tensor, a routing decision, a case."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from .words import number


@dataclass
class Element:
    """One number of a tensor: its index, where that is in words, the candidate's value, and the truth."""

    index: tuple[int, ...]
    where: str
    value: float
    truth: float

    def __str__(self) -> str:
        return f"{self.where}: {number(self.value)} instead of {number(self.truth)}"


@dataclass
class TensorResult:
    """How one output compares.

    Attributes
    ----------
    status : "pass", "fail" (beyond the bound, or not equal), "missing", "shape", "dtype", "nan" (NaN or Inf where the
        truth has none), "extra" (no output of the case: a warning), "not comparable" (follows other experts, or is
        padding)
    error, bound, ratio : largest error of the elements compared, what it may be, error ÷ bound (inf where not equal)
    worst, first : the element with the largest error; the first one that is wrong
    wrong, compared, size : numbers of elements
    says : what is wrong, in words
    """

    name: str
    status: str = "pass"
    error: float = 0.0
    bound: float = 0.0
    ratio: float = 0.0
    worst: Element | None = None
    first: Element | None = None
    wrong: int = 0
    compared: int = 0
    size: int = 0
    says: str = ""

    @property
    def failed(self) -> bool:
        """Whether it makes its case fail."""
        return self.status not in ("pass", "extra", "not comparable")


@dataclass
class Decision:
    """A routing decision that is not the golden one.

    Attributes
    ----------
    tensor, token, slot, golden, chosen : where, the golden expert, the candidate's
    kind : "near tie" (their golden logits are within twice the bound on logits, so either may win) or "don't care"
        (the golden weight is below the bound on weights): no errors. "order" (the expert has another slot, as if sorted
        by id), "tie" (the logits are equal, for the candidate too, and the higher id was taken) or "wrong expert"
    margin : distance of their golden logits ÷ twice the bound on logits
    weight : golden weight of the slot
    """

    tensor: str
    token: int
    slot: int
    golden: int
    chosen: int
    kind: str
    margin: float
    weight: float

    @property
    def wrong(self) -> bool:
        """Whether it is an error."""
        return self.kind not in ("near tie", "don't care")


@dataclass
class CaseResult:
    """How one case compares.

    Attributes
    ----------
    absent : "missing" or "not offered" where there are no outputs, else ""
    problem : why the outputs cannot be read or made, else ""
    deviation : why the case is expected to fail, else ""
    tensors : in execution order, then unknown ones
    decisions : routing decisions that are not the golden ones
    cause : whether the first failing step's inputs still fit, in words
    forced : how a second run compares in which the golden routing was imposed; see `force_routing`
    doubted : outputs that differ only in what may follow from near ties, in routing that is not given
    notes : what else to say
    """

    id: str
    call: str
    level: str
    why: str = ""
    absent: str = ""
    problem: str = ""
    deviation: str = ""
    tensors: list[TensorResult] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    cause: str = ""
    forced: CaseResult | None = None
    doubted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Either "pass" or "fail", or what `absent` says; "deviates" where a failure is expected, and must come."""
        broken = self.problem or self.first_failure or (self.forced is not None and self.forced.status == "fail")
        if self.absent:
            return self.absent
        if self.deviation:
            return "deviates" if broken else "fail"
        return "fail" if broken else "pass"

    @property
    def first_failure(self) -> TensorResult | None:
        """The first failing tensor in execution order."""
        return next((t for t in self.tensors if t.failed), None)

    @property
    def ratio(self) -> float:
        """The largest error ÷ bound of the tensors that could be measured."""
        return max((t.ratio for t in self.tensors), default=0.0)

    @property
    def routing(self) -> dict[str, int]:
        """Number of decisions of each kind, and of gate logits and weights that are wrong where the choice is right."""
        prefix = "" if self.call == "gating" else "gating."
        gate = (prefix + "logits", prefix + "weights")
        numeric = sum(t.wrong for t in self.tensors if t.name.endswith(gate))
        return dict(Counter(d.kind for d in self.decisions)) | ({"numeric": numeric} if numeric else {})


def describe(result: CaseResult) -> str:
    """One line: what is wrong first."""
    wrong = result.first_failure
    if result.deviation and result.status == "fail":
        return f"passes, but was expected to fail ({result.deviation}): no deviation any more"
    if result.problem or wrong is None:
        return result.problem or result.absent or result.status
    size = f" (up to {wrong.ratio:.3g} bounds off)" if wrong.status == "fail" and math.isfinite(wrong.ratio) else ""
    return f"{wrong.name}: {wrong.says}{size}"


def details(result: CaseResult) -> list[str]:
    """More lines: where the mistake is, the routing, notes."""
    lines = [result.cause] if result.cause else []
    if result.routing:
        margins = [d.margin for d in result.decisions if d.wrong and 0 < d.margin < math.inf]
        clearest = f"; the clearest by {max(margins):.3g} times what roundings may do" if margins else ""
        lines.append("routing: " + ", ".join(f"{kind} ({n})" for kind, n in result.routing.items()) + clearest)
    return [*lines, *result.notes, *([f"the case: {result.why}"] if result.why else [])]
