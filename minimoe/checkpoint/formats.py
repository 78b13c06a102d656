"""Hugging Face's words for ours: names of tensors, and config.json both ways.

`config.json` of transformers v4 gives `rope_theta`, that of v5 `rope_parameters {rope_theta, rope_type}`; both are
read, and both written. A key that is missing means what transformers takes it to mean; sizes must be given. Source:
the configuration and modelling files of mixtral, mistral and llama in https://github.com/huggingface/transformers.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from minimoe.checkpoint.errors import ConfigFileError, listed, shown
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
_REALS = ("rms_norm_eps", "router_aux_loss_coef", "router_jitter_noise")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED_MOE = ("num_local_experts", "num_experts_per_tok")
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
}
# The key that holds what Hugging Face's config has no word for; transformers keeps it and ignores it.
_EXTRAS = "minimoe"
_EXTRA_FIELDS = ("balance_form",)
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
    if not isinstance(family, str) or family not in DEFAULTS:
        raise ConfigFileError(f"{where}: model_type must be one of {', '.join(DEFAULTS)}, not {shown(family)}")
    moe = family == "mixtral"
    if missing := [key for key in _REQUIRED + (_REQUIRED_MOE if moe else ()) if raw.get(key) is None]:
        raise ConfigFileError(f"{where}: lacks {', '.join(missing)}")
    names = _FIELDS | (_MOE_FIELDS if moe else {})
    values = {key: raw.get(key, DEFAULTS[family].get(key)) for key in names}
    if family == "llama" and values["sliding_window"] is not None:  # transformers ignores it; who wrote it did not
        raise ConfigFileError(f"{where}: sliding_window = {shown(values['sliding_window'])}: a llama has no window")
    refuse_other_mathematics(raw, values["sliding_window"], where)
    _normalise(values, where)
    fields: dict[str, Any] = {ours: values[key] for key, ours in names.items()} | _extras(raw, moe, where)
    fields["rope_theta"] = _real("rope_theta", rope_theta(raw, DEFAULTS[family]["rope_theta"], where), where)
    if not moe:
        fields |= {"dense": True, "num_experts": 1, "num_experts_per_token": 1}
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


def _extras(raw: dict[str, Any], moe: bool, where: str) -> dict[str, Any]:
    extras = raw.get(_EXTRAS, {})
    known = _EXTRA_FIELDS if moe else _EXTRA_FIELDS_DENSE
    if not isinstance(extras, dict) or not set(extras) <= set(known):
        raise ConfigFileError(f"{where}: {_EXTRAS} may hold {listed(known)}, not {shown(extras)}")
    return extras


def config_to_hf(config: ModelConfig, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return the contents of a config.json that transformers v4 and v5 and `config_from_hf` read back as `config`.

    A dense model is written as a Mistral: the same decoder as a Llama's, with room for a window.
    """
    names = _FIELDS if config.dense else _FIELDS | _MOE_FIELDS
    theta = float(config.rope_theta)
    raw: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if config.dense else "MixtralForCausalLM"],
        "model_type": "mistral" if config.dense else "mixtral",
        **{key: getattr(config, ours) for key, ours in names.items()},
        "hidden_act": "silu",
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
    raw[_EXTRAS] = {name: getattr(config, name) for name in (_EXTRA_FIELDS_DENSE if config.dense else _EXTRA_FIELDS)}
    return raw
