"""GGUF files, written by the gguf package's own writer and quantiser, are read; what we lack in them is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minimoe
from minimoe import checkpoint
from minimoe.checkpoint.mapped import MappedFiles
from minimoe.cli import main
from minimoe.config import ModelConfig
from minimoe.params import Params, named
from tests.checkpoint.folders import model, same_bits
from tests.checkpoint.layout_files import interleaved

gguf = pytest.importorskip("gguf")

KINDS = gguf.GGMLQuantizationType
# What GGUF cannot say is as ModelConfig has it; widths are whole blocks, of 32 numbers or 256.
CONFIG = ModelConfig(
    vocab_size=48, hidden_size=256, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    num_experts=3, num_experts_per_token=2, max_length=64, norm_eps=1e-5, rope_theta=5e4,
)  # fmt: skip
DENSE = CONFIG.replace(dense=True, num_experts=1, num_experts_per_token=1, tie_embeddings=True, sliding_window=9)
SMALL = CONFIG.replace(hidden_size=8, intermediate_size=12, head_dim=6)


def tensors_of(config: ModelConfig, params: Params, old: bool = False) -> dict[str, np.ndarray]:
    """Arrays by GGUF's names."""
    found = {"token_embd": params.tok_embeddings, "output_norm": params.norm}
    if params.output is not None:
        found["output"] = params.output
    for i, layer in enumerate(params.layers):
        a, f, at = layer.attention, layer.feed_forward, f"blk.{i}."
        found |= {f"{at}attn_norm": layer.attention_norm, f"{at}ffn_norm": layer.ffn_norm}
        found[f"{at}attn_q"] = interleaved(a.wq, config.num_heads)
        found[f"{at}attn_k"] = interleaved(a.wk, config.num_kv_heads)
        found |= {f"{at}attn_v": a.wv, f"{at}attn_output": a.wo}
        experts = {"gate": f.w1, "down": f.w2, "up": f.w3}
        if config.dense:
            found |= {f"{at}ffn_{name}": w[0] for name, w in experts.items()}
            continue
        found[f"{at}ffn_gate_inp"] = f.gate
        if old:
            found |= {f"{at}ffn_{name}.{e}": w[e] for name, w in experts.items() for e in range(config.num_experts)}
        else:
            found |= {f"{at}ffn_{name}_exps": np.stack(list(w)) for name, w in experts.items()}
    return {f"{name}.weight": np.ascontiguousarray(w) for name, w in found.items()}


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    found = {
        "block_count": config.num_layers, "context_length": config.max_length, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "rope.freq_base": config.rope_theta, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if config.sliding_window is not None:
        found["attention.sliding_window"] = config.sliding_window
    if not config.dense:
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_token}
    return {f"llama.{key}": value for key, value in found.items()}


def write(
    path: Path,
    config: ModelConfig = SMALL,
    params: Params | None = None,
    kind: str = "F32",
    *,
    old: bool = False,
    change: Callable[[dict[str, Any]], Any] = lambda metadata: None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A file as llama.cpp's converters write it: matrices of one kind, norms in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = metadata_of(config)
    change(metadata)
    for key, value in metadata.items():
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(config.vocab_size)])
    writer.add_bos_token_id(3)
    for name, w in (tensors or tensors_of(config, params or model(config), old)).items():
        if w.dtype == np.uint8:
            writer.add_tensor(name, w, raw_dtype=KINDS[kind])
        elif w.ndim == 1 or kind == "F32":
            writer.add_tensor(name, w.astype(np.float32), raw_dtype=KINDS.F32)
        else:
            writer.add_tensor(name, gguf.quants.quantize(w.astype(np.float32), KINDS[kind]), raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, kind: type[checkpoint.CheckpointError], *words: str) -> None:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load_params(path)
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message, message


# ---- what is read


@pytest.mark.parametrize("old", [False, True], ids=["joined", "one by one"])
@pytest.mark.parametrize("config", [SMALL, DENSE], ids=["moe", "dense"])
def test_a_file_in_full_precision_is_read_bit_for_bit(tmp_path: Path, config: ModelConfig, old: bool) -> None:
    path = write(tmp_path / "x.gguf", config, old=old)
    for place in (path, tmp_path):
        loaded, params = checkpoint.load_params(place)
        assert loaded == config.replace(bos_id=3) == checkpoint.read_config(place)
        assert same_bits(params, model(config))
        assert checkpoint.verify(place) == []
    copied = sum(w.nbytes for name, w in named(params) if name.endswith((".wq", ".wk")))
    assert MappedFiles(params).copied_bytes == copied == checkpoint.copied_bytes(path)


def test_half_precision_is_kept_or_widened(tmp_path: Path) -> None:
    params = model(SMALL, "bfloat16")
    loaded = checkpoint.load_params(write(tmp_path / "b.gguf", params=params, kind="BF16"))[1]
    assert loaded.output is not None and loaded.output.dtype == "bfloat16"
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(named(loaded), named(params), strict=True))
    params = model(SMALL, np.float16)
    loaded = checkpoint.load_params(write(tmp_path / "h.gguf", params=params, kind="F16"))[1]
    assert {w.dtype for _, w in named(loaded)} == {np.dtype(np.float32)}
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(named(loaded), named(params), strict=True))


