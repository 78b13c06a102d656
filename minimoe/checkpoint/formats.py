"""Hugging Face's words for ours: names of tensors, and config.json both ways.

`config.json` of transformers v4 gives `rope_theta`, that of v5 `rope_parameters {rope_theta, rope_type}`; both are
read, and both written. A key that is missing means what transformers takes it to mean; sizes must be given. Source:
the configuration and modelling files of mixtral, mistral and llama in https://github.com/huggingface/transformers.

transformers has no Grok-1. Its config.json is that of the public port (hpcai-tech/grok-1, `Grok1Config`): model_type
grok-1, and keys of its own for the multipliers and the cap. What the port's code fixes is fixed here, too: post-norms,
gate weights that are not renormalised, and GELU, here in the tanh form of the original (the port's is the exact one).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from minimoe.checkpoint.errors import ConfigFileError, SaveError, listed, shown
from minimoe.checkpoint.mathematics import refuse_other_mathematics, rope_theta
from minimoe.config import ConfigError, ModelConfig

CONFIG = "config.json"
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
}
_MOE_FIELDS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "router_aux_loss_coef": "balance_coefficient",
    "router_jitter_noise": "router_jitter",
}
_GROK_FIELDS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "router_aux_loss_coef": "balance_coefficient",
    "attn_output_multiplier": "attention_scale",
    "max_attn_value": "attention_cap",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
}
_GROK_FIXED = {"activation": "gelu_tanh", "renormalise": False, "post_norms": True}
_GROK_CLASS = "Grok1ModelForCausalLM"
_CLASSES = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM", "grok-1": _GROK_CLASS}
_REALS = ("rms_norm_eps", "router_aux_loss_coef", "router_jitter_noise", *list(_GROK_FIELDS)[3:])
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED_MOE = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "grok-1": ("num_key_value_heads", *(key for key in _GROK_FIELDS if key != "router_aux_loss_coef")),
}
_FAMILY_FIELDS = {"mixtral": _MOE_FIELDS, "grok-1": _GROK_FIELDS}
_COMMON = {
    "num_key_value_heads": 8, "head_dim": None, "rms_norm_eps": 1e-6, "sliding_window": None, "rope_theta": 1e4,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# model_type: what transformers puts for a key that is missing
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    "mistral": _COMMON | {"sliding_window": 4096},
    "llama": _COMMON | {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "grok-1": _COMMON
    | {
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.001,
    },
}
# The key that holds what Hugging Face's config has no word for; transformers keeps it and ignores it.
_EXTRAS = "minimoe"
_EXTRA_FIELDS = ("balance_form",)
_EXTRA_FIELDS_GROK = ("balance_form", "router_jitter")
_EXTRA_FIELDS_DENSE = ("balance_form", "balance_coefficient", "router_jitter")
_TENSORS = (
    (r"^tok_embeddings$", "embed_tokens"),
    (r"\.attention_norm$", ".input_layernorm"),
    (r"\.attention\.w([qkvo])$", r".self_attn.\1_proj"),
    (r"\.ffn_norm$", ".post_attention_layernorm"),
    (r"\.feed_forward\.w1$", ".mlp.gate_proj"),
    (r"\.feed_forward\.w2$", ".mlp.down_proj"),
    (r"\.feed_forward\.w3$", ".mlp.up_proj"),
    (r"\.feed_forward\.", ".block_sparse_moe."),
)


def hf_name(name: str) -> str:
    """Return the name of a tensor in Hugging Face's layout on disk.

    >>> hf_name("layers.3.feed_forward.experts.7.w2"), hf_name("layers.0.feed_forward.w1"), hf_name("output")
    ('model.layers.3.block_sparse_moe.experts.7.w2.weight', 'model.layers.0.mlp.gate_proj.weight', 'lm_head.weight')
    """
    if name == "output":
        return "lm_head.weight"
    for ours, theirs in _TENSORS:
        name = re.sub(ours, theirs, name)
    return f"model.{name}.weight"


def config_from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
    """Return the config that a config.json describes.

    Parameters
    ----------
    raw : its contents
    where : its path, for messages

    Raises
    ------
    ConfigFileError
        If it describes no model of ours; the message names the key.
    """
    family = raw.get("model_type")
    if family is None and raw.get("architectures") == [_GROK_CLASS]:  # as the port's own file has it
        family = "grok-1"
    if not isinstance(family, str) or family not in DEFAULTS:
        raise ConfigFileError(f"{where}: model_type must be one of {', '.join(DEFAULTS)}, not {shown(family)}")
    moe = family in _FAMILY_FIELDS
    if missing := [key for key in _REQUIRED + _REQUIRED_MOE.get(family, ()) if raw.get(key) is None]:
        raise ConfigFileError(f"{where}: lacks {', '.join(missing)}")
    names = _FIELDS | _FAMILY_FIELDS.get(family, {})
    values = {key: raw.get(key, DEFAULTS[family].get(key)) for key in names}
    if family == "llama" and values["sliding_window"] is not None:  # transformers ignores it; who wrote it did not
        raise ConfigFileError(f"{where}: sliding_window = {shown(values['sliding_window'])}: a llama has no window")
    refuse_other_mathematics(raw, values["sliding_window"], where, family)
    _normalise(values, where)
    fields: dict[str, Any] = {ours: values[key] for key, ours in names.items()} | _extras(raw, family, where)
    fields["rope_theta"] = _real("rope_theta", rope_theta(raw, DEFAULTS[family]["rope_theta"], where), where)
    if not moe:
        fields |= {"dense": True, "num_experts": 1, "num_experts_per_token": 1}
    if family == "grok-1":
        fields |= _GROK_FIXED
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        theirs = {ours: key for key, ours in names.items()}
        message = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ConfigFileError(f"{where}: {shown(message)}") from None


def _normalise(values: dict[str, Any], where: str) -> None:
    """Resolve what a config may leave open or write in two ways."""
    D, H = values["hidden_size"], values["num_attention_heads"]
    if values["head_dim"] is None and type(D) is int and type(H) is int and H > 0:
        values["head_dim"] = D // H
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = H
    if isinstance(values["eos_token_id"], list):  # of several ends of text, the first is ours
        values["eos_token_id"] = next(iter(values["eos_token_id"]), None)
    if not isinstance(values["tie_word_embeddings"], bool):
        raise ConfigFileError(
            f"{where}: tie_word_embeddings must be true or false, not {shown(values['tie_word_embeddings'])}"
        )
    for key in _REALS:
        if key in values:
            values[key] = _real(key, values[key], where)


def _real(key: str, value: Any, where: str) -> Any:
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        raise ConfigFileError(f"{where}: {key} must be a finite number, not {shown(value)}") from None


def _extras(raw: dict[str, Any], family: str, where: str) -> dict[str, Any]:
    extras = raw.get(_EXTRAS, {})
    known = _extra_fields(family)
    if not isinstance(extras, dict) or not set(extras) <= set(known):
        raise ConfigFileError(f"{where}: {_EXTRAS} may hold {listed(known)}, not {shown(extras)}")
    return extras


def _extra_fields(family: str) -> tuple[str, ...]:
    return {"mixtral": _EXTRA_FIELDS, "grok-1": _EXTRA_FIELDS_GROK}.get(family, _EXTRA_FIELDS_DENSE)


def family_of(config: ModelConfig) -> str:
    """Return the model_type under which a config.json can say what `config` computes.

    Raises
    ------
    SaveError
        If there is none: it has some of what sets Grok-1 apart from Mixtral, but not all.
    """
    default = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    apart = (*_GROK_FIXED, *list(_GROK_FIELDS.values())[3:])
    if all(getattr(config, name) == default[name] for name in apart):
        return "mistral" if config.dense else "mixtral"
    capped = config.attention_scale is not None and config.attention_cap is not None
    if capped and not config.dense and all(getattr(config, name) == value for name, value in _GROK_FIXED.items()):
        return "grok-1"
    given = listed([f"{name} = {getattr(config, name)}" for name in apart if getattr(config, name) != default[name]])
    raise SaveError(f"no model_type of Hugging Face's has {given}: layout mistral can hold it")


def config_to_hf(config: ModelConfig, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return the contents of a config.json that transformers v4 and v5 and `config_from_hf` read back as `config`.

    A dense model is written as a Mistral: the same decoder as a Llama's, with room for a window. Grok-1 is written as
    its port has it, which transformers does not read by itself.

    Raises
    ------
    SaveError
        See `family_of`.
    """
    family = family_of(config)
    names = _FIELDS | _FAMILY_FIELDS.get(family, {})
    theta = float(config.rope_theta)
    raw: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        **{key: getattr(config, ours) for key, ours in names.items()},
        "hidden_act": "gelu_pytorch_tanh" if family == "grok-1" else "silu",
        "attention_dropout": 0.0,
        "rope_theta": theta,  # v4
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},  # v5
        "torch_dtype": str(dtype),
        "use_cache": True,
    }
    if not config.dense:
        raw["output_router_logits"] = False
    for key in _REALS:
        if key in raw:
            raw[key] = float(raw[key])
    raw[_EXTRAS] = {name: getattr(config, name) for name in _extra_fields(family)}
    return raw
