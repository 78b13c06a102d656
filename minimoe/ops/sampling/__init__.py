"""Choosing the next token: greedy, or from the nucleus of the distribution.

temperature 0:  argmax, ties to the lowest id
otherwise:      p = softmax(logits / temperature); keep the smallest set of most probable tokens whose mass reaches
                top_p (ties to the lower id), renormalise, draw by the inverse of the cumulative distribution

Source: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751, section 3.1.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array


class Sampling(Protocol):
    """The contract of this room. Randomness comes in as numbers, so that every dialect draws the same tokens."""

    def forward(
        self, logits: Float[Array, "B V"], temperature: float, top_p: float, uniform: Float[Array, " B"]
    ) -> Int[Array, " B"]:
        """Draw one token per row.

        Parameters
        ----------
        logits : (B, V)
        temperature : >= 0
        top_p : in (0, 1]
        uniform : (B,) numbers in [0, 1), not used at temperature 0

        Returns
        -------
        (B,) int64 token ids
        """
