"""What the cases are drawn with: numbers that are the same, bit for bit, on every machine and with every NumPy.

NumPy promises that the raw stream of a bit generator stays as it is, but not what its distributions make of it. So
only raw bits are taken from it, and every step from there to a number is exact in float64: shifts, sums, products with
powers of two, rounding to eight significant bits. No logarithm, no BLAS.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimoe.shapes import Array

EXACT = ("float64", "float32")  # profiles of the cases whose inputs or point need more than 16 bits
ALL = (*EXACT, "bfloat16", "hf_bfloat16", "mistral_bfloat16", "float16")
OURS = (*EXACT, "bfloat16")  # of what Grok-1 has: the other profiles follow code that has none of it
GROK = "grok"  # tag of the cases that do something otherwise than Mixtral
_SMALLEST = 2.0**-10  # far above the smallest normal float16, so that nothing drawn is subnormal anywhere


@dataclass(frozen=True)
class Spec:
    """One case as it is thought of: all but the outputs and their bounds.

    Attributes
    ----------
    id : "<call>/<name>"
    why : what the case is for: which mistakes it tells apart
    inputs : floats in float64, each of them a float32; ids and positions int64; masks bool
    settings : JSON values
    model : name of the model it computes with
    tags : what selects cases, besides "inference" and "training"
    profiles : in which numeric profiles it takes part
    text : name of the text that its tokens are, see `cases.texts`
    """

    id: str
    why: str
    inputs: Mapping[str, Array]
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    tags: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ALL
    text: str | None = None

    @property
    def call(self) -> str:
        """The entry of `minimoe.golden.calls.CALLS`."""
        return self.id.partition("/")[0]


class Draw:
    """Random numbers that belong to a name; `grid=False` draws numbers that use all of float32's digits.

    >>> Draw("a case").normal(3).tolist() == Draw("a case").normal(3).tolist()
    True
    """

    def __init__(self, name: str, grid: bool = True) -> None:
        self._bits = np.random.PCG64(zlib.crc32(name.encode()))
        self.round = on_grid if grid else in_float32

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Array:
        """Numbers in [low, high), rounded."""
        return self.round(low + (high - low) * self._unit(shape))

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Bell-shaped numbers of standard deviation `scale`, never beyond 3 of them: sums of three uniform ones."""
        three = self._unit((3, *shape))
        return self.round(scale * 2 * (three[0] + three[1] + three[2] - 1.5))

    def integers(self, *shape: int, low: int = 0, high: int) -> Array:
        """Integers in [low, high)."""
        return low + np.floor((high - low) * self._unit(shape)).astype(np.int64)

    def choices(self, N: int, k: int, E: int) -> Array:
        """(N, k) expert ids, no expert twice in a row."""
        return np.argsort(self._unit((N, E)), axis=1, kind="stable")[:, :k].astype(np.int64)

    def shares(self, N: int, k: int) -> Array:
        """(N, k) positive gate weights that need not add up to one."""
        return self.uniform(N, k, low=0.125, high=0.875)

    def _unit(self, shape: tuple[int, ...]) -> Array:
        raw = self._bits.random_raw(int(np.prod(shape, dtype=np.int64)))
        return (np.asarray(raw) >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def on_grid(x: Array) -> Array:
    """Round to eight significant bits: numbers that float32, bfloat16 and float16 all hold. Tiny ones become zero.

    >>> on_grid(np.array([1.001, -0.3, 1e-9])).tolist()
    [1.0, -0.30078125, 0.0]
    """
    mantissa, exponent = np.frexp(x)
    return np.where(np.abs(x) < _SMALLEST, 0.0, np.ldexp(np.rint(mantissa * 256), exponent - 8))


def in_float32(x: Array) -> Array:
    """Round to float32, in which inputs are stored."""
    return x.astype(np.float32).astype(np.float64)


def coded(draw: Draw, rows: int, D: int, E: int, k: int) -> Array:
    """States (rows, D) whose first E elements rank the experts clearly: routing that no rounding turns over.

    Routing is discontinuous: of random states some nearly tie, and an implementation that is right, but rounds, would
    choose otherwise. So each row carries a *code*: 3.5 for its first expert, 1.75 less for each that follows, down to
    the k + 1st loser; the gates of the models read mostly these elements, and wo and w2 disturb them little.
    """
    x = draw.normal(rows, D)
    ranks = np.argsort(draw.choices(rows, E, E), axis=1)  # (rows, E): the place of each expert
    x[:, :E] = 3.5 - 1.75 * np.minimum(ranks, k + 1) + draw.uniform(rows, E, low=-0.125, high=0.125)
    return draw.round(x)
