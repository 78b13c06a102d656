"""Every layout is read as others write it, written so that it comes back, and refused where it is not whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from minimoe import checkpoint
from minimoe.backends import make_backend
from minimoe.checkpoint.formats import config_to_hf
from minimoe.checkpoint.layouts import LAYOUTS
from minimoe.checkpoint.mapped import MappedFiles
from minimoe.cli import main
from minimoe.config import PRESETS, ModelConfig
from minimoe.params import named
from tests.checkpoint import layout_files
from tests.checkpoint.folders import MOE, edit_json, model, same_bits

# What params.json cannot say is as a file without our own key means it.
PLAIN = MOE.replace(
    max_length=32768, balance_coefficient=0.02, balance_form="concatenated", rope_theta=1e6, sliding_window=None
)
ONE = "consolidated.safetensors"
SHARDS = {
    "one": (ONE,),
    "numbered": tuple(f"consolidated.{i:02d}.safetensors" for i in range(3)),
    "counted": tuple(f"consolidated-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
}


def made(folder: Path, layout: str, config: ModelConfig = PLAIN, files: tuple[str, ...] = (), **options: Any) -> Path:
    """A folder as others would write it."""
    tensors = getattr(layout_files, layout)(config, model(config, **options))
    if layout == "fused":
        return layout_files.write(
            folder, tensors, config_to_hf(config, np.dtype("f4")), *(files or ("model.safetensors",))
        )
    return layout_files.write(folder, tensors, layout_files.params_json(config), *(files or (ONE,)))


def refused(folder: Path, kind: type[checkpoint.CheckpointError], *words: str) -> None:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load_params(folder)
    assert type(caught.value) is kind, repr(caught.value)
    for word in words:
        assert word in str(caught.value)


def views(params: Any) -> set[str]:
    """Names of the parameters that are read-only views of a file."""
    return {name for name, w in named(params) if not w.flags.writeable and not w.flags.owndata}


# ---- reading what others wrote


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["mistral", "stacked", "fused"])
def test_what_others_write_is_read(tmp_path: Path, layout: str, dtype: str) -> None:
    folder = made(tmp_path / "m", layout, dtype=np.dtype(dtype))
    config, params = checkpoint.load_params(folder)
    assert config == PLAIN == checkpoint.read_config(folder)
    assert same_bits(params, model(PLAIN, np.dtype(dtype)))
    assert checkpoint.headers(folder).layout is LAYOUTS[layout]
    assert checkpoint.verify(folder) == []


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("layout", ["mistral", "stacked"])
def test_mistrals_files_hold_whole_tensors_and_need_no_index(tmp_path: Path, layout: str, shards: str) -> None:
    folder = made(tmp_path / "m", layout, files=SHARDS[shards])
    assert same_bits(checkpoint.load_params(folder)[1], model(PLAIN))


def test_a_dense_model_in_mistrals_layout(tmp_path: Path) -> None:
    dense = PLAIN.replace(dense=True, num_experts=1, num_experts_per_token=1)
    config, params = checkpoint.load_params(made(tmp_path / "m", "mistral", dense))
    assert config == dense
    assert same_bits(params, model(dense))


def test_interleaved_rows_give_the_same_logits_where_pairs_are_neighbours(tmp_path: Path) -> None:
    """The permutation is the right one, not only its own inverse: rotate neighbours, as Mistral does, by hand."""
    folder = made(tmp_path / "m", "mistral")
    stored = safetensors.numpy.load_file(folder / ONE)["layers.0.attention.wq.weight"].astype(np.float64)
    ours = checkpoint.load_params(folder, np.float64)[1].layers[0].attention.wq
    x, H, C = np.random.default_rng(1).standard_normal(PLAIN.hidden_size), PLAIN.num_heads, PLAIN.head_dim
    angles = 7 * PLAIN.rope_theta ** (-np.arange(0, C, 2) / C)
    pairs = (stored @ x).reshape(H, C // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    rope = make_backend("numpy").rope
    rotated = rope.forward((ours @ x).reshape(1, H, C), *rope.table(np.array([7]), C, PLAIN.rope_theta, np.float64))
    np.testing.assert_allclose(rotated[0], np.concatenate([turned.real, turned.imag], axis=-1), rtol=1e-12)


@pytest.mark.parametrize(
    ("layout", "copied"),
    [("fused", ()), ("mistral", (".wq", ".wk")), ("stacked", (".wq", ".wk", ".w2"))],
)
def test_weights_are_used_in_place_wherever_the_layout_allows(
    tmp_path: Path, layout: str, copied: tuple[str, ...]
) -> None:
    params = checkpoint.load_params(made(tmp_path / "m", layout))[1]
    assert views(params) == {name for name, _ in named(params) if not name.endswith(copied)}
    assert all(w.flags.c_contiguous for _, w in named(params))
    expected = sum(w.nbytes for name, w in named(params) if name.endswith(copied))
    assert MappedFiles(params).copied_bytes == expected == checkpoint.copied_bytes(tmp_path / "m")


def test_info_says_the_layout_and_what_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout, title in (("fused", "experts fused"), ("stacked", "experts stacked")):
        folder = made(tmp_path / layout, layout)
        assert main(["info", str(folder), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["layout"], told["copied_bytes"]) == (layout, checkpoint.copied_bytes(folder))
        assert told["kv_cache_bytes_per_token"] == PLAIN.kv_bytes_per_token(4)
        assert main(["info", str(folder)]) == 0
        out = capsys.readouterr().out
        assert title in out and ("copied" in out) == (layout == "stacked")


def test_copies_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("fused", "stacked"):
        made(tmp_path / layout, layout)
    monkeypatch.setattr("minimoe.checkpoint.memory.free_memory", lambda: 1000)
    checkpoint.load_params(tmp_path / "fused")
    refused(tmp_path / "stacked", checkpoint.NotEnoughMemoryError, "converted or copied", "minimoe convert")


# ---- params.json


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {"rope_theta": 1e6, "sliding_window": None}),
        ({"rope_theta": 5e4}, {"rope_theta": 5e4}),
        ({"sliding_window": 9}, {"rope_theta": 1e4, "sliding_window": 9}),
        ({"sliding_window": 9, "rope_theta": 1e6}, {"rope_theta": 1e6, "sliding_window": 9}),
        ({"sliding_window": None, "rope_theta": None, "lora": None}, {"rope_theta": 1e6}),
        ({"max_batch_size": 4, "model_type": "transformer", "use_biases": False}, {"hidden_size": 16}),
        ({"minimoe": {"max_length": 64, "eos_id": None}}, {"max_length": 64, "eos_id": None}),
        ({"moe": ...}, {"dense": True}),
    ],
)
def test_what_params_json_leaves_open(tmp_path: Path, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    edit_json(made(tmp_path / "m", "mistral") / "params.json", **changes)
    config = checkpoint.read_config(tmp_path / "m")
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": ..., "n_heads": None}, "lacks dim, n_heads"),
        ({"dim": "16"}, "dim must be an integer"),
        ({"n_kv_heads": 3}, "n_heads (H = 4) must be a multiple of n_kv_heads (K = 3)"),
        ({"moe": {"num_experts": 3}}, "moe must hold num_experts and num_experts_per_tok"),
        ({"moe": {"num_experts": 3, "num_experts_per_tok": 4}}, "num_experts_per_tok (k = 4) exceeds num_experts"),
        ({"moe": 3}, "moe must hold"),
        ({"norm_eps": "small"}, "norm_eps must be a finite number"),
        ({"vision_encoder": {"dim": 3}}, "vision_encoder"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "does not know: quantization"),
        ({"use_biases": True}, "use_biases = True"),
        ({"model_type": "mamba"}, "model_type = mamba"),
        ({"sliding_window": [4096, None]}, "sliding_window must be an integer"),
        ({"minimoe": {"hidden_size": 3}}, "minimoe may hold"),
        ({"minimoe": 3}, "minimoe may hold"),
    ],
)
def test_a_params_json_of_another_model(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(made(tmp_path / "m", "mistral") / "params.json", **changes)
    refused(tmp_path / "m", checkpoint.ConfigFileError, "params.json", words)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["mistral", "stacked"])
def test_presets_survive_params_json(name: str, layout: str) -> None:
    from minimoe.checkpoint.params_json import config_from_params, config_to_params

    text = json.dumps(config_to_params(PRESETS[name]))
    assert config_from_params(json.loads(text), "params.json") == PRESETS[name]


def test_two_descriptions_must_agree(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "mistral")
    config = PLAIN.replace(max_length=99, eos_id=None)  # of which params.json says nothing
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, np.dtype("f4"))))
    assert checkpoint.load_params(folder)[0] == config
    edit_json(folder / "params.json", norm_eps=1e-6, rope_theta=1e4, moe={"num_experts": 3, "num_experts_per_tok": 1})
    refused(
        folder, checkpoint.ConfigFileError, "params.json: contradicts config.json", "norm_eps = 1e-06, there norm_eps",
        "rope_theta = 10000.0", "moe.num_experts_per_tok = 1, there num_experts_per_token = 2",
    )  # fmt: skip
    edit_json(folder / "params.json", norm_eps=1e-5, rope_theta=..., moe=...)
    refused(folder, checkpoint.ConfigFileError, "moe.num_experts = 1, there num_experts = 3")


# ---- what is not whole


def spoil(folder: Path, change: Any) -> Path:
    """Change the tensors of a folder's one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, file)
    return folder


