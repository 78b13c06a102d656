"""The fused layout is what transformers holds in memory, and its reader of GGUF files finds in them what ours does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

# ruff: noqa: E402 (a file of tests that has been skipped cannot be imported from)
from minimoe import checkpoint
from minimoe.checkpoint.formats import hf_name
from minimoe.params import named
from tests.checkpoint.folders import DENSE, MOE, model, same_bits
from tests.peers.test_checkpoint_transformers import (
    CONFIGS,
    clear_routing,
    load_theirs,
    our_logits,
    relative_error,
    save_theirs,
    their_logits,
)

pytestmark = pytest.mark.peers

SPARSE = [name for name, config in CONFIGS.items() if not config.dense]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_holds_in_memory_is_the_fused_layout(tmp_path: Path, name: str, dtype: str) -> None:
    """Their state_dict, as it is, is a folder that we read: with the logits, and the bits, of what they save."""
    config = CONFIGS[name]
    peer = save_theirs(tmp_path / "theirs", config, dtype)
    state = {key: w.contiguous() for key, w in peer.state_dict().items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused/config.json").write_bytes((tmp_path / "theirs/config.json").read_bytes())
    safetensors_torch.save_file(state, tmp_path / "fused/model.safetensors")
    assert checkpoint.headers(tmp_path / "fused").layout.name == "fused"
    assert checkpoint.headers(tmp_path / "theirs").layout.name == "hf"
    assert same_bits(checkpoint.load_params(tmp_path / "fused")[1], checkpoint.load_params(tmp_path / "theirs")[1])
    loaded, params = checkpoint.load_params(tmp_path / "fused", np.float32)
    assert relative_error(our_logits(loaded, params), their_logits(load_theirs(tmp_path / "theirs"))) <= 1e-5


@pytest.mark.parametrize("name", SPARSE)
def test_our_fused_layout_is_their_state_dict(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    params = clear_routing(model(config))
    checkpoint.save(tmp_path / "hf", config, params)
    peer = load_theirs(tmp_path / "hf")
    checkpoint.save(tmp_path / "fused", config, params, layout="fused")
    ours = safetensors_torch.load_file(tmp_path / "fused/model.safetensors")
    theirs = peer.state_dict()
    assert set(theirs) - set(ours) == ({"lm_head.weight"} if config.tie_embeddings else set())
    assert all(torch.equal(theirs[key], w) for key, w in ours.items())
    peer.load_state_dict(ours, strict=not config.tie_embeddings)
    assert relative_error(our_logits(config, params), their_logits(peer)) <= 1e-5


@pytest.mark.parametrize("layout", ["mistral", "stacked", "fused"])
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_a_detour_through_any_layout_leaves_their_logits(tmp_path: Path, config, layout: str) -> None:
    save_theirs(tmp_path / "theirs", config, "float32")
    checkpoint.convert(tmp_path / "theirs", tmp_path / layout, layout=layout)
    checkpoint.convert(tmp_path / layout, tmp_path / "back")
    expected = their_logits(load_theirs(tmp_path / "theirs"))
    np.testing.assert_array_equal(their_logits(load_theirs(tmp_path / "back")), expected)
    loaded, params = checkpoint.load_params(tmp_path / layout)
    assert relative_error(our_logits(loaded, params), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_dense_gguf_file_gives_the_logits_of_their_reader(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # of which transformers wants it
    from tests.checkpoint import test_gguf

    config = test_gguf.CONFIG.replace(dense=True, num_experts=1, num_experts_per_token=1)
    test_gguf.write(tmp_path / "x.gguf", config, kind=kind)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    loaded, params = checkpoint.load_params(tmp_path / "x.gguf")
    theirs = dict(peer.named_parameters())
    for name, w in named(params):
        np.testing.assert_array_equal(w, theirs[hf_name(name)].detach().numpy(), err_msg=name)
    assert relative_error(our_logits(loaded, params), their_logits(peer)) <= 1e-5
