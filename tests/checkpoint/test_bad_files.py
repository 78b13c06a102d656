"""Every folder and file that is not a checkpoint: a typed error of one line that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from minimoe import checkpoint
from minimoe.checkpoint import CheckpointError
from minimoe.checkpoint.mathematics import NEUTRAL
from minimoe.config import ConfigError, preset
from tests.checkpoint.folders import MOE, edit_json, model, read_parts, write_parts

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("originals")
    checkpoint.save(base / "single", MOE, model())
    checkpoint.save(base / "sharded", MOE, model(), max_shard_bytes=4000)
    return base


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "single", tmp_path / "single")


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


def refused(folder: Path, kind: type[CheckpointError], *words: str) -> str:
    """Load the folder; it must fail with exactly this type, in one line that holds these words."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_params(folder)
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 3000
    said = message.replace(str(folder.parent), "")  # which holds the name of the test
    for word in words:
        assert word in said, message
    return message


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", checkpoint.MissingFileError, "nowhere", "no such folder")


def test_a_file_instead_of_a_folder(single: Path) -> None:
    refused(single / SINGLE, checkpoint.MissingFileError, SINGLE, "is a file")


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin", "x.pth", "x.pkl"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / name, checkpoint.UnsafeFormatError, name, "convert it to safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    shutil.copy(tmp_path / name, tmp_path / "m.bin")
    folder = tmp_path / "folder"
    checkpoint.save(folder, MOE, model())
    (folder / SINGLE).rename(tmp_path / "gone")
    shutil.copy(tmp_path / name, folder / name)
    refused(folder, checkpoint.UnsafeFormatError, name, "never opened", "convert")
    (folder / name).rename(folder / SINGLE)
    refused(folder, checkpoint.UnsafeFormatError, SINGLE, "never opened")
    assert not (tmp_path / "opened").exists()


def test_a_folder_without_weights_names_what_it_found(single: Path) -> None:
    (single / SINGLE).rename(single / "weights.safetensors")
    refused(single, checkpoint.MissingFileError, SINGLE, INDEX, "consolidated.safetensors", "found weights.safetensors")


def test_a_folder_that_is_not_readable(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), checkpoint.MissingFileError, "cannot be opened")
    refused(tmp_path / "a\0b", checkpoint.MissingFileError, "cannot be opened")


def test_a_failing_disk_is_one_line_too(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("minimoe.checkpoint.mapped.MappedFile", fail)
    refused(single, checkpoint.MissingFileError, "cannot be read: Input/output error")


# --- config.json -----------------------------------------------------------------------------------------------------


def test_a_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, checkpoint.MissingFileError, "there is no config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"model_type": "mixtral", "model_type": "mixtral"}', "key model_type appears twice"),
        (b'{"a": {"b": 1, "b": 2}}', "key b appears twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * 1_000_001, "at most 1,000,000"),
    ],
)
def test_a_config_that_is_not_json(single: Path, text: bytes, words: str) -> None:
    (single / "config.json").write_bytes(text)
    refused(single, checkpoint.DamagedFileError, "config.json", words)


CONFIG_CASES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe"}, "model_type must be one of mixtral, mistral, llama, grok-1, not qwen3_moe"),
    ({"model_type": ...}, "model_type"),
    ({"model_type": ["mixtral"]}, "model_type"),
    ({"hidden_size": ..., "vocab_size": None}, "lacks vocab_size, hidden_size"),
    ({"num_local_experts": ...}, "lacks num_local_experts"),
    ({"hidden_size": "16"}, "hidden_size must be an integer"),
    ({"hidden_size": 16.0}, "hidden_size must be an integer"),
    ({"hidden_size": True}, "hidden_size must be an integer"),
    ({"hidden_size": -16}, "hidden_size must be an integer"),
    ({"hidden_size": 10**12}, "hidden_size must be an integer in [1, 2147483647]"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be an integer"),
    ({"num_key_value_heads": 3}, "num_attention_heads (H = 4) must be a multiple of num_key_value_heads (K = 3)"),
    ({"num_experts_per_tok": 4}, "num_experts_per_tok (k = 4) exceeds num_local_experts (E = 3)"),
    ({"head_dim": 7}, "head_dim (C = 7) must be even"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
    ({"router_jitter_noise": 1.5}, "router_jitter_noise must be below 1"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ({"eos_token_id": 48}, "eos_token_id must be None or an id in [0, 48)"),
    ({"minimoe": {"balance_form": "none"}}, "balance_form"),
    ({"minimoe": {"new": 1}}, "minimoe may hold balance_form"),
    ({"minimoe": 3}, "minimoe may hold balance_form"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}}, "only the rope_type default"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradict each other"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one object for all layers"),
    ({"rope_parameters": 7}, "rope_parameters must be null or one object"),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rotated whole"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_theta": 0, "rope_parameters": ...}, "rope_theta must be positive"),
    ({"rope_theta": "1e6", "rope_parameters": ...}, "rope_theta"),
    ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True, "clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types"),
    ({"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window"),
    ({"model_type": "llama", "sliding_window": 8}, "a llama has no window"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), CONFIG_CASES)
