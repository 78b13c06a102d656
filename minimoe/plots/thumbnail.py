"""An array as a small picture, one pixel a number, for places too small for axes."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
from jaxtyping import Shaped
from matplotlib.colors import LinearSegmentedColormap

from minimoe.shapes import Array

# Blue is negative, orange positive, white zero; told apart in any colour deficiency. What is not finite is grey.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#08306b", "#5a9bd4", "#ffffff", "#f5a742", "#7f2704"]
).with_extremes(bad="#b0b0b0")


def thumbnail(matrix: Shaped[Array, "rows columns"], most: tuple[int, int] = (320, 150)) -> bytes:
    """Return a PNG of a matrix, one pixel a number; of a larger one, of its mean over tiles of numbers.

    Colours are symmetric about zero, up to the largest finite magnitude.

    Parameters
    ----------
    matrix : (rows, columns) numbers; NaN and infinities are grey
    most : columns and rows of the picture at most
    """
    x = np.asarray(matrix, np.float64)
    x = np.where(np.isfinite(x), x, np.nan)
    for axis, limit in ((1, most[0]), (0, most[1])):
        tile = -(-x.shape[axis] // limit) if x.size else 1
        if tile > 1:
            starts = np.arange(0, x.shape[axis], tile)
            kept = np.add.reduceat(np.isfinite(x), starts, axis=axis)
            total = np.add.reduceat(np.nan_to_num(x), starts, axis=axis)
            x = np.divide(total, kept, out=np.full(total.shape, np.nan), where=kept > 0)
    if not x.size:
        x = np.full((1, 1), np.nan)
    largest = np.nanmax(np.abs(x)) if np.isfinite(x).any() else 0.0
    data = io.BytesIO()
    top = largest if largest > 0 else 1.0
    matplotlib.image.imsave(data, np.ma.masked_invalid(x), cmap=_SIGNED, vmin=-top, vmax=top, format="png")
    return data.getvalue()
