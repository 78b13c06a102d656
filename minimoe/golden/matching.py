"""Whether two sets of outputs are alike within their bounds; what mutants output, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minimoe.golden.mutants import Mutant
from minimoe.golden.mutants.mutant import config_of, run
from minimoe.golden.verify import Case, Output, compare
from minimoe.golden.verify.kit import is_routing
from minimoe.golden.verify.measure import read_array
from minimoe.shapes import Array

LARGEST = 5_000_000  # parameters of a model that mistakes are tried out on; above it only ops are
Outputs = Mapping[str, Array]


def alike(
    case: Case, outputs: Outputs, target: Outputs, profile: str, bounds: float = 1.0, required: bool = True
) -> bool:
    """Whether outputs are nowhere further from their target than so many bounds.

    The bounds are the case's, for targets as large as these. Whatever stands at padding (NaN in the truth) is alike,
    and so are two NaN, and two infinities of one sign.

    Parameters
    ----------
    required : of the required outputs; or else of the optional ones that both give
    """
    truth = case.truth
    for output in case.outputs:
        given = output.name in outputs and output.name in target
        if output.required is not required or not (required or given):
            continue
        if not given or not _alike(output, outputs, target, truth[output.name], profile, bounds):
            return False
    return True


def _alike(output: Output, outputs: Outputs, target: Outputs, truth: Array, profile: str, bounds: float) -> bool:
    b = np.asarray(target[output.name])
    a = read_array(outputs[output.name], b, output)[0]
    if a is None:
        return False
    if output.kind == "exact":
        return np.array_equal(a, b)
    if b.shape == truth.shape:
        keep = ~np.isnan(truth)
        a, b = a[keep], b[keep]
    finite = np.isfinite(b)
    if not finite.all():
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return False
        a, b = a[finite], b[finite]
    if not b.size:
        return True
    relative, absolute = output.bounds.get(profile, (0.0, 0.0))
    error = np.abs(a - b).max()  # NaN is not at most anything
    return bool(error <= bounds * (relative * np.abs(b).max() + absolute))


def fails(case: Case, outputs: Outputs, profile: str) -> bool:
    """Whether a case would fail with these required outputs; a doubtful choice of experts is no failure."""
    if alike(case, outputs, case.truth, profile):
        return False
    required = [output.name for output in case.outputs if output.required]
    if not any(is_routing(case, name) for name in required):
        return True
    return compare(case, {name: outputs[name] for name in required}, profile).status == "fail"


class Planted:
    """What mutants output for cases, each computed when it is first asked for."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], str], Any] = {}

    def __call__(self, mutants: Sequence[Mutant], case: Case) -> Outputs | None:
        """The outputs with these mistakes; None where they change nothing, or cannot be tried out on this case."""
        key = (tuple(id(mutant) for mutant in mutants), case.id)
        if key not in self._known:
            self._known[key] = self._compute(mutants, case)
        found: Outputs | None = self._known[key]
        return found

    def _compute(self, mutants: Sequence[Mutant], case: Case) -> Outputs | None:
        if not any(mutant.applies(case) for mutant in mutants):
            return None
        if case.model_folder is not None and config_of(case.model_folder).num_parameters() > LARGEST:
            return None
        try:
            return run(mutants, case)
        except (ValueError, IndexError, LookupError, ArithmeticError):
            return None  # a mistake that does not fit the sizes of this case, or another mistake
