"""A complete adapter: Hugging Face transformers' Mixtral (and Mistral, for dense models) held against the kit.

    pytest --minimoe-adapter minimoe.golden.examples.transformers_adapter:Float32

Every call that has a counterpart is computed by transformers' own classes and functions, single ops too, so that a
mistake in one of them shows in the smallest case that has it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.utils import logging

from minimoe.golden.adapters import NotOffered
from minimoe.golden.examples.lifted import lifted
from minimoe.golden.examples.transformers_inside import by_our_names, recorded, replayed
from minimoe.golden.examples.transformers_ops import Arrays, TransformersOps, ids_tensor, make_adamw
from minimoe.golden.verify import Case

logging.disable_progress_bar()  # one for each of many small models


@dataclass(frozen=True)
class Deviation:
    """Cases that transformers answers in another way on purpose, and why: failures that are expected.

    Attributes
    ----------
    cases, profiles, attention : patterns of ids, of profiles, and of attention implementations
    """

    cases: tuple[str, ...]
    why: str
    profiles: str = "*"
    attention: str = "*"


DEVIATIONS = (
    Deviation(
        ("gating/ties-*", "block/ties", "model/ties"),
        "exact ties go to whichever expert torch.topk returns, not to the lower id",
    ),
    Deviation(
        ("rope/theta-1e4", "rope/scattered", "rope/far", "rope.backward/far", "block/far", "model/far"),
        "angles are computed in float32, which is off by position · 6e-8: cos and sin show it from position 40 on, "
        "logits from some thousand on",
        profiles="float32",
    ),
    Deviation(
        ("model/far-theta-1e4",),
        "its window counts tokens in the row, not positions: gaps between positions do not leave it",
    ),
    Deviation(
        ("attention/nothing-visible", "attention/padding", "attention.backward/padding"),
        "its masks add the lowest finite number, so a query that sees no key gets the mean of all values, not zeros",
        attention="eager",
    ),
    Deviation(
        ("attention/product-overflow",),
        "it scales the scores after their product has been rounded to float16, beyond whose range it lies",
        profiles="float16",
        attention="eager",
    ),
    Deviation(("cross_entropy/nothing-counted",), "a mean over no targets is 0 / 0"),
)


class TransformersAdapter(TransformersOps):
    """transformers in one numeric profile; in "float64" its casts to float32 are lifted."""

    def __init__(self, profile: str = "float32", attention: str = "eager", experts: str = "eager") -> None:
        super().__init__(profile, attention, experts)
        self._models: dict[tuple[Path, torch.dtype], Any] = {}

    @property
    def deviations(self) -> dict[str, str]:
        """Patterns of the cases that deviate in this profile and with this attention, and why."""
        here = [
            d
            for d in DEVIATIONS
            if fnmatchcase(self.profile, d.profiles) and fnmatchcase(self.attention_name, d.attention)
        ]
        return {pattern: d.why for d in here for pattern in d.cases}

    def run(self, case: Case, ids: Any = None) -> Arrays:
        """Compute a case; of the intermediates, those that it holds a truth for."""
        with lifted() if self.profile == "float64" else nullcontext():
            found = super().run(case, ids)
        return {output.name: found[output.name] for output in case.outputs if output.name in found}

    def block(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        model, i = self._model(folder), settings["layer"]
        x = self._tensor(inputs["x"])
        with torch.no_grad(), recorded(model) as found, replayed(inputs.get("ids")):
            out = self._block(model, i, x, inputs.get("mask"), inputs.get("positions"))
        prefix = f"layers.{i}."
        return {name.removeprefix(prefix): a for name, a in found.items() if name.startswith(prefix)} | {"out": out}

    def block_backward(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        model, i, x = self._model(folder), settings["layer"], self._leaf(inputs["x"])
        model.zero_grad()
        with replayed(inputs["ids"]):
            self._block(model, i, x).backward(self._tensor(inputs["dout"]))
        grads = by_our_names(model, lambda p: p.grad)  # of this layer: the others have none
        return {"dx": x.grad} | {f"grads.{name.removeprefix(f'layers.{i}.')}": g for name, g in grads.items()}

    def model(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        model = self._model(folder)
        with torch.no_grad(), recorded(model) as found, replayed(inputs.get("ids")):
            logits = model(**_batch(inputs), use_cache=False).logits
        return found | {"logits": logits}

    def model_chunks(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        model = self._model(folder)
        cache, tokens = DynamicCache(config=model.config), ids_tensor(inputs["tokens"])
        with torch.no_grad():
            chunks = [model(chunk, past_key_values=cache).logits for chunk in tokens.split(settings["chunks"], dim=1)]
        return {"logits": torch.cat(chunks, dim=1)}

    def model_generate(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        if settings["temperature"] > 0:
            raise NotOffered("it draws with torch.multinomial, which takes no random numbers from outside")
        model, tokens = self._model(folder), inputs["tokens"]
        mask = inputs.get("mask", np.ones(tokens.shape, bool))
        order = np.argsort(mask, axis=1, kind="stable")  # its generation wants the padding on the left
        ids = model.generate(
            ids_tensor(np.take_along_axis(np.where(mask, tokens, 0), order, axis=1)),
            attention_mask=ids_tensor(np.take_along_axis(mask, order, axis=1)),
            max_new_tokens=len(inputs["uniform"]), do_sample=False, pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
        return {"ids": ids[:, tokens.shape[1] :]}

    def training(self, inputs: Arrays, settings: Arrays, folder: Path) -> Arrays:
        model, labels = self._model(folder, shared=False), _labels(inputs)  # its own: the step changes the weights
        form = getattr(model.config, "minimoe", {}).get("balance_form", "concatenated")
        if form != "concatenated":
            raise NotOffered(f"it has no balance loss of the form {form}")
        with replayed(inputs.get("ids")):
            out = model(**_batch(inputs), labels=labels, use_cache=False, output_router_logits=True)
        out.loss.backward()
        weights = list(model.parameters())
        norm = nn.utils.get_total_norm([w.grad for w in weights])
        found = {
            "cross_entropy": model.loss_function(out.logits, labels, model.vocab_size),
            "balance_loss": out.get("aux_loss", torch.zeros(())),  # a dense model has none
            "loss": out.loss,
            **{f"grads.{name}": g for name, g in by_our_names(model, lambda w: w.grad.clone()).items()},
            "gradient_norm": norm,
        }
        for w in weights:
            w.grad *= min(1.0, settings["clip"] / norm.item())  # torch's clip_grad_norm_ divides by norm + 1e-6
        make_adamw([w for w in weights if w.ndim > 1], settings, settings["weight_decay"]).step()
        make_adamw([w for w in weights if w.ndim == 1], settings, weight_decay=0.0).step()
        return found | {f"updated.{name}": w for name, w in by_our_names(model, lambda w: w).items()}

    # ---- helpers

    def _block(
        self, model: nn.Module, i: int, x: torch.Tensor, mask: Any = None, positions: Any = None
    ) -> torch.Tensor:
        given = _batch({"tokens": np.zeros(x.shape[:2], int), "mask": mask, "positions": positions})
        position_ids = given.get("position_ids", torch.arange(x.shape[1])[None])
        windowed = model.config.sliding_window is not None
        make_mask = mixtral.create_sliding_window_causal_mask if windowed else mixtral.create_causal_mask
        causal = make_mask(
            config=model.config, inputs_embeds=x, attention_mask=given.get("attention_mask"), past_key_values=None,
            position_ids=position_ids,
        )  # fmt: skip
        rotary = model.model.rotary_emb(x, position_ids)
        return model.model.layers[i](
            x, attention_mask=causal, position_ids=position_ids, position_embeddings=rotary, use_cache=False
        )

    def _model(self, folder: Path, shared: bool = True) -> Any:
        if shared and (folder, self.dtype) in self._models:
            return self._models[folder, self.dtype]
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        moe = config.model_type == "mixtral"
        if moe:
            self._check_sizes(config.hidden_size, config.intermediate_size)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation=self.attention_name, local_files_only=True,
            **{"experts_implementation": self.experts_name} if moe else {},
        ).eval()  # fmt: skip
        if shared:
            self._models[folder, self.dtype] = model
        return model


def _labels(inputs: Arrays) -> torch.Tensor:
    """A target counts where it and its predecessor are unmasked; -100 does not count."""
    labels, mask = np.array(inputs["tokens"]), inputs.get("mask")
    if mask is not None:
        labels[~mask] = -100
        labels[:, 1:][~mask[:, :-1]] = -100
    return ids_tensor(labels)


def _batch(inputs: Arrays) -> Arrays:
    """Tokens, mask and positions as their models take them.

    They count padding as positions unless told otherwise, and without a mask take a gap in the positions for the border
    between two texts packed into one row.
    """
    tokens, mask, positions = inputs["tokens"], inputs.get("mask"), inputs.get("positions")
    if mask is None and positions is None:
        return {"input_ids": ids_tensor(tokens)}
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    positions = np.cumsum(mask, axis=1) - 1 if positions is None else positions
    positions = np.where(mask, positions, -1)
    return {
        "input_ids": ids_tensor(np.where(mask, tokens, 0)),
        "attention_mask": ids_tensor(mask),
        "position_ids": ids_tensor(positions),
    }


Float64 = partial(TransformersAdapter, "float64")
Float32 = partial(TransformersAdapter, "float32")
BFloat16 = partial(TransformersAdapter, "hf_bfloat16")
