"""One known mistake: what it is, how it is planted, what an otherwise perfect implementation outputs with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import checkpoint
from minimoe.backends import Backend, make_backend
from minimoe.config import ModelConfig
from minimoe.golden.calls import CALLS, Arrays, GoldenModel, cast
from minimoe.golden.mutants.planting import Edit, edited_backend, edited_calls
from minimoe.golden.verify import Case
from minimoe.params import Params, map_leaves

WHOLE = ("block", "block.backward", "model", "model.chunks", "model.generate", "training")
# Where an op is used, other than everywhere.
_USED_BY = {
    "sampling": ("model.generate",),
    "kv_cache": ("model.chunks", "model.generate"),
    "cross_entropy": ("training",),
    "balance_loss": ("training",),
    "adamw": ("training",),
    "embedding": WHOLE[2:],
}
_MODULES = {"inputs": ("training",), "layers": WHOLE, "mixtral": WHOLE[2:], "generate": ("model.generate",)}
# What of a config an op is handed as a setting.
_SETTINGS = {
    "rope_theta": (("rope", "rope.backward"), "theta"),
    "sliding_window": (("attention", "attention.backward"), "window"),
    "norm_eps": (("rmsnorm", "rmsnorm.backward"), "eps"),
    "num_experts_per_token": (("gating",), "k"),
    "balance_form": (("balance_loss", "balance_loss.backward"), "form"),
    "balance_coefficient": ((), ""),
    "embedding_multiplier": ((), ""),
    "output_multiplier": ((), ""),
}


@dataclass(frozen=True, eq=False)
class Mutant:
    """A known mistake. It stands in one of the four places: `edits`, `params`, `config` or (as `edits`) the block.

    Attributes
    ----------
    name, says, remedy : what it is called, what is wrong, what to do
    planted : "op", "block", "params", "config", or "random" (edits whose outcome differs from run to run)
    edits : the lines of ours that it changes
    params : (a model's parameters and its config, or an op's inputs and None) -> the wrong ones; None: no change
    config : a field, and what its value becomes; None: no change (so "no window" must be a very large one)
    right : a function or class that shows the right way; by default the first edited line does
    seen : where in public code it was seen
    profiles : the numeric profiles in which it can be seen; empty: all
    inference_only : it has no gradient here, and acts on no call that trains
    tag : of the cases that it acts on; empty: all
    ops : ops whose inputs `params` changes
    harmless : why no output that is compared can show it; empty for all that some case tells apart
    """

    name: str
    says: str
    remedy: str
    planted: str
    edits: tuple[Edit, ...] = ()
    params: Callable[[Any, Any], Any] | None = None
    config: tuple[str, Callable[[Any], Any]] | None = None
    right: Any = None
    seen: str = ""
    profiles: tuple[str, ...] = ()
    inference_only: bool = False
    tag: str = ""
    ops: tuple[str, ...] = ()
    harmless: str = ""

    @property
    def where(self) -> tuple[Path, int]:
        """File and line that show the right way."""
        if self.right is None:
            return self.edits[0].where
        right = inspect.unwrap(self.right)
        return Path(inspect.getsourcefile(right) or ""), inspect.getsourcelines(right)[1]

    @cached_property
    def calls(self) -> frozenset[str]:
        """The calls whose outputs it may change."""
        reached = {call for edit in self.edits for call in _reach(edit)}
        if self.params is not None:
            reached |= {*WHOLE, *self.ops}
        if self.config is not None:
            field = self.config[0]
            reached |= {*_SETTINGS[field][0], *(("training",) if field.startswith("balance") else WHOLE)}
        return frozenset(call for call in reached if not (self.inference_only and CALLS[call].gradient))

    def applies(self, case: Case) -> bool:
        """Whether the mistake could change the outputs of a case."""
        if case.call not in self.calls or (self.tag and self.tag not in case.tags):
            return False
        return self.config is None or case.level != "op" or self._setting(case.settings) is not None

    def run(self, case: Case, ops: Backend | None = None, dtype: Any = np.float64) -> Arrays | None:
        """Compute what an implementation with this mistake outputs for a case: see the function `run`."""
        return run([self], case, ops, dtype)

    def change(self, asked: Asked) -> bool:
        """Plant what is no edit: in the parameters, the config or an op's settings; False where nothing changes."""
        if self.config is not None:
            return self._configure(asked)
        if self.params is None:
            return True
        if asked.model is None:
            asked.inputs = self.params(asked.inputs, None)
            return True
        changed = self.params(asked.model.params, asked.model.config)
        if changed is not None:
            asked.model = GoldenModel(asked.model.config.replace(tie_embeddings=changed.output is None), changed)
        return changed is not None

    def _configure(self, asked: Asked) -> bool:
        assert self.config is not None
        field, change = self.config
        if asked.model is None:
            asked.settings[_SETTINGS[field][1]] = self._setting(asked.settings)
            return True
        config = asked.model.config
        value = None if config.dense and field == "num_experts_per_token" else change(getattr(config, field))
        if value is not None:
            asked.model = GoldenModel(config.replace(**{field: value}), asked.model.params)
        return value is not None

    def _setting(self, settings: Mapping[str, Any]) -> Any:
        assert self.config is not None
        field, change = self.config
        return change(settings[_SETTINGS[field][1]])


