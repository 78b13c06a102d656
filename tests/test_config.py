import dataclasses
import math

import pytest

from minimoe.config import PRESETS, ConfigError, ModelConfig, preset
from minimoe.params import shapes

SMALL = {
    "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 2, "num_experts": 3, "num_experts_per_token": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mistral-7b", 7_241_732_096, 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral-8x22b", 140_620_634_112, 39_152_031_744),
        ("llama-2-70b", 68_976_648_192, 68_976_648_192),
        ("grok-1", 315_684_820_992, 83_756_587_008),
    ],
)
def test_the_presets_count_their_parameters_as_the_literature_does(name, total, active):
    assert preset(name).num_parameters() == total
    assert preset(name).num_active_parameters() == active


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_is_the_sum_of_all_shapes(name):
    config = preset(name)
    assert config.num_parameters() == sum(math.prod(shape) for shape in shapes(config).values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("post_norms", [False, True])
def test_the_active_ones_are_those_of_k_experts_and_all_else(dense, tied, post_norms):
    config = ModelConfig(**SMALL | {"tie_embeddings": tied, "post_norms": post_norms})
    if dense:
        config = config.replace(dense=True, num_experts=1, num_experts_per_token=1)
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    assert config.num_parameters() == sum(sizes.values())
    idle = sum(size for name, size in sizes.items() if ".experts.2." in name)  # one of three experts rests
    assert config.num_active_parameters() == sum(sizes.values()) - (0 if dense else idle)
    assert dense or idle == 2 * 3 * 6 * 5
    assert ("output" in sizes) == (not tied)


def test_the_presets_have_the_sizes_of_the_papers():
    mixtral, mistral = preset("mixtral-8x7b"), preset("mistral-7b")
    assert (mixtral.rope_theta, mixtral.sliding_window, mixtral.max_length) == (1e6, None, 32768)
    assert (mistral.rope_theta, mistral.sliding_window, mistral.dense) == (1e4, 4096, True)
    assert (mixtral.balance_coefficient, preset("mixtral-8x22b").balance_coefficient) == (0.02, 0.001)
    assert mixtral.norm_eps == 1e-5 and mixtral.balance_form == "concatenated"
    llama, grok = preset("llama-2-70b"), preset("grok-1")
    assert (llama.rope_theta, llama.sliding_window, llama.dense, llama.max_length) == (1e4, None, True, 4096)
    assert (grok.rope_theta, grok.sliding_window, grok.tie_embeddings, grok.max_length) == (1e4, None, True, 8192)
    assert grok.attention_scale == pytest.approx(128**-0.5, rel=1e-15) and grok.attention_cap == 30
    assert grok.embedding_multiplier == pytest.approx(6144**0.5, rel=1e-15)
    assert grok.output_multiplier == pytest.approx(3**-0.5, rel=1e-15)
    assert (grok.activation, grok.renormalise, grok.post_norms) == ("gelu_tanh", False, True)
    tiny = preset("tiny")
    assert tiny.num_layers >= 6 and (tiny.num_experts, tiny.num_experts_per_token) == (8, 2)
    assert tiny.num_heads // tiny.num_kv_heads >= 2 and 2e6 < tiny.num_parameters() < 4e6


def test_the_cache_takes_two_vectors_per_layer_and_head():
    assert preset("mixtral-8x7b").kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2 == 131_072
    assert ModelConfig(**SMALL).kv_bytes_per_token(itemsize=4) == 2 * 2 * 2 * 2 * 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("post_norms", [False, True])
def test_flops_are_two_per_weight_and_key_that_take_part(tied, post_norms):
    config = ModelConfig(**SMALL | {"tie_embeddings": tied, "post_norms": post_norms})
    D, F, V = 6, 5, 11
    layer = 4 * 2 * D + 2 * (2 * 2 * D) + D * 4 * 2 + 3 * D + 2 * 3 * D * F  # wq, wk and wv, wo, gate, two experts
    for context in (1, 100):
        assert config.flops_per_token(context) == 2 * (2 * (layer + 2 * 4 * 2 * context) + V * D)
    assert config.replace(sliding_window=7).flops_per_token(100) == config.flops_per_token(7)


def test_a_config_cannot_be_changed_but_replaced():
    config = ModelConfig(**SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 12
    assert config.replace(vocab_size=12) == ModelConfig(**SMALL | {"vocab_size": 12}) != config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_token": 4}, r"num_experts_per_token \(k = 4\) exceeds num_experts \(E = 3\)"),
        ({"num_kv_heads": 3}, r"num_heads \(H = 4\) must be a multiple of num_kv_heads \(K = 3\)"),
        ({"num_kv_heads": 8}, r"num_heads \(H = 4\) must be a multiple of num_kv_heads \(K = 8\)"),
        ({"head_dim": 3}, r"head_dim \(C = 3\) must be even"),
        ({"dense": True}, "a dense model needs num_experts = num_experts_per_token = 1, not 3 and"),
        ({"balance_form": "sum"}, "balance_form must be one of per_layer, concatenated, switch, not 'sum'"),
        ({"activation": "gelu"}, "activation must be one of silu, gelu_tanh, not 'gelu'"),
        (
            {"dense": True, "num_experts": 1, "num_experts_per_token": 1, "renormalise": False},
            "renormalise must be True",
        ),
        ({"renormalise": 1}, "renormalise must be True or False, not 1"),
        ({"post_norms": "yes"}, "post_norms must be True or False, not 'yes'"),
        ({"post_norms": True, "norm_eps": 0.0}, "post_norms need a positive norm_eps, not 0"),
        ({"attention_cap": 0.0}, "attention_cap must be positive, not 0"),
        ({"attention_cap": float("nan")}, "attention_cap must be a finite number of at least 0, not nan"),
        ({"attention_scale": -0.1}, "attention_scale must be a finite number of at least 0, not -0.1"),
        ({"embedding_multiplier": None}, "embedding_multiplier must be a finite number of at least 0, not None"),
        ({"embedding_multiplier": 0}, "embedding_multiplier must be positive, not 0"),
        ({"output_multiplier": float("inf")}, "output_multiplier must be a finite number of at least 0, not inf"),
        ({"dense": "no"}, "dense must be True or False, not 'no'"),
        ({"tie_embeddings": None}, "tie_embeddings must be True or False, not None"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number of at least 0, not nan"),
        ({"norm_eps": float("inf")}, "norm_eps must be a finite number of at least 0, not inf"),
        ({"norm_eps": -1e-5}, "norm_eps must be a finite number of at least 0, not -1e-05"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a finite number of at least 0, not '1e-5'"),
        ({"norm_eps": True}, "norm_eps must be a finite number of at least 0, not True"),
        ({"norm_eps": None}, "norm_eps must be a finite number of at least 0, not None"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, not 0"),
        ({"rope_theta": -1.0}, "rope_theta must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number of at least 0, not 1000"),
        ({"balance_coefficient": -0.1}, "balance_coefficient must be a finite number of at least 0, not -0.1"),
        ({"router_jitter": -0.1}, "router_jitter must be a finite number of at least 0, not -0.1"),
        ({"router_jitter": 1.0}, r"router_jitter must be below 1, not 1\.0"),
        ({"bos_id": 11}, r"bos_id must be None or an id in \[0, 11\), not 11"),
        ({"eos_id": -1}, r"eos_id must be None or an id in \[0, 11\), not -1"),
        ({"eos_id": True}, r"eos_id must be None or an id in \[0, 11\), not True"),
        ({"sliding_window": 0}, r"sliding_window must be an integer in \[1, 2147483647\], not 0"),
        ({"sliding_window": -1}, "sliding_window must be an integer"),
        ({"sliding_window": 2.0}, r"sliding_window must be an integer in \[1, 2147483647\], not 2\.0"),
    ],
)
def test_what_describes_no_model_is_refused_by_name_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SMALL | change)
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SMALL).replace(**change)


@pytest.mark.parametrize("value", [0, -1, 2.5, 2.0, "8", None, True, float("nan"), 2**31, 10**30])
@pytest.mark.parametrize("field", [*SMALL, "max_length"])
def test_a_size_is_a_positive_integer_that_an_index_can_hold(field, value):
    with pytest.raises(ConfigError, match=rf"{field} must be an integer in \[1, 2147483647\], not "):
        ModelConfig(**SMALL | {field: value})


def test_errors_are_value_errors_of_one_line():
    with pytest.raises(ValueError, match="vocab_size") as caught:
        ModelConfig(**SMALL | {"vocab_size": 0})
    assert "\n" not in str(caught.value)


def test_an_unknown_field_is_named():
    with pytest.raises(ConfigError, match="unknown configuration field experts, window"):
        ModelConfig(**SMALL).replace(window=3, experts=8)


def test_an_unknown_preset_is_an_error_that_lists_those_there_are():
    with pytest.raises(
        ConfigError, match="unknown preset 'mixtral'; there are tiny, mistral-7b, mixtral-8x7b, mixtral-8x22b"
    ):
        preset("mixtral")
