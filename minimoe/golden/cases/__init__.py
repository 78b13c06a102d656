"""The golden cases: what is asked, with which numbers, and why. One file per part of the model.

A case is made to *discriminate*: sizes that differ where a mistake would go unnoticed if they were equal, sizes that
are equal where an error of shape would give the mistake away before its numbers do, and routing without near-ties, so
that a difference means a mistake.
"""

from __future__ import annotations

from minimoe.golden.cases import attention, blocks, light, losses, routing, training, whole
from minimoe.golden.cases.draw import Spec
from minimoe.golden.cases.models import MODELS, ModelSpec, weights

__all__ = ["MODELS", "ModelSpec", "Spec", "specs", "weights"]


def specs() -> list[Spec]:
    """Return all cases, ops first."""
    rooms = (light, attention, routing, losses, blocks, whole, training)
    return [spec for room in rooms for spec in room.specs()]
