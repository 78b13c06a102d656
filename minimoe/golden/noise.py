"""Monte Carlo arithmetic: arrays whose every product and partial sum is off by a random rounding error.

x ∘ y  ->  (x ∘ y) · (1 + u·r),   r uniform in [-1, 1], u one unit roundoff, drawn anew for every operation

Source: Stott Parker, Monte Carlo Arithmetic, UCLA 1997. Running the reference on such arrays again and again shows how
far apart correct implementations may be. Three decisions make it sound and affordable:

- Noise goes *inside* reductions. A sum of I numbers makes I - 1 rounding errors, and a matrix product I more; noise on
  the result alone would be exceeded by correct code, by sequential sums of thousands of numbers many times over.
- Sums run in sequence, which of the common orders has the largest partial sums, hence the largest errors.
- Within a reduction only terms of first order in u are kept (the next are u·I times smaller): Σ p_j + u·(Σ r_j p_j +
  Σ r'_j s_j) with products p and partial sums s. In a long reduction the noise is the sum of very many draws, so one
  normal number of the same variance, u²/3 · (Σ p² + Σ s²), stands for it; s between the ends of at most 16 blocks is
  taken for a straight line plus the wiggle of a random walk.

Rounding to a 16-bit format is disturbed in the same way, not carried out: a real rounding is one fixed draw, which an
implementation that differs in the 24th bit before it would not share, and samples that all round alike would hide it.
Where the value (but for noise) is a number of the format it is rounded for real, since every implementation gets that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from minimoe.shapes import Array

LIBRARY = 2.0  # unit roundoffs that exp, log, sin, cos, tanh and powers may be off by: one unit in the last place
FULL = 1 << 16  # products of one matrix product up to which every one gets its own noise
BLOCKS = 16  # of a longer reduction
PIECE = 1 << 22  # numbers of a large right-hand matrix taken at a time
_EXACT = {np.negative, np.positive, np.absolute, np.maximum, np.minimum, np.sign}
_LIBRARY = {np.exp, np.log, np.sin, np.cos, np.tanh, np.power, np.float_power}


class Noise:
    """A source of rounding errors.

    Parameters
    ----------
    accumulate : unit roundoff of products and sums
    round_off : unit roundoff of a 16-bit format; 0.0: none
    tiny : smallest positive number of that format, where it underflows within reach; else 0.0
    seed : of all that is drawn
    """

    def __init__(self, accumulate: float, round_off: float = 0.0, tiny: float = 0.0, seed: Any = 0) -> None:
        self.accumulate, self.round_off, self.tiny = accumulate, round_off, tiny
        self._rng = np.random.Generator(np.random.SFC64(seed))

    def array(self, x: Array, unit: float) -> Noisy:
        """Return `x` in float64 (the same memory if it is that already), results of it to be off by `unit`."""
        found = np.asarray(x, np.float64).view(Noisy)
        found.noise, found.unit = self, unit
        return found

    def draw(self, shape: tuple[int, ...]) -> Array:
        """Uniform numbers in [-1, 1)."""
        return 2.0 * self._rng.random(shape) - 1.0  # in float64: 1 + u·r must keep r

    def disturbed(self, x: Array, unit: float, ulps: float = 1.0) -> Array:
        """Return `x` off by one rounding error of `unit`, times `ulps`."""
        if unit == self.round_off:
            return self.rounded(x if ulps == 1.0 else self._relative(x, self.accumulate * ulps))
        return self._relative(x, unit * ulps)

    def rounded(self, x: Array) -> Array:
        """Return `x` as if rounded to the 16-bit format."""
        bits = -np.log2(self.round_off)
        mantissa, exponent = np.frexp(x)
        scaled = np.ldexp(mantissa, int(bits))
        nearest = np.rint(scaled)
        with np.errstate(invalid="ignore"):  # infinity stays what it is
            exact = np.abs(scaled - nearest) <= 8 * self.accumulate * np.abs(scaled)
        found = np.where(exact, np.ldexp(nearest, exponent - int(bits)), self._relative(x, self.round_off))
        if self.tiny:  # below the normal numbers of the format the error is absolute: half of the smallest one
            below = np.abs(x) < self.tiny / (2 * self.round_off)
            steps = x / self.tiny
            exact = np.abs(steps - np.rint(steps)) <= 8 * self.accumulate * np.abs(steps)
            off = x + self.tiny / 2 * self.draw(np.shape(x))
            off = np.where(off * x < 0, 0.0, off)  # no rounding changes a sign
            found = np.where(below, np.where(exact, x, off), found)
        return found

    def total(self, x: Array, axis: int) -> Array:
        """Return the sum along an axis, every partial sum disturbed."""
        x = np.moveaxis(x, axis, -1)
        if x.shape[-1] == 0:
            return x.sum(axis=-1)
        partial = np.cumsum(x, axis=-1)
        return partial[..., -1] + self.accumulate * self._errors_of_sums(x, partial).sum(axis=-1)

    def product(self, a: Array, b: Array) -> Array:
        """Return the matrix product, every product and every partial sum disturbed."""
        if b.ndim == 2 and b.size > PIECE and b.shape[1] > 1:
            half = b.shape[1] // 2  # so that large weights are not all widened at once
            return np.concatenate([self.product(a, b[:, :half]), self.product(a, b[:, half:])], axis=-1)
        a, b = a.astype(np.float64), b.astype(np.float64)
        exact = a @ b
        few = exact.size * a.shape[-1] <= FULL
        return exact + self.accumulate * (self.every_error(a, b) if few else self.summed_errors(a, b))

    def every_error(self, a: Array, b: Array) -> Array:
        """Return the error of a matrix product in units of the roundoff, one draw per product and partial sum."""
        terms = a[..., :, None, :] * b.swapaxes(-1, -2)[..., None, :, :]  # (..., M, O, I)
        partial = np.cumsum(terms, axis=-1)
        of_products = terms * self.draw(terms.shape)
        return of_products.sum(axis=-1) + self._errors_of_sums(terms, partial).sum(axis=-1)

    def summed_errors(self, a: Array, b: Array) -> Array:
        """Return what has the distribution of `every_error`, from one normal draw per result."""
        size = a.shape[-1]
        ends = np.linspace(0, size, min(BLOCKS, size) + 1).astype(int)
        partial: Array = 0.0
        variance: Array = 0.0
        for start, stop in pairwise(ends):
            left, right = a[..., start:stop], b[..., start:stop, :]
            step, squares = left @ right, (left * left) @ (right * right)
            n: Array = float(stop - start)
            if not (left.all() and right.all()):  # adding zero is exact: it is no step
                n = (left != 0).astype(np.float64) @ (right != 0).astype(np.float64)
            some = np.maximum(n, 1)
            # Σ over t = 1..n of the square of the straight line partial + step·t/n, then of the walk around it
            line = n * partial**2 + (n + 1) * partial * step + (n + 1) * (2 * n + 1) / (6 * some) * step**2
            walk = (n + 1) / 6 * np.maximum(squares - step**2 / some, 0)
            variance = variance + squares + line + walk
            partial = partial + step
        return np.sqrt(variance / 3) * self._rng.standard_normal(partial.shape)

    def _errors_of_sums(self, terms: Array, partial: Array) -> Array:
        """The errors of adding term after term, in units of the roundoff; adding zero, or to zero, is exact."""
        inexact = (terms[..., 1:] != 0) & (partial[..., :-1] != 0)
        return np.where(inexact, self.draw(inexact.shape) * partial[..., 1:], 0.0)

    def _relative(self, x: Array, unit: float) -> Array:
        return x * (1.0 + unit * self.draw(np.shape(x)))


class Noisy(np.ndarray):
    """An array of float64 whose arithmetic is disturbed; `Noise.array` makes them.

    Of two operands the finer unit counts, as the wider type does where types are promoted. Selecting, moving,
    comparing, negating and taking the maximum are exact.
    """

    noise: Noise
    unit: float

    def __array_finalize__(self, parent: Any) -> None:
        if isinstance(parent, Noisy):
            self.noise, self.unit = parent.noise, parent.unit

    def fine(self) -> Noisy:
        """Return the same numbers, results of them to be in the type that sums are kept in."""
        return self.noise.array(plain(self), self.noise.accumulate)

    def rounded(self) -> Noisy:
        """Return the numbers rounded to the 16-bit format, as results of them will be."""
        return self.noise.array(self.noise.rounded(plain(self)), self.noise.round_off)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        noise, unit = _source(inputs)
        given = plain(list(inputs))
        if ufunc is np.matmul:
            found = noise.product(*given)
            found = noise.rounded(found) if unit == noise.round_off else found
        elif ufunc is np.add and method == "reduce":
            return self.sum(**{name: kwargs[name] for name in ("axis", "keepdims") if name in kwargs})
        elif ufunc is np.add and method == "at":
            return self._add_at(*given[1:])
        else:
            found = getattr(ufunc, method)(*given, **kwargs)
            if ufunc not in _EXACT and np.asarray(found).dtype.kind == "f":
                found = noise.disturbed(found, unit, LIBRARY if ufunc in _LIBRARY else 1.0)
        if out is not None:
            plain(out[0])[...] = found
            return out[0]
        return noise.array(found, unit) if np.asarray(found).dtype.kind == "f" else found

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """Select and move as NumPy does: where, concatenate, take_along_axis, ..."""
        noise, unit = _source([*args, *kwargs.values()])
        found = function(*plain(args), **plain(kwargs))

        def noisy(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(noisy(item) for item in x)
            return noise.array(x, unit) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

        return noisy(found)

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:  # type: ignore[override]
        """Sum in sequence; `dtype` asks for float64 inside, which implementations need not have."""
        x = plain(self)
        if axis is None:
            x, axis, keepdims = x.reshape(-1), 0, False
        found = self.noise.total(x, axis)
        found = self.noise.rounded(found) if self.unit == self.noise.round_off else found
        return self.noise.array(np.expand_dims(found, axis) if keepdims else found, self.unit)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:  # type: ignore[override]
        """The sum over the count."""
        return self.sum(axis=axis, keepdims=keepdims) / (self.size if axis is None else self.shape[axis])

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """Stay in float64: the unit says how results are rounded, not the type."""
        return self.copy() if np.dtype(dtype).kind in "fV" else plain(self).astype(dtype)

    def _add_at(self, index: Array, values: Array) -> None:
        x = plain(self)
        for i, value in zip(index, values, strict=True):  # one at a time: each sum has its own error
            x[i] = self.noise.disturbed(x[i] + value, self.unit)


def plain(x: Any) -> Any:
    """Return `x` with every noisy array in it as an ordinary one of the same memory."""
    if isinstance(x, list | tuple):
        return type(x)(plain(item) for item in x)
    if isinstance(x, dict):
        return {name: plain(item) for name, item in x.items()}
    return x.view(np.ndarray) if isinstance(x, Noisy) else x


def _source(values: Any) -> tuple[Noise, float]:
    """Where the operands' noise comes from, and the finest of their units."""
    found: list[Noisy] = []

    def search(x: Any) -> None:
        if isinstance(x, Noisy):
            found.append(x)
        elif isinstance(x, list | tuple):
            for item in x:
                search(item)

    search(values)
    return found[0].noise, min(x.unit for x in found)
