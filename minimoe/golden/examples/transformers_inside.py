"""Reaching into transformers' Mixtral and Mistral: intermediates, routing and weights, under the kit's names.

Nothing of theirs is rewritten: hooks placed by the table of names read what flows, and routing is imposed by answering
their calls of torch.topk.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minimoe.golden.names import INTERMEDIATES, PARAMETERS

Arrays = dict[str, Any]
_HOOKED = re.compile(r"(input|output)(?:\[(\d)\])? of `([\w.]+)`.*")


@contextmanager
def recorded(model: nn.Module) -> Iterator[Arrays]:
    """Within it a forward pass fills the dictionary that it yields with intermediates by our names.

    No module hands on the scores before the softmax, nor the inside of the experts; sdpa keeps its probabilities.
    """
    found: Arrays = {}
    modules, handles = dict(model.named_modules()), []
    for known in INTERMEDIATES:
        match = _HOOKED.fullmatch(known.hugging_face)
        if match is None:
            continue
        side, item, place = match.groups()
        for layer in range(len(model.model.layers)) if ".N." in known.ours else [0]:
            module = modules.get(re.sub(r"\.N\b", f".{layer}", place))
            if module is not None:  # a dense layer has no gate
                hook = _keeper(found, known.ours.replace(".N.", f".{layer}."), side, item)
                handles.append(module.register_forward_hook(hook))
    try:
        with _rotation_recorded(model, found):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(found: Arrays, name: str, side: str, item: str | None) -> Callable[..., None]:
    def hook(_: Any, given: Any, result: Any) -> None:
        value = given[0] if side == "input" else result
        value = value if item is None else value[int(item)]
        if value is not None:
            flat = value.ndim == 3 and name != "logits"
            found[name] = value.flatten(0, 1) if flat else value  # (B, T, D) -> (N, D)

    return hook


@contextmanager
def _rotation_recorded(model: nn.Module, found: Arrays) -> Iterator[None]:
    """The rotation is a function of their module, no part of the model: it is wrapped while the layers run."""
    module = sys.modules[type(model).__module__]
    rotate, layer = module.apply_rotary_pos_emb, 0

    def enter(attention: Any, *_: Any) -> None:
        nonlocal layer
        layer = attention.layer_idx

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        rotated = rotate(*args, **kwargs)
        for name, x in zip("qk", rotated, strict=True):
            found[f"layers.{layer}.attention.{name}_rotated"] = x.transpose(1, 2).flatten(0, 1)  # (N, heads, C)
        return rotated

    handles = [each.self_attn.register_forward_pre_hook(enter) for each in model.model.layers]
    try:
        with mock.patch.object(module, "apply_rotary_pos_emb", wrapper):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Replay(TorchFunctionMode):  # type: ignore[misc] # torch is Any to mypy
    """Answers torch.topk with given ids, layer by layer, and from the first again: the balance loss asks once more."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self._ids = itertools.cycle(ids.clamp(min=0))  # padding is routed too: to expert 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.topk:
            ids = next(self._ids)
            return args[0].gather(-1, ids), ids
        return func(*args, **(kwargs or {}))


def replayed(ids: Any) -> AbstractContextManager[Any]:
    """Within it the routers choose `ids`, (N, k) or (L, N, k), and weigh them by their own formula; None: freely."""
    if ids is None:
        return nullcontext()
    ids = torch.tensor(ids)
    return _Replay(ids if ids.ndim == 3 else ids[None])


_PARTS: dict[str, Callable[[Any, int], Any]] = {
    "": lambda w, e: w,
    "M]": lambda w, e: w[e],
    "M, :F]": lambda w, e: w[e, : w.shape[1] // 2],
    "M, F:]": lambda w, e: w[e, w.shape[1] // 2 :],
}


def by_our_names(model: nn.Module, of: Callable[[Any], Any]) -> Arrays:
    """Return of(parameter) under our names, the experts one by one; what is None is left out."""
    theirs = dict(model.named_parameters())  # embeddings that are tied stand once
    found: Arrays = {}
    for known in PARAMETERS:
        place, _, part = (known.memory or known.hugging_face).partition("[")
        for layer in range(len(model.model.layers)) if ".N." in known.ours else [0]:
            name, parameter = known.ours.replace(".N.", f".{layer}."), theirs.get(place.replace(".N.", f".{layer}."))
            value = None if parameter is None else of(parameter)
            if value is not None:
                for e in range(len(value)) if part else [0]:
                    found[name.replace(".M.", f".{e}.")] = _PARTS[part](value, e)
    return found
