"""RMSNorm, with an optional residual that is added first.

h = x + residual
r = 1 / sqrt(mean_d(h²) + eps)          eps inside the root
y = h · r · weight

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4 (which has no eps).
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float

from minimoe.shapes import Array


class RMSNorm(Protocol):
    """The contract of this room."""

    def forward(
        self,
        x: Float[Array, "N D"],
        weight: Float[Array, " D"],
        eps: float,
        residual: Float[Array, "N D"] | None = None,
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " N"]]:
        """Normalise the rows of ``x + residual``.

        Returns
        -------
        y : (N, D) the normalised rows
        h : (N, D) the sum x + residual; `x` itself where there is no residual
        r : (N,) one over the root of the mean square, kept for the backward
        """

    def backward(
        self,
        dy: Float[Array, "N D"],
        h: Float[Array, "N D"],
        weight: Float[Array, " D"],
        r: Float[Array, " N"],
        dh: Float[Array, "N D"] | None = None,
    ) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
        """Invert `forward`.

        Parameters
        ----------
        dy : (N, D) gradient of y
        dh : (N, D) gradient that reaches h on its other way (the residual stream), added to the result

        Returns
        -------
        dx : (N, D) the gradient of h, which is that of x and that of residual
        dweight : (D,)
        """
