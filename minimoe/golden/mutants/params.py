"""Mistakes in loading weights and in reading the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from minimoe.checkpoint import mathematics
from minimoe.config import ModelConfig
from minimoe.golden.cases.draw import GROK
from minimoe.golden.mutants.mutant import Mutant, replace_layers
from minimoe.ops import balance_loss, experts, gating, rmsnorm, rope
from minimoe.ops.attention import reference as attention
from minimoe.params import AttentionParams, FeedForwardParams, LayerParams, Params
from minimoe.shapes import Array

Change = Callable[[Any, ModelConfig | None], Any]  # of a model's parameters, or of an op's inputs, with no config


def _ffn(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Change:
    """Change w1, w2, w3 (E, ., .) wherever they are: in a model's layers, or among the inputs of an op."""

    def layer(old: LayerParams) -> LayerParams:
        f = old.feed_forward
        changed = change({"w1": np.stack(f.w1), "w2": np.stack(f.w2), "w3": np.stack(f.w3)})
        return dataclasses.replace(old, feed_forward=FeedForwardParams(f.gate, **changed))

    def apply(held: Any, _: ModelConfig | None) -> Any:
        if isinstance(held, Params):
            return replace_layers(held, layer)
        return held | change({name: held[name] for name in ("w1", "w2", "w3")})

    return apply


def _attention(change: Callable[[AttentionParams, int], AttentionParams]) -> Change:
    """Change the attention of every layer; `change` is told C."""

    def apply(params: Any, config: ModelConfig | None) -> Params:
        assert config is not None
        C = config.head_dim
        return replace_layers(params, lambda old: dataclasses.replace(old, attention=change(old.attention, C)))

    return apply


def _read_across(w: Array) -> Array:
    """The numbers of w (..., rows, columns), read as if it were stored (columns, rows): of a square, its transpose."""
    *before, rows, columns = w.shape
    return np.ascontiguousarray(w.reshape(*before, columns, rows).swapaxes(-1, -2))


def _gate_across(held: Any, _: ModelConfig | None) -> Any:
    if not isinstance(held, Params):
        return held | {"gate": _read_across(held["gate"])}

    def layer(old: LayerParams) -> LayerParams:
        f = old.feed_forward
        gate = None if f.gate is None else _read_across(f.gate)
        return dataclasses.replace(old, feed_forward=dataclasses.replace(f, gate=gate))

    return replace_layers(held, layer)


