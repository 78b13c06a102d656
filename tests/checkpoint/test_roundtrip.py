"""What is saved comes back bit for bit, and the safetensors library agrees on what the files hold."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from minimoe import checkpoint
from minimoe.checkpoint.formats import config_from_hf, config_to_hf, hf_name
from minimoe.config import BALANCE_FORMS, PRESETS, ModelConfig
from minimoe.params import named, shapes, stack_experts
from tests.checkpoint.folders import DENSE, GROK, MOE, edit_json, model, read_parts, same_bits, write_parts

CONFIGS = {
    "moe": MOE,
    "dense": DENSE,
    "tied": MOE.replace(tie_embeddings=True),
    "grok": GROK,
    "one": MOE.replace(num_experts=1, num_experts_per_token=1, bos_id=None, sliding_window=5, router_jitter=0.25),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 2000])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: str, max_shard_bytes: int) -> None:
    config = CONFIGS[name]
    params = model(config, np.dtype(dtype))
    checkpoint.save(tmp_path / "m", config, params, max_shard_bytes=max_shard_bytes)
    loaded, arrays = checkpoint.load_params(tmp_path / "m")
    assert loaded == config
    assert same_bits(arrays, params)
    assert checkpoint.read_config(tmp_path / "m") == config
    assert checkpoint.verify(tmp_path / "m") == []
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_stacked_experts_are_saved_one_by_one(tmp_path: Path) -> None:
    params = model()
    checkpoint.save(tmp_path / "m", MOE, stack_experts(params))
    assert same_bits(checkpoint.load_params(tmp_path / "m")[1], params)


def test_arrays_that_are_not_contiguous_are_saved_by_value(tmp_path: Path) -> None:
    params = model()
    attention = params.layers[0].attention
    expected = attention.wq.copy()
    attention.wq = np.asfortranarray(attention.wq)
    checkpoint.save(tmp_path / "m", MOE, params)
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "m")[1].layers[0].attention.wq, expected)


def test_float16_is_widened_to_float32_exactly(tmp_path: Path) -> None:
    params = model(dtype=np.float16)
    checkpoint.save(tmp_path / "m", MOE, params)
    assert {info.dtype for info in checkpoint.headers(tmp_path / "m").tensors} == {np.dtype(np.float16)}
    for (_, got), (_, stored) in zip(named(checkpoint.load_params(tmp_path / "m")[1]), named(params), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, stored.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, "bfloat16"])
def test_dtype_casts_every_tensor(tmp_path: Path, dtype: object) -> None:
    params = model()
    checkpoint.save(tmp_path / "m", MOE, params)
    for (_, got), (_, stored) in zip(
        named(checkpoint.load_params(tmp_path / "m", dtype)[1]), named(params), strict=True
    ):
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got, stored.astype(dtype))
    with pytest.raises(ValueError, match="int32"):
        checkpoint.load_params(tmp_path / "m", np.int32)


def test_weights_are_read_only_views_of_the_file_and_outlive_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model())
    params = checkpoint.load_params(tmp_path / "m")[1]
    table = params.tok_embeddings
    assert not table.flags.writeable
    assert not table.flags.owndata
    assert type(table) is np.ndarray
    expected = table.copy()
    (tmp_path / "m/model.safetensors").unlink()
    np.testing.assert_array_equal(table, expected)


def test_unmapped_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model())
    params = checkpoint.load_params(tmp_path / "m", mapped=False)[1]
    expected = params.norm.copy()
    file = tmp_path / "m/model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-4000, os.SEEK_END)
        opened.write(bytes(4000))
    assert same_bits(params, model())
    np.testing.assert_array_equal(params.norm, expected)


def test_an_unaligned_tensor_is_copied_and_said_so(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model())
    header, data = read_parts(tmp_path / "m/model.safetensors")
    text = json.dumps(header).encode()
    text += b" " * ((1 - 8 - len(text)) % 4)  # the data starts at an odd offset
    write_parts(tmp_path / "m/model.safetensors", text, data)
    with pytest.warns(UserWarning, match="unaligned tensors are copied"):
        params = checkpoint.load_params(tmp_path / "m")[1]
    assert same_bits(params, model())
    assert params.norm.flags.aligned


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_may_have_any_length(tmp_path: Path, length: int) -> None:
    """Some lengths, as bytes, are how pickles start."""
    tensors = {"model.norm.weight": np.ones(16, np.float32)}
    checkpoint.save_tensors(tmp_path / "model.safetensors", tensors)
    header, data = read_parts(tmp_path / "model.safetensors")
    write_parts(tmp_path / "model.safetensors", json.dumps(header).encode().ljust(length), data)
    assert [info.name for info in checkpoint.headers(tmp_path).tensors] == list(tensors)


def test_a_model_is_saved_over_the_folder_it_is_mapped_from(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model())
    config, mapped = checkpoint.load_params(tmp_path / "m")
    checkpoint.save(tmp_path / "m", config, mapped, max_shard_bytes=3000)
    assert same_bits(mapped, model())
    assert same_bits(checkpoint.load_params(tmp_path / "m")[1], model())
    assert "model.safetensors" not in os.listdir(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_safetensors_library_reads_what_we_write_and_the_reverse(tmp_path: Path, dtype: str) -> None:
    params = model(dtype=np.dtype(dtype))
    checkpoint.save(tmp_path / "m", MOE, params)
    theirs = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    ours = {hf_name(name): array for name, array in named(params)}
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in ours)
    with safetensors.safe_open(tmp_path / "m/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors.numpy.save_file(ours, tmp_path / "m/model.safetensors")
    again = checkpoint.load_params(tmp_path / "m")[1]
    assert all(
        a.tobytes() == b.astype(a.dtype).tobytes() for (_, a), (_, b) in zip(named(again), named(params), strict=True)
    )


def test_shards_hold_at_most_the_bytes_asked_for_and_the_index_names_them(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model(), max_shard_bytes=4000)
    found = checkpoint.headers(tmp_path / "m")
    sizes: dict[str, int] = {}
    for info in found.tensors:
        sizes[info.file] = sizes.get(info.file, 0) + info.nbytes
    assert len(sizes) > 3
    assert max(sizes.values()) <= 4000
    assert sum(sizes.values()) == found.nbytes == 4 * MOE.num_parameters()
    for name in sizes:
        assert safetensors.numpy.load_file(tmp_path / "m" / name)


def test_state_tensors_of_any_type_come_back(tmp_path: Path) -> None:
    state = {
        "step": np.array(7, np.int64), "key": np.arange(4, dtype=np.uint64), "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32), "m": np.linspace(0, 1, 5), "b": np.ones(3, ml_dtypes.bfloat16),
        "bytes": np.arange(7, dtype=np.uint8),
    }  # fmt: skip
    checkpoint.save_tensors(tmp_path / "state.safetensors", state, {"note": "x"})
    loaded = checkpoint.load_tensors(tmp_path / "state.safetensors")
    assert loaded.keys() == state.keys()
    for name, array in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()
        assert loaded[name].flags.writeable or array.size == 0
    with pytest.raises(checkpoint.SaveError, match="complex128"):
        checkpoint.save_tensors(tmp_path / "c.safetensors", {"c": np.zeros(2, complex)})


def test_tensors_of_several_types_are_all_aligned(tmp_path: Path) -> None:
    odd = {"half": np.zeros(3, np.float16), "double": np.zeros(1), "single": np.zeros(5, np.float32)}
    checkpoint.save_tensors(tmp_path / "model.safetensors", odd)
    assert all(info.aligned for info in checkpoint.headers(tmp_path).tensors)
    assert (int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8) % 64 == 0


def test_other_files_stay_and_those_of_the_old_checkpoint_go(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")

    def also(new: Path) -> None:
        checkpoint.save_tensors(new / f"{checkpoint.TRAINING_STATE}.safetensors", {"step": np.array(1)})

    checkpoint.save(folder, MOE, model(), tokenizer_file=tokenizer, also=also, max_shard_bytes=3000)
    (folder / "README.md").write_text("card")
    (folder / "plots/deep").mkdir(parents=True)
    (folder / "plots/deep/a.txt").write_text("a")
    (folder / "link").symlink_to("README.md")
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    checkpoint.save(folder, MOE, model())
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "link", "model.safetensors", "plots"]
    assert (folder / "README.md").read_text() == "card"
    assert (folder / "plots/deep/a.txt").read_text() == "a"
    assert os.readlink(folder / "link") == "README.md"


def test_modes_follow_the_umask_and_the_old_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "m", MOE, model())
        assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o750
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()} == {0o640}
        (tmp_path / "m").chmod(0o711)
        checkpoint.save(tmp_path / "m", MOE, model())
        assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o711
    finally:
        os.umask(before)


def test_a_link_to_a_folder_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    checkpoint.save(tmp_path / "link", MOE, model())
    checkpoint.save(tmp_path / "link", MOE, model(seed=1))
    assert (tmp_path / "link").is_symlink()
    assert same_bits(checkpoint.load_params(tmp_path / "real")[1], model(seed=1))


def test_missing_parents_are_made(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a/b/c", MOE, model())
    assert checkpoint.read_config(tmp_path / "a/b/c") == MOE


def test_old_buffers_and_a_tied_copy_of_the_table_are_ignored(tmp_path: Path) -> None:
    tied = MOE.replace(tie_embeddings=True)
    params = model(tied)
    checkpoint.save(tmp_path / "m", tied, params)
    tensors = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    tensors["lm_head.weight"] = params.tok_embeddings
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "m/model.safetensors")
    assert same_bits(checkpoint.load_params(tmp_path / "m")[1], params)
    tensors["lm_head.weight"] = params.tok_embeddings + 1
    safetensors.numpy.save_file(tensors, tmp_path / "m/model.safetensors")
    for read in (checkpoint.load_params, checkpoint.verify):
        with pytest.raises(checkpoint.TensorMismatchError, match=r"tie_word_embeddings.*lm_head\.weight"):
            read(tmp_path / "m")


def test_names_are_hugging_faces() -> None:
    assert list(map(hf_name, shapes(MOE)))[:8] == [
        "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ]  # fmt: skip
    assert hf_name("layers.1.feed_forward.experts.12.w3") == "model.layers.1.block_sparse_moe.experts.12.w3.weight"
    dense = ["gate_proj", "down_proj", "up_proj"]
    assert [hf_name(f"layers.0.feed_forward.w{i}") for i in (1, 2, 3)] == [
        f"model.layers.0.mlp.{n}.weight" for n in dense
    ]
    assert [hf_name("norm"), hf_name("output")] == ["model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name: str) -> None:
    assert config_from_hf(config_to_hf(PRESETS[name], np.dtype("bfloat16")), "config.json") == PRESETS[name]


@given(st.data())
def test_any_config_survives_config_json(data: st.DataObject) -> None:
    size, real = st.integers(1, 2**31 - 1), st.floats(0, 0.99)
    dense = data.draw(st.booleans())
    E = 1 if dense else data.draw(st.integers(1, 64))
    config = ModelConfig(
        vocab_size=data.draw(st.integers(3, 2**31 - 1)), hidden_size=data.draw(size),
        intermediate_size=data.draw(size), num_layers=data.draw(size), num_heads=12,
        num_kv_heads=data.draw(st.sampled_from([1, 2, 3, 4, 6, 12])), head_dim=2 * data.draw(st.integers(1, 999)),
        num_experts=E, num_experts_per_token=data.draw(st.integers(1, E)), dense=dense,
        norm_eps=data.draw(real), rope_theta=data.draw(st.floats(1e-3, 1e12)),
        sliding_window=data.draw(st.none() | size), max_length=data.draw(size),
        tie_embeddings=data.draw(st.booleans()), balance_coefficient=data.draw(real),
        balance_form=data.draw(st.sampled_from(BALANCE_FORMS)), router_jitter=data.draw(real),
        bos_id=data.draw(st.none() | st.integers(0, 2)), eos_id=data.draw(st.none() | st.integers(0, 2)),
    )  # fmt: skip
    assert config_from_hf(config_to_hf(config, np.dtype("float32")), "config.json") == config


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_parameters": ...}, "rope_theta", 1e6),  # v4
        ({"rope_theta": ..., "torch_dtype": ..., "dtype": "float32"}, "rope_theta", 1e6),  # v5
        ({"rope_theta": ..., "rope_parameters": ...}, "rope_theta", 1e6),
        ({"rope_theta": 5000, "rope_parameters": ..., "rope_scaling": {"type": "default"}}, "rope_theta", 5e3),
        ({"rope_theta": 5000, "rope_parameters": ..., "rope_scaling": None}, "rope_theta", 5e3),
        ({"head_dim": None}, "head_dim", 4),
        ({"head_dim": ...}, "head_dim", 4),
        ({"eos_token_id": [5, 6]}, "eos_id", 5),
        ({"router_jitter_noise": ...}, "router_jitter", 0.0),
        ({"router_aux_loss_coef": ...}, "balance_coefficient", 0.001),
        ({"minimoe": ...}, "balance_form", "concatenated"),
        ({"rms_norm_eps": ...}, "norm_eps", 1e-5),
        ({"sliding_window": ...}, "sliding_window", None),
        ({"use_cache": False, "some_new_key": {"a": 1}, "layer_types": ["full_attention"] * 2}, "hidden_size", 16),
    ],
)  # fmt: skip
def test_other_spellings_of_config_json(tmp_path: Path, changes: dict, field: str, value: object) -> None:
    config = MOE if "head_dim" not in changes else MOE.replace(head_dim=4)
    checkpoint.save(tmp_path / "m", config, model(config))
    edit_json(tmp_path / "m/config.json", **changes)
    assert getattr(checkpoint.load_params(tmp_path / "m")[0], field) == value


def test_a_llama_is_a_dense_model_without_window(tmp_path: Path) -> None:
    config = DENSE.replace(sliding_window=None)
    checkpoint.save(tmp_path / "m", config, model(config))
    edit_json(tmp_path / "m/config.json", model_type="llama", sliding_window=...)
    assert checkpoint.load_params(tmp_path / "m")[0] == config


def test_the_windows_default_is_the_familys(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", DENSE, model(DENSE))
    edit_json(tmp_path / "m/config.json", sliding_window=...)
    assert checkpoint.read_config(tmp_path / "m").sliding_window == 4096
    edit_json(tmp_path / "m/config.json", sliding_window=None)
    assert checkpoint.read_config(tmp_path / "m").sliding_window is None


def test_links_into_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MOE, model())
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list((tmp_path / "m").iterdir()):
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert same_bits(checkpoint.load_params(snapshot)[1], model())


def test_verify_names_nan_and_inf_with_counts_and_the_first_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimoe.checkpoint.verifying._CHUNK", 7)
    params = model(dtype=ml_dtypes.bfloat16)
    params.layers[1].attention.wo[3, 5] = np.inf
    params.layers[1].attention.wo[9, 1:4] = np.nan
    params.norm[2] = -np.inf
    checkpoint.save(tmp_path / "m", MOE, params, max_shard_bytes=3000)
    seen: list[tuple[int, int]] = []
    found = checkpoint.verify(tmp_path / "m", lambda done, total: seen.append((done, total)))
    assert [(p.tensor, p.nans, p.infinities, p.first) for p in found] == [
        ("model.layers.1.self_attn.o_proj.weight", 3, 1, (3, 5)),
        ("model.norm.weight", 0, 1, (2,)),
    ]
    assert "holds 3 NaN and 1 Inf, the first at [3, 5]" in str(found[0])
    assert seen[-1] == (2 * MOE.num_parameters(),) * 2
    assert seen == sorted(seen)
