"""The catalogue of known mistakes: what the golden kit must catch, and what the diagnosis can name.

A mutant plants one mistake in our own code and computes what an otherwise perfect implementation outputs with it. See
`planting` for how; the files hold the mistakes by the part of the model that is wrong.
"""

from __future__ import annotations

from minimoe.golden.mutants import attention, block, light, params, routing
from minimoe.golden.mutants.mutant import Mutant

__all__ = ["MUTANTS", "Mutant", "table"]

MUTANTS: list[Mutant] = [*light.MUTANTS, *attention.MUTANTS, *routing.MUTANTS, *block.MUTANTS, *params.MUTANTS]


def table() -> list[dict[str, str]]:
    """Return the catalogue as data: one row per mistake."""
    return [
        {
            "name": mutant.name, "planted": mutant.planted, "says": mutant.says, "remedy": mutant.remedy,
            "seen": mutant.seen, "harmless": mutant.harmless, "where": "{}:{}".format(*mutant.where),
            "profiles": ", ".join(mutant.profiles) or "all",
        }
        for mutant in MUTANTS
    ]  # fmt: skip