def test_a_config_of_another_model(single: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(single / "config.json", **changes)
    refused(single, checkpoint.ConfigFileError, "config.json", words)
    with pytest.raises(ConfigError):
        checkpoint.read_config(single)


def test_a_number_that_overflows(single: Path) -> None:
    config = single / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e999"))
    refused(single, checkpoint.ConfigFileError, "rms_norm_eps must be a finite number of at least 0, not inf")


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_that_change_the_mathematics_are_refused_unless_neutral(single: Path, key: str) -> None:
    for value in NEUTRAL[key]:
        edit_json(single / "config.json", **{key: value})
        assert checkpoint.read_config(single) == MOE
    edit_json(single / "config.json", **{key: 1.75})
    refused(single, checkpoint.ConfigFileError, f"{key} = 1.75")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31 - 1},
        {"num_local_experts": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
    ],
)
def test_absurd_sizes_are_refused_with_the_memory_they_would_need(single: Path, changes: dict[str, int]) -> None:
    edit_json(single / "config.json", **changes)
    refused(single, checkpoint.ConfigFileError, "config.json", "GB in bfloat16", "the files hold 35 tensors")


def test_models_that_do_not_fit_memory_are_refused_before_allocation(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(checkpoint.NotEnoughMemoryError, match=r"parameters in float64 need 99,849\.5 GB of memory"):
        checkpoint.check_memory(preset("mixtral-8x7b").replace(num_layers=8600), np.float64)
    monkeypatch.setattr("minimoe.checkpoint.memory.free_memory", lambda: 10_000)
    checkpoint.load_params(single)  # mapped: needs none
    for arguments in ({"dtype": "float64"}, {"mapped": False}):
        with pytest.raises(checkpoint.NotEnoughMemoryError, match=r"converted or copied need 0\.\d MB"):
            checkpoint.load_params(single, **arguments)


# --- safetensors files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"1234", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a safetensors file"),
        (struct.pack("<Q", 10_000_001) + b"{}", "announce a header of 10,000,001 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "announce a header"),
        (struct.pack("<Q", 100) + b"{}", "truncated: the header takes 100 bytes"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "must be a JSON object"),
        (struct.pack("<Q", 4) + b'{"\xff"', "not UTF-8"),
        (struct.pack("<Q", 50_000) + b'{"a":' * 10_000, "nested too deeply"),
        (struct.pack("<Q", 300_010) + b'{"a":[' + b"{}," * 100_001 + b"1", "more than 50,000 tensors"),
        (struct.pack("<Q", 2_000_009) + b'{"a":[' + b"[]," * 666_667 + b"0]", "1,333,337 commas, colons and brackets"),
        (struct.pack("<Q", 15) + b'{"a":1, "a": 2}', "key a appears twice"),
    ],
)
def test_a_file_that_is_not_safetensors(single: Path, content: bytes, words: str) -> None:
    (single / SINGLE).write_bytes(content)
    refused(single, checkpoint.DamagedFileError, SINGLE, words)


def test_a_truncated_or_prolonged_file(single: Path) -> None:
    whole = (single / SINGLE).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 5000):
        (single / SINGLE).write_bytes(whole[:size])
        refused(single, checkpoint.DamagedFileError, SINGLE, f"truncated: {size:,} bytes instead of {len(whole):,}")
    (single / SINGLE).write_bytes(whole + b"abc")
    refused(single, checkpoint.DamagedFileError, SINGLE, "3 bytes after the last tensor belong to none")


NORM = "model.norm.weight"
Edit = Callable[[dict[str, Any]], Any]


def _set(key: str, value: Any) -> Edit:
    return lambda header: header[NORM].__setitem__(key, value)


