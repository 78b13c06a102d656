"""Grok-1's folders: the names and keys of its public port, and nothing of it lost or taken for Mixtral's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minimoe import checkpoint
from minimoe.checkpoint.errors import ConfigFileError, LayoutError, SaveError
from minimoe.checkpoint.formats import config_from_hf, config_to_hf
from minimoe.config import preset
from tests.checkpoint.folders import GROK, MOE, edit_json, model, read_parts, same_bits, write_parts

# What the port's config.json says; it has no model_type.
PORT = {
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_grok1.Grok1Config", "AutoModel": "modeling_grok1.Grok1Model",
        "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
    },
    "vocab_size": 131072, "hidden_size": 6144, "intermediate_size": 32768, "num_hidden_layers": 64,
    "num_attention_heads": 48, "num_key_value_heads": 8, "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169, "output_multiplier_scale": 0.5773502691896257,
    "max_attn_value": 30.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "use_cache": True, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "num_experts_per_tok": 2, "num_experts": 8,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("named", [{}, {"model_type": "grok-1"}])
def test_the_ports_config_is_the_preset(named):
    assert config_from_hf(PORT | named, "config.json") == preset("grok-1").replace(balance_coefficient=0.001)


def test_our_config_json_says_what_the_ports_does():
    raw = config_to_hf(preset("grok-1"), np.dtype(np.float32))
    told = {
        key: raw[key] for key in PORT if key not in ("auto_map", "router_aux_loss_coef", "pad_token_id", "torch_dtype")
    }
    assert told == {key: PORT[key] for key in told}
    assert raw["model_type"] == "grok-1"


def test_tensors_are_named_as_in_the_port(tmp_path: Path):
    config = GROK.replace(num_layers=1, num_experts=2, num_experts_per_token=1)
    checkpoint.save(tmp_path / "m", config, model(config))
    header, _ = read_parts(tmp_path / "m" / "model.safetensors")
    layer = "model.layers.0."
    experts = [f"moe_block.experts.{e}.{w}.weight" for e in range(2) for w in ("linear", "linear_1", "linear_v")]
    norms = [f"{place}_norm.scale" for place in ("pre_attn", "post_attn", "pre_moe", "post_moe")]
    attention = [f"attn.{x}_proj.weight" for x in "qkvo"]
    assert set(header) - {"__metadata__"} == {
        "model.embed_tokens.weight", "model.norm.scale", layer + "moe_block.gate.weight",
        *(layer + name for name in (*experts, *norms, *attention)),
    }  # fmt: skip
    F, D = config.intermediate_size, config.hidden_size
    assert header[layer + "moe_block.experts.1.linear_1.weight"]["shape"] == [D, F]
    assert header[layer + "moe_block.experts.1.linear_v.weight"]["shape"] == [F, D]
    assert checkpoint.headers(tmp_path / "m").layout.name == "grok"


def test_each_tensor_is_what_the_port_takes_it_for(tmp_path: Path):
    """Several have one shape: names that were exchanged would come back from our own files, and from no others."""
    params = model(GROK)
    checkpoint.save(tmp_path / "m", GROK, params)
    written = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        written |= checkpoint.load_tensors(file)
    layer, attention, ffn = params.layers[1], params.layers[1].attention, params.layers[1].feed_forward
    # A block is x + post_attn(attn(pre_attn(x))), the same with moe; an expert linear_1(gelu(linear) · linear_v).
    ours = {
        "pre_attn_norm.scale": layer.attention_norm, "post_attn_norm.scale": layer.attention_post_norm,
        "pre_moe_norm.scale": layer.ffn_norm, "post_moe_norm.scale": layer.ffn_post_norm,
        "attn.q_proj.weight": attention.wq, "attn.k_proj.weight": attention.wk, "attn.v_proj.weight": attention.wv,
        "attn.o_proj.weight": attention.wo, "moe_block.gate.weight": ffn.gate,
        "moe_block.experts.2.linear.weight": ffn.w1[2], "moe_block.experts.2.linear_v.weight": ffn.w3[2],
        "moe_block.experts.2.linear_1.weight": ffn.w2[2],
    }  # fmt: skip
    for name, w in ours.items():
        np.testing.assert_array_equal(written[f"model.layers.1.{name}"], w, err_msg=name)
    assert not np.array_equal(layer.attention_post_norm, layer.ffn_norm)


@pytest.mark.parametrize("layout", ["hf", "mistral", "stacked"])
def test_every_layout_that_holds_it_brings_it_back(tmp_path: Path, layout: str):
    params = model(GROK)
    checkpoint.save(tmp_path / "m", GROK, params, layout=layout)
    config, found = checkpoint.load_params(tmp_path / "m")
    assert config == GROK and same_bits(found, params)


def test_conversion_there_and_back_loses_nothing(tmp_path: Path):
    params = model(GROK)
    checkpoint.save(tmp_path / "a", GROK, params)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", layout="mistral")
    checkpoint.convert(tmp_path / "b", tmp_path / "c")
    assert checkpoint.headers(tmp_path / "c").layout.name == "grok"
    config, found = checkpoint.load_params(tmp_path / "c")
    assert config == GROK and same_bits(found, params)


def test_a_copy_of_the_table_may_stand_as_the_head(tmp_path: Path):
    params = model(GROK)
    checkpoint.save(tmp_path / "m", GROK, params)
    file = tmp_path / "m" / "model.safetensors"
    header, data = read_parts(file)
    start, stop = header["model.embed_tokens.weight"]["data_offsets"]
    head = header["model.embed_tokens.weight"] | {"data_offsets": [len(data), len(data) + stop - start]}
    write_parts(file, header | {"lm_head.weight": head}, data + data[start:stop])
    assert same_bits(checkpoint.load_params(tmp_path / "m")[1], params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"hidden_act": "silu"}, "hidden_act = silu"),
        ({"auto_map": {"AutoConfig": "other.Config"}}, "auto_map = "),
        ({"max_attn_value": ...}, "lacks max_attn_value"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"attn_output_multiplier": "0.1"}, "attn_output_multiplier must be a finite number"),
        ({"max_attn_value": 0}, "max_attn_value must be positive, not 0"),
        ({"embedding_multiplier_scale": -1.0}, "embedding_multiplier_scale must be a finite number"),
        ({"final_logit_softcapping": 50.0}, "final_logit_softcapping = 50.0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
    ids=str,
)
def test_a_grok_that_is_another_is_refused(tmp_path: Path, changes: dict, message: str):
    checkpoint.save(tmp_path / "m", GROK, model(GROK))
    edit_json(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(ConfigFileError, match=message):
        checkpoint.load_params(tmp_path / "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_output_multiplier": 0.1}, {"max_attn_value": 30.0}, {"embedding_multiplier_scale": 78.4},
        {"output_multiplier_scale": 0.6}, {"hidden_act": "gelu_pytorch_tanh"}, {"norm_topk_prob": False},
        {"auto_map": PORT["auto_map"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_mixtral_with_some_of_it_is_refused(tmp_path: Path, changes: dict):
    checkpoint.save(tmp_path / "m", MOE, model(MOE))
    edit_json(tmp_path / "m" / "config.json", **changes)
    with pytest.raises(ConfigFileError, match=f"mathematics that minimoe does not have: {next(iter(changes))}"):
        checkpoint.load_params(tmp_path / "m")


def test_what_no_config_json_can_say_is_not_saved_as_something_else(tmp_path: Path):
    config = MOE.replace(attention_cap=20.0)
    with pytest.raises(SaveError, match=r"no model_type .* has attention_cap = 20.0: layout mistral can hold it"):
        checkpoint.save(tmp_path / "m", config, model(config))
    assert not (tmp_path / "m").exists()
    checkpoint.save(tmp_path / "m", config, model(config), layout="mistral")
    assert checkpoint.load_params(tmp_path / "m")[0] == config


def test_a_layout_that_cannot_hold_it_is_refused(tmp_path: Path):
    with pytest.raises(LayoutError, match="layout fused does not hold Grok-1: hf, mistral and stacked do"):
        checkpoint.save(tmp_path / "m", GROK, model(GROK), layout="fused")


def test_the_mark_of_our_own_key_is_read(tmp_path: Path):
    config = GROK.replace(balance_form="per_layer", router_jitter=0.1)
    checkpoint.save(tmp_path / "m", config, model(config))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["minimoe"] == {
        "balance_form": "per_layer", "router_jitter": 0.1,
    }  # fmt: skip
    assert checkpoint.load_params(tmp_path / "m")[0] == config