NAMES = {
    "mistral": ("layers.1.attention.wk.weight", "layers.1.feed_forward.experts.2.w2.weight"),
    "stacked": ("layers.1.attention.wk.weight", "layers.1.block_sparse_moe.w2"),
    "fused": ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"),
}


@pytest.mark.parametrize("layout", NAMES)
def test_missing_extra_and_transposed_tensors_are_named(tmp_path: Path, layout: str) -> None:
    gone, turned = NAMES[layout]

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[gone]
        tensors[turned] = np.swapaxes(tensors[turned], -1, -2)
        tensors[f"{turned}.bias"] = np.zeros(3, np.float32)

    refused(
        spoil(made(tmp_path / "m", layout), change), checkpoint.TensorMismatchError, f"missing (1): {gone}",
        f"extra (1): {turned}.bias", f"transposed (1): {turned} is",
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["stacked", "fused"])
def test_a_tensor_with_an_expert_too_few_is_named(tmp_path: Path, layout: str) -> None:
    name = NAMES[layout][1]

    def change(tensors: dict[str, np.ndarray]) -> None:
        rows = len(tensors[name]) // PLAIN.num_experts
        tensors[name] = tensors[name][:-rows]

    refused(spoil(made(tmp_path / "m", layout), change), checkpoint.TensorMismatchError, f"shape (1): {name} is (")


