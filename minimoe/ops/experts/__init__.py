"""The experts: dropless dispatch, gated feed-forward networks, combine.

expert_e(x) = w2_e · (act(w1_e · x) ⊙ (w3_e · x))
out[n]      = Σ_slot weights[n, slot] · expert_{ids[n, slot]}(x[n])      slots in order 0..k-1

act is silu(z) = z · sigmoid(z) (SwiGLU: Mixtral) or gelu_tanh(z) = z/2 · (1 + tanh(u)), u = sqrt(2/π) (z + 0.044715 z³)
(GeGLU: Grok-1), which is z · sigmoid(2 u).

Every (token, slot) pair is served, whatever the load (no capacity, nothing dropped): pairs are sorted by expert with a
counting sort, each expert multiplies its contiguous segment, results go back to their slots. No sum is atomic, so
the result does not depend on scheduling.

Sources: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1; Shazeer, GLU Variants Improve Transformer,
arXiv 2002.05202, equations 5 and 6; Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, section 2
(its tanh form); Gale et al., MegaBlocks, arXiv 2211.15841 (dropless dispatch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int

from minimoe.config import ACTIVATIONS
from minimoe.quantized import Int8
from minimoe.shapes import Array


@dataclass(frozen=True, eq=False)
class Saved:
    """What the forward keeps for the backward. M = routed (token, slot) pairs, sorted by expert, then by pair.

    Attributes
    ----------
    pairs : (M,) which pair n·k + slot stands in each row
    offsets : (E + 1,) segment e is rows offsets[e] to offsets[e + 1]
    gate_in, up : (M, F) w1_e · x, the input of the expert's own gate (which is not the router's), and w3_e · x
    slots : (N, k, D) expert outputs, before weighting; zeros where not routed
    """

    pairs: Int[Array, " M"]
    offsets: Int[Array, " E+1"]
    gate_in: Float[Array, "M F"]
    up: Float[Array, "M F"]
    slots: Float[Array, "N k D"]


def check_activation(name: str) -> None:
    """Raise ValueError where an expert has no such activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")


class Experts(Protocol):
    """The contract of this room. Expert weights are addressed one at a time, `w1[e]`: stacked, or a list of views."""

    explain: Callable[..., dict[str, Array]]
    """What happens inside, computed by the reference whatever the dialect, from `forward`'s inputs: `hidden` (N, k, F)
    and `slots` (N, k, D), zeros where not routed."""

    def forward(
        self,
        x: Float[Array, "N D"],
        w1: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
        w2: Sequence[Float[Array, "D F"] | Int[Int8, "D F"]],
        w3: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
        ids: Int[Array, "N k"],
        weights: Float[Array, "N k"],
        keep: bool = False,
        activation: str = "silu",
    ) -> tuple[Float[Array, "N D"], Saved | None]:
        """Send every token through its experts and combine.

        Parameters
        ----------
        x : (N, D); it and the hidden states are rounded to bfloat16 where the weights are stored in it
        w1, w2, w3 : E arrays each; for inference also in int8 (see `minimoe.quantized`)
        ids : (N, k); -1 = not routed
        weights : (N, k); 0 where not routed
        keep : whether a backward will follow
        activation : {"silu", "gelu_tanh"}

        Returns
        -------
        out : (N, D), zeros for tokens that are not routed
        saved : Saved, or None where `keep` is False
        """

    def backward(
        self,
        dout: Float[Array, "N D"],
        x: Float[Array, "N D"],
        w1: Sequence[Float[Array, "F D"]],
        w2: Sequence[Float[Array, "D F"]],
        w3: Sequence[Float[Array, "F D"]],
        weights: Float[Array, "N k"],
        saved: Saved,
        activation: str = "silu",
    ) -> tuple[
        Float[Array, "N D"], Float[Array, "E F D"], Float[Array, "E D F"], Float[Array, "E F D"], Float[Array, "N k"]
    ]:
        """Return dx, dw1, dw2, dw3 (zeros for an expert without tokens) and dweights."""
