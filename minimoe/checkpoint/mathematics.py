"""Keys of a config.json that ask for other arithmetic than ours: refused, never ignored.

There is no list of all keys that a config may hold. Those below are known to change the result; a key that is not
known is ignored, and what most of them bring, tensors of their own, is refused by the names of the tensors.
"""

from __future__ import annotations

from typing import Any

from minimoe.checkpoint.errors import ConfigFileError, listed, shown

# Key: the values at which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "norm_topk_prob": (None, True),
    "scoring_func": (None, "softmax"),
    "is_causal": (None, True),
    **dict.fromkeys(
        (
            "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "lm_head_bias", "qk_norm", "use_qk_norm",
            "qk_layernorm", "alibi", "parallel_attn", "rope_interleave", "add_cross_attention", "is_encoder_decoder",
            "use_bidirectional_attention", "num_shared_experts", "n_shared_experts", "first_k_dense_replace",
            "shared_expert_intermediate_size",
        ),
        (None, False, 0),
    ),
    **dict.fromkeys(
        (
            "quantization_config", "compression_config", "auto_map", "mlp_only_layers", "no_rope_layers", "clip_qkv",
            "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
            "attention_multiplier",
        ),
        (None, {}, []),
    ),
    **dict.fromkeys(
        (
            "partial_rotary_factor", "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier",
            "routed_scaling_factor", "decoder_sparse_step", "moe_layer_freq", "n_group", "topk_group",
            "embedding_multiplier_scale", "output_multiplier_scale",
        ),
        (None, 1),
    ),
    **dict.fromkeys(("attn_output_multiplier", "max_attn_value"), (None,)),
}  # fmt: skip
# Grok-1 is all of these.
_GROK_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "norm_topk_prob": (None, False),
    "auto_map": (
        None,
        {
            "AutoConfig": "configuration_grok1.Grok1Config",
            "AutoModel": "modeling_grok1.Grok1Model",
            "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
        },
    ),
}
_GROK_OWN = ("attn_output_multiplier", "max_attn_value", "embedding_multiplier_scale", "output_multiplier_scale")


def refuse_other_mathematics(raw: dict[str, Any], window: Any, where: str, family: str = "mixtral") -> None:
    """Raise ConfigFileError if a key asks for what the model does not compute.

    Parameters
    ----------
    raw : contents of config.json
    window : its sliding window, None where there is none
    where : its path
    family : its model_type
    """
    neutral = NEUTRAL
    if family == "grok-1":
        neutral = {key: values for key, values in (NEUTRAL | _GROK_NEUTRAL).items() if key not in _GROK_OWN}
    wrong = [key for key, values in neutral.items() if key in raw and not any(raw[key] == value for value in values)]
    kind = "full_attention" if window is None else "sliding_attention"
    if any(layer != kind for layer in _items(raw.get("layer_types"))):
        wrong.append("layer_types")
    if window is not None and raw.get("use_sliding_window") is False:
        wrong.append("use_sliding_window")
    if wrong:
        given = listed([f"{key} = {shown(raw[key])}" for key in wrong])
        raise ConfigFileError(f"{where}: asks for mathematics that minimoe does not have: {given}")


def _items(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def rope_theta(raw: dict[str, Any], default: float, where: str) -> Any:
    """Return the base of the rotary angles, from v4's or v5's keys; refuse scaled or partial rotations."""
    given = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise ConfigFileError(f"{where}: {key} must be null or one object for all layers, not {shown(value)}")
        kinds = [value.get("rope_type"), value.get("type")]
        if any(kind not in (None, "default") for kind in kinds):
            raise ConfigFileError(f"{where}: {key} = {shown(value)}: only the rope_type default is supported")
        if value.get("partial_rotary_factor") not in (None, 1):
            raise ConfigFileError(f"{where}: {key} = {shown(value)}: heads are rotated whole, not in part")
        given[f"{key}.rope_theta"] = value.get("rope_theta")
    given = {key: value for key, value in given.items() if value is not None}
    values = list(given.values())
    if any(value != values[0] for value in values):
        raise ConfigFileError(
            f"{where}: {listed([f'{key} = {shown(given[key])}' for key in given])} contradict each other"
        )
    return values[0] if values else default
