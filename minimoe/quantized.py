"""int8 storage for the matrices of linear maps and experts: one scale per row, weights only.

w[o, i] ≈ scale[o] · values[o, i]      scale[o] = max_i |w[o, i]| / 127      values = round(w / scale), -127 to 127

    y[o] = scale[o] · Σ_i values[o, i] · x[i]

The state x keeps its type (it is not rounded), sums run in that type, and the scale is applied to the sum. The error of
a weight is at most half a scale, so that of a row is at most 1/254 of its largest element. Embeddings, norms and router
gates are left as they are: they are small, or decide.

Source: absmax quantisation with one scale per row, as the vector-wise form of Dettmers et al., LLM.int8(), arXiv
2208.07339, section 2, without its activations' half and its outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.arrays import widen, xp_of
from minimoe.shapes import Array

LARGEST = 127  # of a value: -128 is not used, so that negation is exact


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix (O, I) stored as int8, or several of one shape, (E, O, I); behaves like an array where ops need it.

    Attributes
    ----------
    values : int8, of the matrix's shape
    scale : float32, (O,) or (E, O): of each row
    source : the type that the matrix was stored in before
    turned : whether this is the transpose (I, O), so that the scales belong to columns
    """

    values: Array
    scale: Array
    source: Any
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """2, or 3 for a stack."""
        return int(self.values.ndim)

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return int(self.values.nbytes + self.scale.nbytes)

    @property
    def T(self) -> Int8:
        """The transpose of a matrix, a view."""
        return Int8(self.values.T, self.scale, self.source, not self.turned)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> Int8:
        """One matrix of a stack, or a matrix cut by two slices."""
        if self.ndim == 3:
            return Int8(self.values[key], self.scale[key], self.source)
        rows, columns = key
        return Int8(self.values[rows, columns], self.scale[columns if self.turned else rows], self.source, self.turned)

    __array_ufunc__ = None  # so that `x @ w.T` asks this class

    def __rmatmul__(self, x: Array) -> Array:
        values, scale = self.values.astype(x.dtype), self.scale.astype(x.dtype)
        y: Array = (x @ values) * scale if self.turned else (x * scale) @ values
        return y

    def map(self, change: Callable[[Array], Array]) -> Int8:
        """Apply `change`, such as a copy to the device, to values and scales."""
        return Int8(change(self.values), change(self.scale), self.source, self.turned)

    def widened(self, dtype: Any = np.float32) -> Array:
        """Return the matrix that this stands for: scale · values."""
        scale = self.scale[..., None, :] if self.turned else self.scale[..., None]
        return self.values.astype(dtype) * scale.astype(dtype)


def quantize(w: Array) -> Int8:
    """Store a matrix (O, I), or a stack of them, in int8.

    >>> w = np.array([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]], np.float32)
    >>> q = quantize(w)
    >>> q.values.tolist(), (127 * q.scale).tolist()
    ([[64, -127, 32], [0, 0, 0]], [1.0, 127.0])
    """
    xp, source = xp_of(w), w.dtype
    wide = widen(w)
    largest = xp.abs(wide).max(axis=-1).astype(xp.float32)
    scale = xp.where(largest > 0, largest / xp.float32(LARGEST), xp.float32(1)).astype(xp.float32)
    values = xp.clip(xp.rint(wide / scale[..., None]), -LARGEST, LARGEST).astype(xp.int8)
    return Int8(values, scale, source)


def parts(w: Array | Int8) -> tuple[Array, Array | None]:
    """Return what a loop reads: the stored numbers, and the scales of the rows where there are some; contiguous."""
    if isinstance(w, Int8):
        xp = xp_of(w.values)
        return xp.ascontiguousarray(w.values), xp.ascontiguousarray(w.scale)
    return w, None


def kept_dtype(w: Array | Int8) -> Any:
    """The type in which what belongs to a matrix is kept, as keys and values: its own, or what int8 was made from."""
    return w.source if isinstance(w, Int8) else w.dtype
