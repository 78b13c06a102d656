"""Numeric profiles: in which number formats an implementation computes, and where it rounds.

A golden truth is computed in float64, without any rounding but that of the stored inputs. What an implementation may
be off by depends on its profile; the bounds for each are in the manifest, made by `bounds`. The inputs of the cases
that 16-bit profiles take are numbers of eight significant bits, which bfloat16, float16 and float32 all hold exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.arrays import BFLOAT16


@dataclass(frozen=True)
class Profile:
    """One numeric profile.

    Attributes
    ----------
    says : where it rounds, in words; part of the specification
    accumulate : unit roundoff of products and sums
    rounds : what is rounded to the 16-bit format: "operands" of matrix products, or "results" of all ops; "": nothing
    round_off : unit roundoff of the 16-bit format, 0.0 in profiles that have none
    tiny : smallest positive number of the 16-bit format, where it underflows within reach; else 0.0
    rotates_in_float32 : of those that round all results: whether cos, sin and the rotation are float32 all the same
    store, compute : the types in which our own backends hold weights and compute; None where they have no such mode
    """

    name: str
    says: str
    accumulate: float
    rounds: str = ""
    round_off: float = 0.0
    tiny: float = 0.0
    rotates_in_float32: bool = False
    store: Any = None
    compute: Any = None


_F32, _BF16 = 2.0**-24, 2.0**-8  # half of the distance from 1 to the next number: 24 and 8 significant bits
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("float64", "everything in float64", 2.0**-53, store=np.float64, compute=np.float64),
        Profile("float32", "everything in float32", _F32, store=np.float32, compute=np.float32),
        Profile(
            "bfloat16",
            "minimoe's own: weights and the key/value cache are stored in bfloat16; both operands of every matrix "
            "product are rounded to bfloat16, products accumulate in float32; all else is float32",
            _F32, "operands", _BF16, store=BFLOAT16, compute=np.float32,
        ),
        Profile(
            "hf_bfloat16",
            "Hugging Face transformers with torch_dtype=bfloat16: every op's result is rounded to bfloat16; RMSNorm's "
            "statistics, the softmax of attention and of the router, and the rotary angles are float32 inside; cos and "
            "sin, probabilities and, as before its version 5, gate weights are rounded to bfloat16",
            _F32, "results", _BF16,
        ),
        Profile(
            "mistral_bfloat16",
            "mistral-inference in bfloat16: as hf_bfloat16, but queries and keys are rotated in float32 with float32 "
            "cos and sin, and the router's softmax is float32 over the bfloat16 logits of the chosen experts",
            _F32, "results", _BF16, rotates_in_float32=True,
        ),
        Profile(
            "float16",
            "as hf_bfloat16 with float16 in the place of bfloat16: three more bits, but underflow below 6e-8 and "
            "overflow above 65504",
            _F32, "results", 2.0**-11, 2.0**-24,
        ),
    )
}  # fmt: skip