def _permuted(a: AttentionParams, C: int) -> AttentionParams:
    """Permute wq and wk, which are half-split already, as if they were interleaved."""
    wq, wk = (w.reshape(-1, C // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape) for w in (a.wq, a.wk))
    return dataclasses.replace(a, wq=wq, wk=wk)


def _tied(params: Params, _: ModelConfig) -> Params | None:
    return None if params.output is None else Params(params.tok_embeddings, params.layers, params.norm, None)


def _tables_exchanged(params: Params, _: ModelConfig) -> Params | None:
    if params.output is None:
        return None
    return Params(params.output, params.layers, params.norm, params.tok_embeddings)


def _first_layer_only(params: Params, _: ModelConfig) -> Params:
    return dataclasses.replace(params, layers=[params.layers[0]] * len(params.layers))


def _norms_exchanged(params: Params, _: ModelConfig) -> Params:
    return replace_layers(
        params, lambda old: dataclasses.replace(old, attention_norm=old.ffn_norm, ffn_norm=old.attention_norm)
    )


def _grok_norms(**instead: str) -> Change:
    """Exchange norms of a block that has four."""

    def layer(old: LayerParams) -> LayerParams:
        return dataclasses.replace(old, **{name: getattr(old, other) for name, other in instead.items()})

    return lambda params, _: replace_layers(params, layer)


PARAMS = [
    Mutant("w1-w3-exchanged", "w1 and w3 are exchanged when loading",
           "w1 goes through silu (gate_proj), w3 does not (up_proj), w2 is the way back (down_proj)", "params",
           params=_ffn(lambda w: {"w1": w["w3"], "w2": w["w2"], "w3": w["w1"]}), right=experts.Experts.forward,
           inference_only=True, ops=("experts",)),
    Mutant("w2-not-transposed", "w2 is read as if it were stored the other way round",
           "w2 is (D, F) in Hugging Face's and Mistral's files, (F, D) in the first release's stacked ones", "params",
           params=_ffn(lambda w: w | {"w2": _read_across(w["w2"])}), right=experts.Experts.forward,
           seen="the original Mixtral release stores it transposed", inference_only=True, ops=("experts",)),
    Mutant("experts-shifted", "expert e has the weights of expert e + 1: ids count from 1, or the stack is cut wrongly",
           "expert ids count from 0, in the order of the gate's rows", "params",
           params=_ffn(lambda w: {name: np.roll(x, -1, axis=0) for name, x in w.items()}), right=experts.Experts,
           inference_only=True, ops=("experts",)),
    Mutant("gate-not-transposed", "the gate is read as if it were stored (D, E)",
           "the gate is (E, D): a row per expert", "params",
           params=_gate_across, right=gating.Gating.forward, inference_only=True, ops=("gating",)),
    Mutant("wq-wk-permuted-again", "wq and wk, which are half-split already, are permuted once more",
           "permute Mistral's files (interleaved) only, not Hugging Face's", "params",
           params=_attention(_permuted), right=rope.Rope.forward, inference_only=True),
    Mutant("k-v-exchanged", "wk and wv are exchanged: a fused matrix was cut in another order",
           "Hugging Face's order is q, k, v", "params",
           params=_attention(lambda a, _: dataclasses.replace(a, wk=a.wv, wv=a.wk)), right=LayerParams,
           inference_only=True),
    Mutant("wo-not-transposed", "wo is read as if it were stored the other way round", "wo is (D, H·C)", "params",
           params=_attention(lambda a, _: dataclasses.replace(a, wo=_read_across(a.wo))), right=LayerParams,
           inference_only=True),
    Mutant("norms-exchanged", "the weights of a block's two norms are exchanged",
           "input_layernorm comes before attention, post_attention_layernorm before the experts", "params",
           params=_norms_exchanged, right=LayerParams, inference_only=True),
    Mutant("post-norms-exchanged", "the weights of a block's two post-norms are exchanged",
           "of a block's four norms the second follows attention, the fourth the experts", "params",
           params=_grok_norms(attention_post_norm="ffn_post_norm", ffn_post_norm="attention_post_norm"),
           right=LayerParams, inference_only=True, tag=GROK),
    Mutant("norms-two-and-three-exchanged", "the norm after attention and the one before the experts are exchanged",
           "of a block's four norms the second follows attention, the third comes before the experts", "params",
           params=_grok_norms(attention_post_norm="ffn_norm", ffn_norm="attention_post_norm"), right=LayerParams,
           seen="transformers calls Mixtral's ffn_norm post_attention_layernorm", inference_only=True, tag=GROK),
    Mutant("embeddings-tied", "the output matrix is the embedding table, although the model has one of its own",
           "read lm_head (output) unless the config says tie_word_embeddings", "params", params=_tied,
           right=Params, inference_only=True),
    Mutant("embedding-and-output-exchanged", "embedding table and output matrix are exchanged",
           "embed_tokens is read by token, lm_head makes the logits", "params", params=_tables_exchanged, right=Params,
           inference_only=True),
    Mutant("first-layer-everywhere", "all layers have the first layer's weights", "layer i reads layers.i", "params",
           params=_first_layer_only, right=Params, inference_only=True),
]  # fmt: skip


def _instead(wrong: float, when: Callable[[float], bool] = lambda right: True) -> Callable[[Any], Any]:
    return lambda right: wrong if right != wrong and when(right) else None


def _config(
    name: str, says: str, remedy: str, field: str, change: Callable[[Any], Any], right: Any, seen: str = "",
) -> Mutant:  # fmt: skip
    tag = GROK if field.endswith("multiplier") else ""
    return Mutant(name, says, remedy, "config", config=(field, change), right=right, seen=seen, tag=tag)


_BALANCE = balance_loss.BalanceLoss.forward
_EMBEDDINGS = "multiply embeddings by embedding_multiplier, before the first block: the stream holds the product"
_LOGITS = "multiply logits by output_multiplier"
_READ = "read rope_theta from the config: 1e6 for Mixtral, 1e4 for Mistral 7B v0.1"
CONFIG = [
    _config("theta-1e4", "RoPE's theta is 1e4 instead of what the config says", _READ, "rope_theta", _instead(1e4),
            mathematics.rope_theta, seen="a default that nobody set"),
    _config("theta-1e6", "RoPE's theta is 1e6 instead of what the config says", _READ, "rope_theta", _instead(1e6),
            mathematics.rope_theta),
    _config("window-ignored", "the sliding window is not applied", "mask keys W or more positions back",
            "sliding_window", lambda W: None if W is None else 2**31 - 1, attention.visible),
    _config("window-and-cache-one-wider", "the window is W + 1, and so is the cache", "W counts the query itself",
            "sliding_window", lambda W: None if W is None else W + 1, attention.visible),
    _config("window-and-cache-one-narrower", "the window is W - 1, and so is the cache", "W counts the query itself",
            "sliding_window", lambda W: None if W is None or W == 1 else W - 1, attention.visible),
    _config("eps-1e-6", "the norm's eps is 1e-6 instead of what the config says", "read rms_norm_eps from the config",
            "norm_eps", _instead(1e-6), rmsnorm.RMSNorm.forward),
    _config("eps-1e-5", "the norm's eps is 1e-5 instead of what the config says", "read rms_norm_eps from the config",
            "norm_eps", _instead(1e-5), rmsnorm.RMSNorm.forward),
    _config("top-1-only", "one expert is chosen per token", "read num_experts_per_tok from the config",
            "num_experts_per_token", _instead(1), gating.Gating.forward),
    _config("balance-per-layer-instead-of-concatenated", "the balance loss is a mean of one per layer",
            "for the form concatenated, average shares and probabilities over all layers' tokens, then multiply",
            "balance_form", lambda form: "per_layer" if form == "concatenated" else None, _BALANCE),
    _config("balance-concatenated-instead-of-per-layer", "the balance loss is over all layers' tokens at once",
            "for the form per_layer, take one loss per layer, then their mean: layers must not cancel out",
            "balance_form", lambda form: "concatenated" if form == "per_layer" else None, _BALANCE,
            seen="transformers means it so"),
    _config("balance-over-all-choices", "the balance loss counts all k choices where the form is Switch's",
            "for the form switch, count first choices only", "balance_form",
            lambda form: "per_layer" if form == "switch" else None, _BALANCE),
    _config("balance-over-first-choices", "the balance loss counts first choices only", "count all k choices",
            "balance_form", lambda form: "switch" if form == "per_layer" else None, _BALANCE,
            seen="Switch means it so"),
    _config("balance-coefficient-ignored", "the balance loss is added with a coefficient of 1",
            "multiply it by router_aux_loss_coef", "balance_coefficient", _instead(1.0), ModelConfig),
    _config("embedding-multiplier-missing", "embeddings are not multiplied", _EMBEDDINGS, "embedding_multiplier",
            _instead(1.0), ModelConfig, seen="the first norm hides it"),
    _config("embedding-multiplier-inverted", "embeddings are divided by their multiplier", _EMBEDDINGS,
            "embedding_multiplier", lambda m: None if m == 1 else 1 / m, ModelConfig),
    _config("output-multiplier-missing", "logits are not multiplied", _LOGITS, "output_multiplier", _instead(1.0),
            ModelConfig, seen="greedy decoding hides it"),
    _config("output-multiplier-inverted", "logits are divided by their multiplier", _LOGITS, "output_multiplier",
            lambda m: None if m == 1 else 1 / m, ModelConfig),
]  # fmt: skip
MUTANTS = [*PARAMS, *CONFIG]
