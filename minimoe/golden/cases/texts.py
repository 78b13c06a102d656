"""The tokens that model and training cases read, chosen so that nothing in them is nearly undecided."""

from __future__ import annotations

from minimoe.golden.cases.draw import Draw
from minimoe.golden.cases.models import MODELS
from minimoe.shapes import Array

# Which draw of a text is taken. `python -m minimoe.golden.clear` counts up from 0 to the first with which every routing
# decision, and every choice of a token, of all cases that read it is clear; 0 where none is given. A test holds
# them to that.
DRAWS = {"base/empty": 1, "base/greedy": 2, "base/padded": 109, "base/padded-right": 70, "stops/stops": 41013}


def text(name: str, B: int, T: int) -> Array:
    """Return tokens (B, T) of the model whose name the text's begins with, up to the slash."""
    model = name.partition("/")[0]
    return Draw(f"text/{name}/{DRAWS.get(name, 0)}").integers(B, T, high=MODELS[model].config.vocab_size)
