"""Rounds: everything that is compared takes its turn in each, so that what disturbs the machine disturbs all alike.

A turn gives a median, of a limit of the machine as of what is held against it. A best would be unlike from one to the
other: of many short reads it is the machine's best moment, and of one prompt of two seconds the machine as it usually
is. On a shared host reading on and on came to 0.93 to 0.95 of the best of three reads of 40 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np

BURST = 0.5  # seconds that a turn lasts at least
NOISY = 0.15  # a spread above this is said
SETTLE = 0.1  # seconds between turns: so long do BLAS's threads go on spinning, and take cores from the next


@dataclass(frozen=True)
class Samples:
    """One number from every round."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.values))

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        low, high = np.quantile(self.values, (0.25, 0.75))
        return float((high - low) / self.median) if self.median else 0.0

    def summary(self) -> dict[str, float]:
        """Median and quartiles."""
        low, high = np.quantile(self.values, (0.25, 0.75))
        return {"median": self.median, "low": float(low), "high": float(high)}


def turn(measure: Callable[[], float]) -> float:
    """Measure for at least BURST seconds; return the median, the first left out if there are others."""
    start = perf_counter()
    found = [measure()]
    if perf_counter() - start < BURST:
        found = []  # that was to warm up
    while perf_counter() - start < BURST or not found:
        found.append(measure())
    return float(np.median(found))


def rounds(count: int, turns: Mapping[str, Callable[[], float]]) -> dict[str, Samples]:
    """Give each its `turn` in every one of `count` rounds, every other in reverse; return the samples of each."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(count):
        order = list(turns.items())
        for name, measure in order if i % 2 == 0 else order[::-1]:
            sleep(SETTLE)
            found[name].append(turn(measure))
    return {name: Samples(values) for name, values in found.items()}


def mean(one: Samples, other: Samples) -> Samples:
    """Take the mean of two round by round."""
    return Samples([(a + b) / 2 for a, b in zip(one.values, other.values, strict=True)])


def ratio(above: Samples, below: Samples) -> Samples:
    """Divide round by round."""
    return Samples([a / b for a, b in zip(above.values, below.values, strict=True)])
