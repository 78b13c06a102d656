"""The adapter's single ops: each computed by the class or function of transformers that its Mixtral is made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MixtralConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.mixtral import modeling_mixtral as mixtral

from minimoe.golden.adapters import Adapter, NotOffered
from minimoe.golden.examples.transformers_inside import replayed

TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "hf_bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Arrays = dict[str, Any]


class TransformersOps(Adapter):
    """What needs no model; gradients are autograd's.

    Parameters
    ----------
    profile : "float64", "float32", "hf_bfloat16" or "float16"
    attention : "eager" or "sdpa"
    experts : "eager", "grouped_mm" or "batched_mm"
    """

    forces_routing = True

    def __init__(self, profile: str = "float32", attention: str = "eager", experts: str = "eager") -> None:
        self.profile, self.attention_name, self.experts_name = profile, attention, experts

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and states."""
        return TYPES[self.profile]

    def embedding(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        table = nn.Embedding.from_pretrained(self._tensor(inputs["table"]))
        return {"x": table(ids_tensor(inputs["tokens"]))}

    def embedding_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        dx = self._tensor(inputs["dx"])
        table = self._leaf(np.zeros((settings["vocab_size"], dx.shape[1])))
        nn.functional.embedding(ids_tensor(inputs["tokens"]), table).backward(dx)
        return {"dtable": table.grad}

    def rmsnorm(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, weight = self._tensor(inputs["x"]), self._tensor(inputs["weight"])
        if "residual" not in inputs:
            return {"y": self._norm(weight, settings["eps"])(x)}
        h = self._tensor(inputs["residual"]) + x  # as their decoder layer adds, before it norms
        return {"h": h, "y": self._norm(weight, settings["eps"])(h)}

    def rmsnorm_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, norm = self._leaf(inputs["x"]), self._norm(self._tensor(inputs["weight"]), settings["eps"])
        h = x + self._tensor(inputs["residual"]) if "residual" in inputs else x
        ends, gradients = [norm(h)], [self._tensor(inputs["dy"])]
        if "dh" in inputs:
            ends, gradients = [*ends, h], [*gradients, self._tensor(inputs["dh"])]
        torch.autograd.backward(ends, gradients)
        return {"dx": x.grad, "dweight": norm.weight.grad}

    def linear(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        return {"y": nn.functional.linear(self._tensor(inputs["x"]), self._tensor(inputs["w"]))}

    def linear_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, w = self._leaf(inputs["x"]), self._leaf(inputs["w"])
        nn.functional.linear(x, w).backward(self._tensor(inputs["dy"]))
        return {"dx": x.grad, "dw": w.grad}

    def rope(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x = self._tensor(inputs["x"])
        y, cos, sin = self._rotate(x, inputs["positions"], settings["theta"])
        half = x.shape[-1] // 2  # they keep both halves, which are the same
        return {"cos": cos[0, :, :half], "sin": sin[0, :, :half], "y": y}

    def rope_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x = self._leaf(np.zeros(inputs["dy"].shape))  # a rotation is linear: any x has this gradient
        self._rotate(x, inputs["positions"], settings["theta"])[0].backward(self._tensor(inputs["dy"]))
        return {"dx": x.grad}

    def attention(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        q, k, v = (self._tensor(inputs[name]) for name in "qkv")
        out, probs = self._attend(q, k, v, inputs["q_pos"], inputs["k_pos"], settings["window"])
        return {"out": out} if probs is None else {"probs": probs, "out": out}

    def attention_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        q, k, v = (self._leaf(inputs[name]) for name in "qkv")
        out, _probs = self._attend(q, k, v, inputs["q_pos"], inputs["k_pos"], settings["window"])
        out.backward(self._tensor(inputs["dout"]))
        return {"dq": q.grad, "dk": k.grad, "dv": v.grad}

    def kv_cache(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        raise NotOffered("its caches join the new keys at the end and cut the old ones off: there are no slots")

    def gating(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        if "active" in inputs:
            raise NotOffered("its router routes padding too")
        router = self._router(inputs["gate"], settings["k"])
        with replayed(inputs.get("ids")):
            return dict(zip(("logits", "weights", "ids"), router(self._tensor(inputs["x"])), strict=True))

    def gating_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, router = self._leaf(inputs["x"]), self._router(inputs["gate"], inputs["ids"].shape[1])
        with replayed(inputs["ids"]):
            logits, weights, _ids = router(x)
        ends, gradients = [weights], [self._tensor(inputs["dweights"]).to(weights.dtype)]
        if "dlogits" in inputs:
            ends, gradients = [*ends, logits], [*gradients, self._tensor(inputs["dlogits"])]
        torch.autograd.backward(ends, gradients)
        return {"dx": x.grad, "dgate": router.weight.grad}

    def experts(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, weights = self._tensor(inputs["x"]), self._tensor(inputs["weights"])
        return {"out": self._experts(inputs)(x, *_routing(inputs["ids"], weights))}

    def experts_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        x, weights, experts = self._leaf(inputs["x"]), self._leaf(inputs["weights"]), self._experts(inputs)
        experts(x, *_routing(inputs["ids"], weights)).backward(self._tensor(inputs["dout"]))
        dw1, dw3 = experts.gate_up_proj.grad.chunk(2, dim=1)
        dw2 = experts.down_proj.grad
        return {"dx": x.grad, "dw1": dw1, "dw2": dw2, "dw3": dw3, "dweights": weights.grad}

    def cross_entropy(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        return {"loss": _cross_entropy(self._tensor(inputs["logits"]), inputs["targets"])}

    def cross_entropy_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        logits = self._leaf(inputs["logits"])
        _cross_entropy(logits, inputs["targets"]).backward()
        return {"dlogits": logits.grad}

    def balance_loss(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        return {"loss": _balance_loss(self._tensor(inputs["logits"]), inputs, settings["form"])}

    def balance_loss_backward(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        logits = self._leaf(inputs["logits"])
        _balance_loss(logits, inputs, settings["form"]).backward()
        return {"dlogits": logits.grad}

    def adamw(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        w, m, v = self._leaf(inputs["w"]), self._tensor(inputs["m"]), self._tensor(inputs["v"])
        optimizer = make_adamw([w], settings, settings["weight_decay"])
        optimizer.state[w] = {"step": torch.tensor(settings["step"] - 1.0), "exp_avg": m, "exp_avg_sq": v}
        w.grad = self._tensor(inputs["g"]) * settings["scale"]
        optimizer.step()
        return {"m": m, "v": v, "w": w}

    def sampling(self, inputs: Arrays, settings: Arrays, _: Path | None) -> Arrays:
        if settings["temperature"] > 0:
            raise NotOffered("it draws with torch.multinomial, which takes no random numbers from outside")
        return {"ids": self._tensor(inputs["logits"]).argmax(dim=-1)}

    # ---- helpers

    def _tensor(self, x: Any) -> torch.Tensor:
        """Inputs are float32, and exact in the 16-bit types where a case is for them."""
        return torch.tensor(np.asarray(x, np.float64)).to(self.dtype)

    def _leaf(self, x: Any) -> torch.Tensor:
        return self._tensor(x).requires_grad_()

    def _norm(self, weight: torch.Tensor, eps: float) -> nn.Module:
        norm = mixtral.MixtralRMSNorm(len(weight), eps)
        norm.weight = nn.Parameter(weight)
        return norm

    def _rotate(self, x: torch.Tensor, positions: Any, theta: float) -> tuple[torch.Tensor, ...]:
        config = MixtralConfig(head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": theta})
        cos, sin = mixtral.MixtralRotaryEmbedding(config)(x, ids_tensor(positions)[None])
        q = x.transpose(0, 1)[None]  # (N, H, C) -> (1, H, N, C)
        return mixtral.apply_rotary_pos_emb(q, q, cos, sin)[0][0].transpose(0, 1), cos, sin

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_pos: Any, k_pos: Any, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen = masking_utils.causal_mask_function
        if window is not None:
            seen = masking_utils.sliding_window_causal_mask_function(window)
        queries, keys = ids_tensor(q_pos)[:, None, :, None], ids_tensor(k_pos)[:, None, None, :]
        mask = seen(0, 0, queries, keys) & (keys >= 0)  # (B, 1, T, S); theirs has a mask for padding
        if self.attention_name == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)  # as their masks are made
        forward = {"eager": mixtral.eager_attention_forward, "sdpa": sdpa_attention_forward}[self.attention_name]
        module = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], training=False)
        out, probs = forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=q.shape[-1] ** -0.5)
        return out, probs

    def _router(self, gate: Any, k: int) -> nn.Module:
        (E, D), weight = gate.shape, self._tensor(gate)
        router = mixtral.MixtralTopKRouter(MixtralConfig(num_experts_per_tok=k, num_local_experts=E, hidden_size=D))
        router.weight = nn.Parameter(weight)
        return router

    def _check_sizes(self, *sizes: int) -> None:
        if self.experts_name == "grouped_mm" and any(n * self.dtype.itemsize % 16 for n in sizes):
            raise NotOffered("torch's grouped product takes only rows of a multiple of 16 bytes")

    def _experts(self, inputs: Arrays) -> nn.Module:
        w1, w2, w3 = (self._tensor(inputs[name]) for name in ("w1", "w2", "w3"))
        E, F, D = w1.shape
        self._check_sizes(D, F)
        config = MixtralConfig(num_local_experts=E, intermediate_size=F, hidden_size=D)
        config._experts_implementation = self.experts_name
        experts = mixtral.MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.cat([w1, w3], dim=1)), nn.Parameter(w2)
        return experts


def ids_tensor(x: Any) -> torch.Tensor:
    """Ids, positions and masks as integers."""
    return torch.tensor(np.asarray(x, np.int64))


def _routing(ids: Any, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their experts know no token that is not routed: it goes to expert 0 with weight 0."""
    return ids_tensor(np.maximum(ids, 0)), torch.where(torch.tensor(ids >= 0), weights, 0)


def _cross_entropy(logits: torch.Tensor, targets: Any) -> torch.Tensor:
    labels = ids_tensor(np.where(targets >= 0, targets, -100))
    return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=labels)


def _balance_loss(logits: torch.Tensor, inputs: Arrays, form: str) -> torch.Tensor:
    if form != "concatenated":
        raise NotOffered(f"it has no balance loss of the form {form}")
    mask = torch.tensor(inputs["active"]).long() if "active" in inputs else None
    (_L, _N, E), k = logits.shape, inputs["ids"].shape[-1]
    with replayed(inputs["ids"]):
        return mixtral.load_balancing_loss_func(tuple(logits), E, k, mask)


def make_adamw(params: list[Any], settings: Arrays, weight_decay: float) -> torch.optim.Optimizer:
    """torch's AdamW with the settings of a case."""
    betas = settings["beta1"], settings["beta2"]
    return torch.optim.AdamW(params, settings["lr"], betas, settings["eps"], weight_decay, foreach=False)