# Largest error of a number, as a share of the largest of its block: half a step of the grid. To that comes what
# rounding to float16 does: 2^-11 of the minimum, and of the range, which is at most twice the largest.
STEPS = {"Q8_0": 1 / 254, "Q5_1": 1 / 31, "Q5_0": 1 / 16, "Q4_1": 1 / 15, "Q4_0": 1 / 8}


@pytest.mark.parametrize("old", [False, True], ids=["joined", "one by one"])
@pytest.mark.parametrize("kind", STEPS)
def test_blocks_are_unpacked_where_they_belong(tmp_path: Path, kind: str, old: bool) -> None:
    path = write(tmp_path / "x.gguf", CONFIG, kind=kind, old=old)
    for (name, got), (_, stored) in zip(named(checkpoint.load_params(path)[1]), named(model(CONFIG)), strict=True):
        assert got.dtype == np.float32
        blocks = stored.reshape(-1, 32) if stored.ndim > 1 and not name.endswith("norm") else stored.reshape(-1, 1)
        bound = np.abs(blocks).max(axis=1, keepdims=True) * (STEPS[kind] + 3 * 2**-11 if stored.ndim > 1 else 0)
        assert (np.abs(got.reshape(blocks.shape) - blocks) <= bound).all(), name
        if stored.ndim > 1:
            assert not np.array_equal(got, stored)