HEADER_CASES: list[tuple[Edit, str]] = [
    (_set("shape", [-16]), "shape must be at most 8 counts, not [-16]"),
    (_set("shape", [4, 4.0]), "shape"),
    (_set("shape", [True] * 2), "shape"),
    (_set("shape", "16"), "shape"),
    (_set("shape", [1] * 9), "shape"),
    (_set("shape", [2**62] * 8), "takes"),
    (_set("shape", [2**64]), "shape"),
    (_set("shape", [17]), "takes 68 bytes, its data_offsets give 64"),
    (_set("data_offsets", [0]), "data_offsets must be [begin, end]"),
    (_set("data_offsets", [64, 0]), "data_offsets must be [begin, end]"),
    (_set("data_offsets", [-64, 0]), "data_offsets must be [begin, end]"),
    (_set("data_offsets", {"a": 1}), "data_offsets"),
    (_set("dtype", None), "dtype must be text"),
    (_set("more", 1), "nothing else"),
    (lambda header: header[NORM].pop("dtype"), "must hold dtype, shape and data_offsets"),
    (lambda header: header.__setitem__(NORM, 3), "must hold dtype"),
    (lambda header: header.__setitem__("__metadata__", {"a": 1}), "__metadata__ must map text to text"),
    (lambda header: header.__setitem__("__metadata__", "a"), "__metadata__"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), HEADER_CASES)
def test_a_false_header_entry(single: Path, edit: Edit, words: str) -> None:
    header, data = read_parts(single / SINGLE)
    edit(header)
    write_parts(single / SINGLE, header, data)
    refused(single, checkpoint.DamagedFileError, SINGLE, "__metadata__" if "__" in words else NORM, words)


def test_overlapping_tensors_and_holes(single: Path) -> None:
    header, data = read_parts(single / SINGLE)
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 4, end - 4]
    write_parts(single / SINGLE, header, data)
    refused(single, checkpoint.DamagedFileError, NORM, "overlap")
    header[NORM]["data_offsets"] = [begin + 4, end + 4]
    write_parts(single / SINGLE, header, data + b"1234")
    refused(single, checkpoint.DamagedFileError, NORM, "leave a hole")


@pytest.mark.parametrize("kind", ["F8_E4M3", "I8", "I64", "BOOL", "F4", "C64", "?"])
def test_unsupported_number_formats(single: Path, kind: str) -> None:
    header, data = read_parts(single / SINGLE)
    header[NORM]["dtype"] = kind
    write_parts(single / SINGLE, header, data)
    refused(single, checkpoint.UnsupportedTypeError, SINGLE, kind, NORM, "BF16")