@dataclass
class Asked:
    """What a call is computed from; params and config mutants change it."""

    inputs: Arrays
    settings: dict[str, Any]
    model: GoldenModel | None


def run(mutants: Sequence[Mutant], case: Case, ops: Backend | None = None, dtype: Any = np.float64) -> Arrays | None:
    """Compute what an otherwise perfect implementation with these mistakes outputs for a case.

    Parameters
    ----------
    ops, dtype : what computes all but the mistakes themselves; by default the array code in float64

    Returns
    -------
    {name: array}; None where none of them changes anything
    """
    here = [mutant for mutant in mutants if mutant.applies(case)]
    model = None if case.model_folder is None or not here else load(case.model_folder, np.dtype(dtype))
    asked = Asked(cast(case.call, case.inputs, dtype, dtype), dict(case.settings), model)
    return compute(here, case.call, asked, ops)


def compute(mutants: Sequence[Mutant], call: str, asked: Asked, ops: Backend | None = None) -> Arrays | None:
    """Compute a call with these mistakes; None where none of them changes anything."""
    here = [mutant for mutant in mutants if mutant.change(asked)]
    if not here:
        return None
    if asked.model is not None and "ids" in asked.inputs:  # a mistake in k shortens what is imposed
        asked.inputs["ids"] = asked.inputs["ids"][..., : asked.model.config.num_experts_per_token]
    edits = tuple(edit for mutant in here for edit in mutant.edits)
    decoder = edited_calls(tuple(edit for edit in edits if not edit.module.startswith("ops.")))
    edited = edited_backend(ops or _numpy(), edits)
    with np.errstate(all="ignore"):
        found: Arrays = decoder.run(call, edited, asked.inputs, asked.settings, asked.model)
    return found


def _reach(edit: Edit) -> list[str]:
    """The calls whose outputs an edit may change; what stands in a backward changes gradients alone."""
    _, _, rest = edit.module.partition("ops.")
    if room := rest.partition(".")[0]:
        calls = [call for call in (room, f"{room}.backward") if call in CALLS]
        calls += _USED_BY.get(room, WHOLE)
    else:
        calls = list(_MODULES.get(edit.module, ("training",)))
    if edit.function in ("backward", "silu_slope", "gelu_tanh_slope"):
        calls = [call for call in calls if call.endswith(".backward") or call == "training"]
    return ["training"] if edit.function == "loss_and_grads" else calls


@cache
def load(folder: Path, dtype: np.dtype[Any]) -> GoldenModel:
    """Read a model; its weights are widened to `dtype`."""
    config, params = checkpoint.load_params(folder, mapped=False)
    return GoldenModel(config, map_leaves(params, lambda w: np.asarray(w).astype(dtype)))


@cache
def config_of(folder: Path) -> ModelConfig:
    """Read a model's config, and nothing else."""
    return checkpoint.read_config(folder)


@cache
def _numpy() -> Backend:
    return make_backend("numpy")


def replace_layers(params: Params, change: Callable[[Any], Any]) -> Params:
    """Return the parameters with every layer changed."""
    return Params(params.tok_embeddings, [change(layer) for layer in params.layers], params.norm, params.output)