@pytest.mark.parametrize("other", ["hf", "fused", "stacked"])
def test_tensors_of_two_layouts_in_one_folder(tmp_path: Path, other: str) -> None:
    checkpoint.save(tmp_path / "other", PLAIN, model(PLAIN), layout=other)
    (file,) = (tmp_path / "other").glob("*.safetensors")
    theirs = {name: w for name, w in safetensors.numpy.load_file(file).items() if "moe" in name or "mlp" in name}
    folder = spoil(made(tmp_path / "m", "mistral"), lambda tensors: tensors.update(theirs))
    refused(folder, checkpoint.LayoutError, "several layouts", f"{other} (", "mistral (", next(iter(sorted(theirs))))


def test_weight_files_of_two_layouts_in_one_folder(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "mistral")
    checkpoint.save(tmp_path / "hf", PLAIN, model(PLAIN))
    shutil.copy(tmp_path / "hf/model.safetensors", folder)
    refused(folder, checkpoint.LayoutError, "model.safetensors and consolidated.safetensors", "keep one")


def test_an_index_without_any_of_its_files_is_no_second_layout(tmp_path: Path) -> None:
    """As a download of a repository that has both leaves it."""
    checkpoint.save(tmp_path / "m", PLAIN, model(PLAIN), max_shard_bytes=4000)
    checkpoint.save(tmp_path / "other", PLAIN, model(PLAIN), layout="mistral", max_shard_bytes=4000)
    for name in ("consolidated.safetensors.index.json", "params.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "m")
    assert same_bits(checkpoint.load_params(tmp_path / "m")[1], model(PLAIN))
    for file in (tmp_path / "other").glob("*.safetensors"):
        file.unlink()
    refused(tmp_path / "other", checkpoint.MissingFileError, "shards are missing: consolidated-")


def test_missing_and_stale_files_of_mistral(tmp_path: Path) -> None:
    for shards in ("numbered", "counted"):
        folder = made(tmp_path / shards, "mistral", files=SHARDS[shards])
        (folder / SHARDS[shards][1]).unlink()
        refused(folder, checkpoint.MissingFileError, f"1 of 3 shards are missing: {SHARDS[shards][1]}")
    folder = made(tmp_path / "m", "mistral")
    shutil.copy(folder / ONE, folder / "consolidated.00.safetensors")
    refused(folder, checkpoint.ShardIndexError, f"both {ONE} and consolidated.00.safetensors")


def test_a_tensor_in_two_of_mistrals_files(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "mistral", files=SHARDS["numbered"])
    files = [folder / name for name in SHARDS["numbered"]]
    tensors = safetensors.numpy.load_file(files[1]) | {"norm.weight": np.ones(16, np.float32)}
    safetensors.numpy.save_file(tensors, files[1])
    refused(folder, checkpoint.ShardIndexError, "tensors in two shards: norm.weight (in")


# ---- writing


@pytest.mark.parametrize("layout", ["mistral", "stacked", "fused"])
def test_what_we_write_is_what_others_would(tmp_path: Path, layout: str) -> None:
    checkpoint.save(tmp_path / "m", PLAIN, model(PLAIN), layout=layout)
    (file,) = (tmp_path / "m").glob("*.safetensors")
    ours, theirs = safetensors.numpy.load_file(file), getattr(layout_files, layout)(PLAIN, model(PLAIN))
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        np.testing.assert_array_equal(ours[name], w, err_msg=name)
    raw = json.loads((tmp_path / "m" / LAYOUTS[layout].config).read_text())
    if layout != "fused":
        assert layout_files.params_json(PLAIN).items() <= raw.items()


def test_a_layout_replaces_another_as_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for layout in (*LAYOUTS, "hf"):
        checkpoint.save(folder, MOE, model(), layout=layout, max_shard_bytes=3000)
        assert same_bits(checkpoint.load_params(folder)[1], model())
        assert checkpoint.headers(folder).layout is LAYOUTS[layout]
        names = os.listdir(folder)
        assert ("config.json" in names) == (layout in ("hf", "fused")) != ("params.json" in names)
        shards = [name for name in names if name.endswith(".safetensors")]
        assert len(shards) > 3
        assert f"{LAYOUTS[layout].stem}.safetensors.index.json" in names
    with pytest.raises(checkpoint.LayoutError, match="unknown layout gguf; those that are written are hf, fused"):
        checkpoint.save(folder, MOE, model(), layout="gguf")


def test_a_tensor_of_several_experts_has_one_type(tmp_path: Path) -> None:
    params = model()
    params.layers[1].feed_forward.w1[2] = params.layers[1].feed_forward.w1[2].astype(np.float64)
    checkpoint.save(tmp_path / "m", MOE, params, layout="mistral")
    with pytest.raises(checkpoint.SaveError, match=r"layers\.1\.block_sparse_moe\.w1 would hold float32 and float64"):
        checkpoint.save(tmp_path / "s", MOE, params, layout="stacked")
    assert not (tmp_path / "s").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(checkpoint.SaveError, match=r"the weights take 0\.0 MB; 0\.0 MB are free"):
        checkpoint.save(tmp_path / "a/b", MOE, model())
    assert os.listdir(tmp_path) == []
