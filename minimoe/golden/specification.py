"""The parts of the kit's README that are tables of what the code says: `python -m minimoe.golden.specification`
writes them anew, each between its two comments. The tests hold the file against them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from minimoe import shapes
from minimoe.golden import bounds, make, names
from minimoe.golden.calls import CALLS, Call, Tensor
from minimoe.golden.cases import MODELS
from minimoe.golden.names import markdown
from minimoe.golden.profiles import PROFILES

README = make.FOLDER / "README.md"
SETTINGS = {
    "vocab_size": "V, the rows of the embedding table",
    "eps": "in `rmsnorm`: added to the mean of squares, inside the root; in `adamw` and `training`: added to the root",
    "theta": "base of the rotary frequencies",
    "window": "W, how many keys a query sees at most, its own among them; null: all before it",
    "k": "experts per token",
    "form": '"concatenated", "per_layer" or "switch"',
    "step": "number of the optimiser's step; the first is 1",
    "lr": "learning rate",
    "beta1": "share of the old first moment that is kept",
    "beta2": "share of the old second moment that is kept",
    "weight_decay": "of `adamw`'s weight; in `training` of matrices only, not of norms",
    "scale": "in `adamw`: what the gradient is multiplied by first: clipping sets it; in `attention`: what q · k is "
    "multiplied by, without it 1/√C",
    "cap": "scores are bounded: cap · tanh(score / cap); without it they are not",
    "renormalise": "false: weights are shares of a softmax over all experts; without it true: over the chosen",
    "disabled": "ids of experts that may not be chosen; their logits count all the same",
    "activation": '"gelu_tanh"; without it silu',
    "temperature": "0: greedy",
    "top_p": "mass of the nucleus, in (0, 1]",
    "layer": "which layer of the model, from 0",
    "chunks": "lengths of the chunks, which add up to T",
    "max_length": "tokens that the cache is made for: it has min(W, max_length) slots",
    "clip": "the gradients are scaled down so that their joint norm is at most this",
}
_LEVELS = {"op": "Ops", "block": "The block", "model": "The model", "training": "A training step"}


def letters() -> str:
    """Return the table of letters, from where they are defined."""
    table = (shapes.__doc__ or "").split("======  =")[2].split("\n", 1)[1]
    rows = [line.split(maxsplit=1) if line[:1] != "I" else ("I, O", line[4:].strip()) for line in table.split("\n")]
    return markdown(("letter", "meaning"), [(f"`{row[0]}`", row[1].strip()) for row in rows if len(row) == 2])


def calls() -> str:
    """Return every call with its tensors and settings."""
    parts = []
    for level, title in _LEVELS.items():
        parts.append(f"### {title}")
        parts += [_call(call) for call in CALLS.values() if call.level == level]
    return "\n\n".join(parts)


def _call(call: Call) -> str:
    rows = [_row(tensor, "input") for tensor in call.inputs]
    rows += [(f"`{name}`", "setting", "", "") for name in call.settings]
    rows += [(f"`{name}`", "setting, optional", "", "") for name in call.optional]
    rows += [_row(tensor, "output") for tensor in call.outputs]
    table = markdown(("name", "is", "shape", "kind"), rows)
    return f"**`{call.name}`**: {call.says.replace('|', chr(92) + '|')}\n\n{table}"


def _row(tensor: Tensor, role: str) -> tuple[str, str, str, str]:
    shape = tensor.letters.replace("`minimoe.trace`", "[names](#names)") or "one number"
    return f"`{tensor.name}`", role + (", optional" if tensor.optional else ""), shape, tensor.kind


def settings() -> str:
    """Return what the settings mean."""
    return markdown(("setting", "meaning"), [(f"`{name}`", says) for name, says in SETTINGS.items()])


def profiles() -> str:
    """Return the numeric profiles."""
    return markdown(("profile", "where it rounds"), [(f"`{p.name}`", p.says) for p in PROFILES.values()])


def models() -> str:
    """Return the models of the bundled kit, with their sizes."""
    head = ("model", "V", "D", "L", "H/K", "C", "F", "E, k", "W", "theta", "for")
    rows = []
    for name, spec in MODELS.items():
        c = spec.config
        experts = "dense" if c.dense else f"{c.num_experts}, {c.num_experts_per_token}"
        sizes = [c.vocab_size, c.hidden_size, c.num_layers, f"{c.num_heads}/{c.num_kv_heads}", c.head_dim]
        rest = [c.intermediate_size, experts, c.sliding_window or "–", f"{c.rope_theta:.0e}".replace("e+0", "e")]
        rows.append([f"`{name}`", *map(str, sizes + rest), spec.why])
    return markdown(head, rows)


PARTS: dict[str, Callable[[], str]] = {
    "letters": letters,
    "calls": calls,
    "settings": settings,
    "profiles": profiles,
    "bounds": lambda: f"> {bounds.HOW}",
    "models": models,
    "names": names.tables,
}


def written(text: str) -> str:
    """Return a README with every part written anew."""
    for name, part in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        body = f"{begin}\n\n{part()}\n\n{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, body=body: body, text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"README.md must have one place for {name}"
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
