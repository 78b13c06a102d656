"""The outputs of a case one by one: the table of calls names some of them together (`layers.*`, `grads.*`)."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np

from minimoe.golden import names
from minimoe.golden.calls import CALLS, Tensor
from minimoe.shapes import Array

_WEIGHTS = {parameter.ours.rpartition(".")[2]: parameter.letters for parameter in names.PARAMETERS}


def describe(call: str, name: str) -> Tensor:
    """Return what one output of a call is.

    >>> describe("model", "layers.1.gating.ids")
    Tensor(name='layers.1.gating.ids', letters='N k', kind='exact', optional=True)
    >>> describe("training", "grads.layers.0.attention.wo").letters
    'D H·C'
    """
    tensors = sorted(CALLS[call].outputs, key=lambda tensor: tensor.name != name)  # its own entry before a pattern
    entry = next(tensor for tensor in tensors if fnmatchcase(name, tensor.name))
    if "*" not in entry.name:
        return entry
    if name.startswith(("grads.", "updated.")):
        return Tensor(name, _WEIGHTS[name.rpartition(".")[2]], entry.kind, entry.optional)
    kind = "exact" if name.endswith("gating.ids") else entry.kind
    return Tensor(name, names.letters(name), kind, entry.optional)


def inside(name: str) -> str:
    """Return the name of an intermediate within its layer.

    >>> inside("layers.1.gating.ids"), inside("gating.ids"), inside("norm")
    ('gating.ids', 'gating.ids', 'norm')
    """
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def routing(name: str) -> dict[str, str] | None:
    """Of an output that holds chosen experts: which outputs are the logits they were chosen by, and their weights."""
    prefix, _, last = name.rpartition("ids")
    if last or (prefix not in ("", "gating.") and not prefix.endswith(".gating.")):
        return None
    return {"logits": f"{prefix}logits", "weights": f"{prefix}weights"}


def smallest_lead(logits: Array, ids: Array) -> float | None:
    """Return the smallest lead of a chosen expert over the next in line; None where nothing had to be chosen.

    Over all routed tokens and, within each, over the k slots in order: the lead of the j-th choice over what remains.

    >>> smallest_lead(np.array([[4.0, 1.0, 3.0]]), np.array([[0, 2]]))
    1.0
    """
    rows = ids[:, 0] >= 0
    ranked = -np.sort(-logits[rows], axis=-1)[:, : ids.shape[1] + 1]
    leads = ranked[:, :-1] - ranked[:, 1:]
    return float(leads.min()) if leads.size else None
