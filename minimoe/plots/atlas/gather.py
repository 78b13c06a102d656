"""What an atlas is made from: a model reads texts, and every decision of every router is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Int

from minimoe import ablation, reading
from minimoe.ablation import Ablation
from minimoe.arrays import to_host
from minimoe.display import shown_piece, text_pieces
from minimoe.model import Model
from minimoe.reading import WINDOW, Reading, count_windows
from minimoe.shapes import Array, Routing
from minimoe.token_types import token_types
from minimoe.tokenizer import Tokenizer

UNIT = 64  # tokens that keep together when domains are dealt out anew
MOST_TEXTS = 24  # that get a panel each


class Watch:
    """A model whose gate notes ids, weights and logits of every call; `model` is to be read with.

    Kept are L·(12·k + 4·E) bytes a token, of a text that is read in windows twice that: they overlap by half.
    """

    def __init__(self, model: Model) -> None:
        self._calls: list[tuple[Array, Array, Array]] = []
        gate = model.ops.gating

        def forward(*args: Any, **kwargs: Any) -> Any:
            logits, ids, weights = gate.forward(*args, **kwargs)
            self._calls.append(tuple(np.array(to_host(x)) for x in (ids, weights, logits)))  # type: ignore[arg-type]
            return logits, ids, weights

        watched: Any = SimpleNamespace(**{**vars(gate), "forward": forward})
        ops = dataclasses.replace(model.ops, gating=watched)
        self.model = Model(model.config, model.params, ops, model.tokenizer)

    def routing(self, one: Reading) -> Routing:
        """Return the routing of the text that was read first of those not yet asked for."""
        n, L = one.tokens.size + 1, self.model.config.num_layers
        rows, used = count_windows(n, one.window) * one.window, 0
        while rows > 0:
            rows -= len(self._calls[used][0])
            used += L
        calls, self._calls = self._calls[:used], self._calls[used:]
        parts = [reading.in_text_order([call[i] for call in calls], L, n, one.window)[:, 1:] for i in range(3)]
        return Routing(*parts)


@dataclass(frozen=True, eq=False)
class Specimen:
    """One text of an atlas.

    Attributes
    ----------
    name : to be shown, without control characters; no two of an atlas are alike
    reading : what became of its n tokens
    routing : ids and weights (L, n, k), logits (L, n, E)
    pieces : n texts
    """

    name: str
    reading: Reading
    routing: Routing
    pieces: list[str]

    @property
    def ids(self) -> Int[Array, "L n k"]:
        """Chosen experts."""
        return self.routing.ids


@dataclass(frozen=True, eq=False)
class Atlas:
    """A model, the texts it has read, and how its routers decided.

    Attributes
    ----------
    model : with L layers of E experts, k a token
    name : of the model
    texts : G of them
    seed : of every shuffle
    costs : what each expert is worth, if it was measured
    """

    model: Model
    name: str
    texts: tuple[Specimen, ...]
    seed: int = 0
    costs: Ablation | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """L, E and k."""
        config = self.model.config
        return config.num_layers, config.num_experts, config.num_experts_per_token

    @property
    def shown(self) -> tuple[Specimen, ...]:
        """The texts that get a panel each."""
        return self.texts[:MOST_TEXTS]

    @cached_property
    def ids(self) -> Int[Array, "L N k"]:
        """Experts of the tokens of all texts, one after the other."""
        return np.concatenate([text.ids for text in self.texts], axis=1)

    @cached_property
    def routing(self) -> Routing:
        """The same with weights and logits."""
        every = [text.routing for text in self.texts]
        weights, logits = (np.concatenate([getattr(one, x) for one in every], axis=1) for x in ("weights", "logits"))
        return Routing(self.ids, weights, logits)

    @cached_property
    def tokens(self) -> Int[Array, " N"]:
        """Token ids of all texts."""
        return np.concatenate([text.reading.tokens for text in self.texts])

    @cached_property
    def kinds(self) -> Int[Array, " N"]:
        """Kind of every token, as `token_types` numbers them."""
        return np.concatenate([token_types(text.pieces) for text in self.texts])

    @cached_property
    def domains(self) -> Int[Array, " N"]:
        """Number of the text that every token is from."""
        return np.repeat(np.arange(len(self.texts)), [len(text.pieces) for text in self.texts])


def assemble(
    model: Model, name: str, readings: Sequence[Reading], watch: Watch, *, seed: int = 0, costs: Ablation | None = None
) -> Atlas:
    """Make an atlas of what `watch.model` has read."""
    tokenizer = tokenizer_of(model)
    names = clean_names([one.name for one in readings])
    texts = tuple(
        Specimen(shown, one, watch.routing(one), text_pieces(tokenizer, one.tokens.tolist()))
        for shown, one in zip(names, readings, strict=True)
    )
    return Atlas(model, clean(name), texts, seed, costs)


def gather(
    model: Model,
    texts: Mapping[str, str],
    *,
    name: str = "model",
    window: int | None = None,
    seed: int = 0,
    switch_off: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Atlas:
    """Let a model read texts and keep every decision of its routers; the arguments are those of `routing_page`."""
    if model.config.dense:
        raise ValueError("a dense model has no router: there is nothing to route")
    if not texts:
        raise ValueError("no text was given: there is nothing to route")
    window = min(WINDOW, model.config.max_length) if window is None else window
    if not 2 <= window <= model.config.max_length:
        raise ValueError(f"window must be between 2 and the model's {model.config.max_length} tokens, not {window}")
    watch, tokenizer = Watch(model), tokenizer_of(model)
    ops, config, params = watch.model.ops, model.config, model.params
    readings = [
        reading.read(ops, config, params, tokenizer, text, name=title, window=window, progress=progress)
        for title, text in texts.items()
    ]
    costs = measure_costs(model, readings, progress) if switch_off else None
    return assemble(model, name, readings, watch, seed=seed, costs=costs)


def measure_costs(
    model: Model, readings: Sequence[Reading], progress: Callable[[int], object] | None = None
) -> Ablation:
    """Switch every expert off in turn: L · E + 1 passes over two windows of every text, 24 texts at most."""
    bos, readings = tokenizer_of(model).bos_id, readings[:MOST_TEXTS]
    names = clean_names([one.name for one in readings])
    encoded = {name: [bos, *one.tokens.tolist()] for name, one in zip(names, readings, strict=True)}
    window = max(one.window for one in readings)
    return ablation.switch_off(model.ops, model.config, model.params, encoded, window=window, progress=progress)


def tokenizer_of(model: Model) -> Tokenizer:
    """Return the model's tokenizer, or say that it has none."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: it cannot read text")
    return model.tokenizer


def clean(name: str) -> str:
    """Make a name printable: control characters, line ends and marks of direction become escapes.

    >>> clean("a\\u202eb\\n")
    'a\\\\u202eb\\\\n'
    """
    return shown_piece(name).replace("\n", "\\n").replace("\t", "\\t")


def clean_names(names: Sequence[str]) -> list[str]:
    """Make names printable; those that became alike are numbered."""
    shown: list[str] = []
    for name in map(clean, names):
        unique, count = name, 2
        while unique in shown:
            unique, count = f"{name} ({count})", count + 1
        shown.append(unique)
    return shown