def test_names_from_a_file_cannot_write_to_the_terminal(single: Path) -> None:
    header, data = read_parts(single / SINGLE)
    header["evil\x1b[2J\nname\ud800"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    header["x" * 5000] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    write_parts(single / SINGLE, header, data)
    refused(single, checkpoint.TensorMismatchError, "evil\\x1b[2J\\nname", "(5,000 characters)")


def test_a_fifo_does_not_block(single: Path) -> None:
    (single / SINGLE).unlink()
    os.mkfifo(single / SINGLE)
    refused(single, checkpoint.DamagedFileError, SINGLE, "not a regular file")


def test_a_folder_in_the_place_of_a_file(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    refused(single, checkpoint.DamagedFileError, SINGLE, "not a regular file")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_that_leaves_the_folder(single: Path, name: str, relative: bool) -> None:
    outside = single.parent / "outside"
    (single / name).rename(outside)
    (single / name).symlink_to("../outside" if relative else outside)
    refused(single, checkpoint.OutsideFolderError, name, "leaves the folder")


# --- names and shapes ------------------------------------------------------------------------------------------------


def test_all_wrong_tensors_are_named_at_once(single: Path) -> None:
    tensors = safetensors.numpy.load_file(single / SINGLE)
    del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"] = np.zeros((12, 16), np.float32)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((24, 17), np.float32)
    tensors["model.norm.weight"] = np.zeros((16, 1), np.float32)
    safetensors.numpy.save_file(tensors, single / SINGLE)
    message = refused(
        single, checkpoint.TensorMismatchError,
        "missing (2): model.layers.0.self_attn.k_proj.weight, lm_head.weight",
        "extra (1): model.layers.0.self_attn.q_proj.bias",
        "transposed (1): model.layers.1.block_sparse_moe.experts.2.w2.weight is (12, 16), should be (16, 12)",
        "shape (2): model.layers.1.self_attn.q_proj.weight is (24, 17), should be (24, 16), "
        "model.norm.weight is (16, 1), should be (16,)",
    )  # fmt: skip
    with pytest.raises(checkpoint.TensorMismatchError) as caught:
        checkpoint.verify(single)
    assert str(caught.value) == message
    assert caught.value.differences.missing == ["model.layers.0.self_attn.k_proj.weight", "lm_head.weight"]


def test_very_many_wrong_tensors_are_grouped(single: Path) -> None:
    edit_json(single / "config.json", num_hidden_layers=60)
    message = refused(
        single, checkpoint.TensorMismatchError,
        "missing (928)", "model.layers.*.block_sparse_moe.experts.*.w1.weight (174 of them, first model.layers.2.",
    )  # fmt: skip
    assert len(message) < 1500


# --- shards and index ------------------------------------------------------------------------------------------------


def shard_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def test_missing_shards_are_all_named(sharded: Path) -> None:
    names = shard_names(sharded)
    for name in (names[1], names[3]):
        (sharded / name).unlink()
    refused(sharded, checkpoint.MissingFileError, f"2 of {len(names)} shards are missing: {names[1]}, {names[3]}")


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "x\0.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder(sharded: Path, path: str) -> None:
    raw = json.loads((sharded / INDEX).read_text())
    raw["weight_map"][NORM] = path
    (sharded / INDEX).write_text(json.dumps(raw))
    shutil.copy(sharded / shard_names(sharded)[0], sharded.parent / "outside.safetensors")
    refused(sharded, checkpoint.OutsideFolderError, "not the plain name of a file in this folder")


def test_a_shard_that_is_a_link_out_of_the_folder(sharded: Path) -> None:
    name = shard_names(sharded)[0]
    (sharded / name).rename(sharded.parent / name)
    (sharded / name).symlink_to(sharded.parent / name)
    refused(sharded, checkpoint.OutsideFolderError, name, "leaves the folder")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map must be an object"),
        ({"weight_map": {}}, "weight_map must be an object"),
        ({"weight_map": [1]}, "weight_map must be an object"),
        ({"weight_map": {NORM: 3}}, "the shard of model.norm.weight must be a .safetensors file, not 3"),
        ({"weight_map": {NORM: "pytorch_model.bin"}}, "must be a .safetensors file, not pytorch_model.bin"),
        ({"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}}, "1,001 shards"),
    ],
)
def test_a_false_index(sharded: Path, index: dict[str, Any], words: str) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, checkpoint.ShardIndexError, INDEX, words)


def test_an_index_that_is_not_json(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}')
    refused(sharded, checkpoint.DamagedFileError, INDEX, "key a appears twice")


def test_a_tensor_in_the_wrong_shard_or_in_none(sharded: Path) -> None:
    raw = json.loads((sharded / INDEX).read_text())
    names = shard_names(sharded)
    raw["weight_map"][NORM] = names[0]
    raw["weight_map"]["ghost"] = names[0]
    mate = next(name for name, shard in raw["weight_map"].items() if shard == names[-2])
    del raw["weight_map"][mate]
    (sharded / INDEX).write_text(json.dumps(raw))
    refused(
        sharded, checkpoint.ShardIndexError,
        f"missing (1): ghost (not in {names[0]})",
        f"not in the index (1): {mate} (in {names[-2]})",
        f"in another shard (1): {NORM} (in {names[-2]}, not in {names[0]})",
    )  # fmt: skip


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    names = shard_names(sharded)
    first = safetensors.numpy.load_file(sharded / names[0])
    first[NORM] = np.ones(16, np.float32)
    safetensors.numpy.save_file(first, sharded / names[0])
    refused(sharded, checkpoint.ShardIndexError, f"tensors in two shards: {NORM} (in {names[0]} and ")


def test_an_index_beside_a_single_file_is_ambiguous(sharded: Path, single: Path) -> None:
    shutil.copy(single / SINGLE, sharded)
    refused(sharded, checkpoint.ShardIndexError, SINGLE, INDEX, "remove the stale one")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    name = shard_names(sharded)[2]
    (sharded / name).write_bytes((sharded / name).read_bytes()[:-1])
    refused(sharded, checkpoint.DamagedFileError, name, "truncated")


def test_state_files_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.MissingFileError, match=r"state\.safetensors: cannot be opened"):
        checkpoint.load_tensors(tmp_path / "state.safetensors")
    checkpoint.save_tensors(tmp_path / "state.safetensors", {"a": np.arange(3)})
    content = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(content[:-1])
    with pytest.raises(checkpoint.DamagedFileError, match="truncated"):
        checkpoint.load_tensors(tmp_path / "state.safetensors")