def q4_k(block: bytes) -> list[float]:
    """256 numbers of one block: eight groups of 32, each with a scale and a minimum of six bits."""
    d, least = (float(x) for x in np.frombuffer(block[:4], np.float16))
    q, qs, out = block[4:16], block[16:], []
    for group in range(8):
        if group < 4:
            scale, minimum = q[group] & 63, q[group + 4] & 63
        else:
            scale = q[group + 4] & 15 | (q[group - 4] >> 6) << 4
            minimum = q[group + 4] >> 4 | (q[group] >> 6) << 4
        shift = 4 * (group % 2)
        for i in range(32):
            out.append(d * scale * (qs[32 * (group // 2) + i] >> shift & 15) - least * minimum)
    return out


def q6_k(block: bytes) -> list[float]:
    """256 numbers of one block: sixteen groups of 16, each with a scale; four low bits here, two high bits there."""
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = float(np.frombuffer(block[208:], np.float16)[0])
    out = []
    for n in range(256):
        half, quarter, i = n // 128, n % 128 // 32, n % 32
        nibble = low[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
        bits = high[32 * half + i] >> 2 * quarter & 3
        out.append(d * int(scales[n // 16]) * ((nibble | bits << 4) - 32))
    return out


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Bytes of a tensor in a K-quant: anything goes, but for the scales in float16, which are finite."""
    block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    offsets = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in offsets:
        scale = rng.uniform(0.001, 0.01, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_unpacked_where_they_belong(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    config = CONFIG.replace(num_layers=1)
    tensors = {
        name: w if w.ndim == 1 else random_blocks(rng, w.shape, kind)
        for name, w in tensors_of(config, model(config)).items()
    }
    path = write(tmp_path / "x.gguf", config, kind=kind, tensors=tensors)
    assert checkpoint.verify(path) == []
    assert {info.kind for info in checkpoint.headers(path).tensors} == {"float32", kind}
    params = dict(named(checkpoint.load_params(path)[1]))
    found = {
        "blk.0.attn_v.weight": params["layers.0.attention.wv"],
        "blk.0.attn_k.weight": interleaved(params["layers.0.attention.wk"], config.num_kv_heads),
        "blk.0.ffn_down_exps.weight": np.stack([params[f"layers.0.feed_forward.experts.{e}.w2"] for e in range(3)]),
        "blk.0.ffn_up_exps.weight": np.stack([params[f"layers.0.feed_forward.experts.{e}.w3"] for e in range(3)]),
    }
    naive = {"Q4_K": q4_k, "Q6_K": q6_k}.get(kind)
    for name, got in found.items():
        np.testing.assert_array_equal(got, gguf.quants.dequantize(tensors[name], KINDS[kind]))
        if naive is not None:
            raw = tensors[name].reshape(-1, gguf.GGML_QUANT_SIZES[KINDS[kind]][1])
            for i in (0, len(raw) // 2, len(raw) - 1):
                np.testing.assert_allclose(got.reshape(-1, 256)[i], naive(raw[i].tobytes()), rtol=1e-5, atol=1e-6)


def test_it_runs_and_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.gguf", CONFIG, kind="Q8_0")
    first = minimoe.load(path, backend="numpy")
    assert first.tokenizer is None
    for layout in ("hf", "stacked"):
        assert main(["convert", str(path), str(tmp_path / layout), "--layout", layout]) == 0
        second = minimoe.load(tmp_path / layout, backend="numpy")
        assert second.config == first.config
        assert same_bits(second.params, first.params)
        np.testing.assert_array_equal(second.forward([1, 2, 40]), first.forward([1, 2, 40]))
    capsys.readouterr()
    assert main(["info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "gguf" and told["dtypes"]["Q8_0"] == 18 and told["bytes_on_disk"] == path.stat().st_size
    assert main(["info", str(path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "for files that you trust" in out and "without NaN or Inf" in out


def test_safetensors_go_before_a_file_beside_them(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, SMALL, model(SMALL, seed=1))
    path = write(tmp_path / "x.gguf")
    assert same_bits(checkpoint.load_params(tmp_path)[1], model(SMALL, seed=1))
    assert same_bits(checkpoint.load_params(path)[1], model(SMALL))


# ---- what metadata may leave open, and what is refused


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"llama.attention.head_count_kv": None}, "num_kv_heads", 4),
        ({"llama.rope.freq_base": None}, "rope_theta", 1e4),
        ({"llama.vocab_size": None}, "vocab_size", 48),
        ({"llama.attention.head_count_kv": [2, 2]}, "num_kv_heads", 2),
        ({"llama.attention.key_length": None, "llama.attention.value_length": None, "llama.rope.dimension_count": None},
         "head_dim", 2),
        ({"llama.rope.scaling.type": "none", "llama.expert_weights_norm": True}, "rope_theta", 5e4),
        ({"tokenizer.ggml.eos_token_id": 7}, "eos_id", 7),
        ({"general.name": "x", "general.file_type": 1}, "norm_eps", 1e-5),
    ],
)  # fmt: skip
def test_what_metadata_leave_open(tmp_path: Path, change: dict[str, Any], field: str, value: Any) -> None:
    config = checkpoint.read_config(write(tmp_path / "x.gguf", change=lambda metadata: edit(metadata, change)))
    assert getattr(config, field) == value


def edit(metadata: dict[str, Any], change: dict[str, Any]) -> None:
    metadata.update(change)
    for key in [key for key, value in change.items() if value is None]:
        del metadata[key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "qwen3moe"}, "general.architecture must be llama, not qwen3moe"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = yarn"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
        ({"llama.attention.head_count_kv": [2, 4]}, "llama.attention.head_count_kv differs between layers"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple of num_kv_heads (K = 3)"),
        ({"llama.embedding_length": "wide"}, "hidden_size must be an integer"),
        ({"llama.attention.head_count": 0, "llama.attention.key_length": None}, "num_heads must be an integer"),
        ({"split.count": 3}, "is one of 3 parts"),
    ],
)
def test_metadata_of_another_model(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.gguf", change=lambda metadata: edit(metadata, change))
    refused(path, checkpoint.ConfigFileError, "x.gguf", words)


def test_tensors_that_are_missing_extra_or_transposed_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(SMALL, model(SMALL))
    del tensors["blk.1.ffn_norm.weight"]
    tensors["rope_freqs.weight"] = np.ones(3, np.float32)
    tensors["blk.0.ffn_up_exps.weight"] = np.swapaxes(tensors["blk.0.ffn_up_exps.weight"], 1, 2).copy()
    refused(
        write(tmp_path / "x.gguf", tensors=tensors), checkpoint.TensorMismatchError, "missing (1): blk.1.ffn_norm",
        "extra (1): rope_freqs.weight", "transposed (1): blk.0.ffn_up_exps.weight is (3, 8, 12), should be (3, 12, 8)",
    )  # fmt: skip


def test_other_ways_of_packing_are_refused_by_name(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG, model(CONFIG))
    block, size = gguf.GGML_QUANT_SIZES[KINDS.IQ4_XS]
    tensors["blk.1.attn_v.weight"] = np.zeros((128, 256 // block * size), np.uint8)
    path = write(
        tmp_path / "x.gguf", CONFIG, kind="IQ4_XS", tensors={k: w for k, w in tensors.items() if "_v" in k and "1" in k}
    )
    refused(path, checkpoint.UnsupportedTypeError, "tensor blk.1.attn_v.weight is IQ4_XS", "Q4_K")


def test_damaged_files_and_several(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    whole = path.read_bytes()
    for data in (b"", b"GGUF", b"version https://git-lfs", whole[:40], whole[: len(whole) // 2], whole[:-4000]):
        path.write_bytes(data)
        refused(path, checkpoint.DamagedFileError, "x.gguf: not a whole GGUF file", "that you trust")
    write(tmp_path / "x.gguf")
    write(tmp_path / "y.gguf")
    refused(tmp_path, checkpoint.LayoutError, "holds 2 GGUF files", "x.gguf, y.gguf")
    refused(tmp_path / "z.gguf", checkpoint.MissingFileError, "z.gguf: there is no such folder")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, checkpoint.LayoutError, "pip install 'minimoe[gguf]'", "that you trust")
