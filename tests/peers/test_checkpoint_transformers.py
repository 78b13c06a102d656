"""A folder written by us loads in transformers with the same logits, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe import checkpoint, mixtral
from minimoe.backends import make_backend
from minimoe.checkpoint.formats import DEFAULTS, config_from_hf
from minimoe.config import ModelConfig
from minimoe.params import Params, named, shapes
from tests.checkpoint.folders import DENSE, MOE, edit_json, model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

CONFIGS = {
    "moe": MOE,
    "window": MOE.replace(sliding_window=5, rope_theta=5e4, norm_eps=1e-3),
    "tied": MOE.replace(tie_embeddings=True),
    "one": MOE.replace(num_experts=1, num_experts_per_token=1, head_dim=4, bos_id=None),
    "dense": DENSE,
    "dense-tied": DENSE.replace(tie_embeddings=True, sliding_window=None),
}
TOKENS = np.random.default_rng(0).integers(0, MOE.vocab_size, (2, 13))


def clear_routing(params: Params) -> Params:
    """Enlarge the gates, so that rounding does not decide between two experts."""
    for layer in params.layers:
        if layer.feed_forward.gate is not None:
            layer.feed_forward.gate *= 20
    return params


def our_logits(config: ModelConfig, params: Params) -> np.ndarray:
    inputs = mixtral.check_inputs(TOKENS, config.vocab_size)
    return mixtral.forward(make_backend("numpy"), config, params, inputs)[0]


def their_logits(peer: Any) -> np.ndarray:
    with torch.no_grad():
        return peer.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def load_theirs(folder: Path, dtype: str = "float32") -> Any:
    """Open a folder in transformers; nothing may be missing, left over or of another shape."""
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return peer


def save_theirs(folder: Path, config: ModelConfig, dtype: str, **options: Any) -> Any:
    """A model made by transformers, saved by transformers."""
    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": config.sliding_window, "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_id, "eos_token_id": config.eos_id,
        "attn_implementation": "eager", "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    if config.dense:
        peer = transformers.MistralForCausalLM(transformers.MistralConfig(**common))
    else:
        peer = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **common, num_local_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_token,
                router_aux_loss_coef=config.balance_coefficient,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            if name.endswith("gate.weight"):
                weight.mul_(5)
    peer = peer.to(getattr(torch, dtype))
    peer.save_pretrained(folder, **options)
    return peer


def relative_error(a: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_what_we_write_gives_the_same_logits_in_transformers(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    config = CONFIGS[name]
    params = clear_routing(model(config))
    checkpoint.save(tmp_path / "m", config, params, max_shard_bytes=max_shard_bytes)
    peer = load_theirs(tmp_path / "m")
    assert type(peer).__name__ == ("MistralForCausalLM" if config.dense else "MixtralForCausalLM")
    assert relative_error(our_logits(config, params), their_logits(peer)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_types_are_kept_by_transformers(tmp_path: Path, dtype: str) -> None:
    params = model(dtype=np.dtype(dtype))
    checkpoint.save(tmp_path / "m", MOE, params)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    table = peer.get_input_embeddings().weight
    assert str(table.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(table.detach().double().numpy(), params.tok_embeddings.astype(np.float64))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 5000}], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_writes_gives_the_same_logits_here(
    tmp_path: Path, name: str, options: dict[str, int], dtype: str
) -> None:
    config = CONFIGS[name]
    save_theirs(tmp_path / "m", config, dtype, **options)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > (1 if options else 0)
    loaded, params = checkpoint.load_params(tmp_path / "m")
    assert loaded == config.replace(balance_form="concatenated", balance_coefficient=loaded.balance_coefficient)
    assert config.dense or loaded.balance_coefficient == config.balance_coefficient
    assert {str(array.dtype) for _, array in named(params)} == {dtype}
    loaded, params = checkpoint.load_params(tmp_path / "m", np.float32)  # bfloat16 arithmetic differs by design
    assert relative_error(our_logits(loaded, params), their_logits(load_theirs(tmp_path / "m"))) <= 1e-5


@pytest.mark.parametrize("name", ["moe", "dense", "tied"])
def test_a_folder_survives_a_round_trip_through_transformers(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    params = model(config, np.dtype("bfloat16"))
    checkpoint.save(tmp_path / "ours", config, params)
    load_theirs(tmp_path / "ours", "bfloat16").save_pretrained(tmp_path / "theirs")
    again, arrays = checkpoint.load_params(tmp_path / "theirs")
    assert again == config  # balance_form too: transformers keeps the key it does not know
    for (ours, a), (theirs, b) in zip(named(params), named(arrays), strict=True):
        assert (ours, a.dtype, a.tobytes()) == (theirs, b.dtype, b.tobytes())


def test_a_config_as_version_4_wrote_it_means_the_same(tmp_path: Path) -> None:
    peer = save_theirs(tmp_path / "m", MOE.replace(rope_theta=7e3), "float32")
    file = tmp_path / "m/config.json"
    raw = json.loads(file.read_text())
    del raw["rope_parameters"], raw["dtype"]
    file.write_text(
        json.dumps(raw | {"rope_theta": 7000.0, "torch_dtype": "float32", "transformers_version": "4.40.0"})
    )
    config, params = checkpoint.load_params(tmp_path / "m")
    assert config.rope_theta == 7000.0
    assert relative_error(our_logits(config, params), their_logits(peer)) <= 1e-5
    assert relative_error(their_logits(load_theirs(tmp_path / "m")), their_logits(peer)) <= 1e-6


@pytest.mark.parametrize("config", [MOE.replace(rope_theta=7e3), DENSE], ids=["moe", "dense"])
def test_our_config_means_the_same_to_version_4_and_5(tmp_path: Path, config: ModelConfig) -> None:
    checkpoint.save(tmp_path / "m", config, model(config))
    expected = their_logits(load_theirs(tmp_path / "m"))
    for change in ({"rope_parameters": ...}, {"rope_theta": ...}):
        edit_json(tmp_path / "m/config.json", **change)
        np.testing.assert_array_equal(their_logits(load_theirs(tmp_path / "m")), expected)
        checkpoint.save(tmp_path / "m", config, model(config))


@pytest.mark.parametrize("family", [family for family in DEFAULTS if family in transformers.CONFIG_MAPPING])
def test_missing_keys_mean_what_transformers_takes_them_to_mean(family: str) -> None:
    sizes = dict.fromkeys(("intermediate_size", "num_hidden_layers", "num_attention_heads"), 16)
    sizes |= {"vocab_size": 64, "hidden_size": 32}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    filled = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert config_from_hf({"model_type": family, **sizes}, "") == config_from_hf(filled, "")


def test_a_tensor_of_a_loaded_model_is_the_tensor_of_that_name(tmp_path: Path) -> None:
    """w1, w2 and w3, in particular, are not exchanged between experts or with each other."""
    peer = save_theirs(tmp_path / "m", MOE, "float32")
    params = dict(named(checkpoint.load_params(tmp_path / "m")[1]))
    assert params.keys() == shapes(MOE).keys()
    experts = peer.model.layers[1].mlp.experts
    F = MOE.intermediate_size
    for e in range(MOE.num_experts):
        for name, weight in {
            "w1": experts.gate_up_proj[e, :F], "w3": experts.gate_up_proj[e, F:], "w2": experts.down_proj[e],
        }.items():  # fmt: skip
            ours = params[f"layers.1.feed_forward.experts.{e}.{name}"]
            np.testing.assert_array_equal(ours, weight.detach().numpy())
