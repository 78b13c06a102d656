"""Conversion loses nothing, takes the memory of one tensor, and is atomic; random checkpoints are those of `random`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minimoe
from minimoe import checkpoint
from minimoe.checkpoint.layouts import LAYOUTS
from minimoe.cli import main
from minimoe.config import BALANCE_FORMS, ModelConfig, preset
from minimoe.params import named, random
from tests import small
from tests.checkpoint.folders import DENSE, MOE, model, same_bits
from tests.checkpoint.test_layouts import made


def hashes(folder: Path) -> dict[str, str]:
    """A digest of every parameter, as it is loaded: name, type, shape and bits."""
    return {
        name: hashlib.sha256(f"{w.dtype} {w.shape}".encode() + np.ascontiguousarray(w).tobytes()).hexdigest()
        for name, w in named(checkpoint.load_params(folder)[1])
    }


@st.composite
def configs(draw: Any) -> ModelConfig:
    dense, K = draw(st.booleans()), draw(st.integers(1, 3))
    E = 1 if dense else draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(3, 9)), hidden_size=draw(st.integers(1, 9)), num_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 9)), num_heads=K * draw(st.integers(1, 3)), num_kv_heads=K,
        head_dim=2 * draw(st.integers(1, 4)), num_experts=E, num_experts_per_token=draw(st.integers(1, E)), dense=dense,
        sliding_window=draw(st.none() | st.integers(1, 9)), tie_embeddings=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e7)), norm_eps=draw(st.floats(1e-9, 1e-2)), max_length=draw(st.integers(1, 99)),
        balance_form=draw(st.sampled_from(BALANCE_FORMS)), balance_coefficient=draw(st.floats(0, 1)),
        router_jitter=draw(st.floats(0, 0.9)), bos_id=draw(st.none() | st.integers(0, 2)),
    )  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs(),
    route=st.permutations(list(LAYOUTS)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    size=st.sampled_from([400, 10**9]),
)
def test_a_round_trip_through_all_layouts_keeps_every_bit(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, route: list[str], dtype: str, size: int
) -> None:
    base = tmp_path_factory.mktemp("trip")
    checkpoint.save(base / "first", config, model(config, np.dtype(dtype)), max_shard_bytes=size)
    expected, last = hashes(base / "first"), base / "first"
    for i, layout in enumerate([*route, "hf"]):
        assert checkpoint.convert(last, base / str(i), layout=layout, max_shard_bytes=size) == config
        last = base / str(i)
        assert hashes(last) == expected
        assert checkpoint.read_config(last) == config
        assert {str(info.dtype) for info in checkpoint.headers(last).tensors} == {dtype}
    shutil.rmtree(base)


def test_what_is_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", MOE, model())
    checkpoint.convert(tmp_path / "a", tmp_path / "b", layout="stacked")
    checkpoint.convert(tmp_path / "b", tmp_path / "c")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_another_number_format_is_a_cast(tmp_path: Path, dtype: str) -> None:
    made(tmp_path / "a", "mistral")
    config = checkpoint.convert(tmp_path / "a", tmp_path / "b", layout="fused", dtype=dtype)
    assert {str(info.dtype) for info in checkpoint.headers(tmp_path / "b").tensors} == {dtype}
    kind = np.dtype(dtype)
    for (_, got), (_, stored) in zip(
        named(checkpoint.load_params(tmp_path / "b")[1]), named(model(config)), strict=True
    ):
        np.testing.assert_array_equal(got, stored.astype(kind).astype(got.dtype))
    with pytest.raises(checkpoint.UnsupportedTypeError, match=r"dtype must be one of float64, .*, not int8"):
        checkpoint.convert(tmp_path / "a", tmp_path / "c", dtype="int8")


def test_values_that_would_overflow_are_refused(tmp_path: Path) -> None:
    params = model()
    params.layers[1].attention.wo[2, 3] = -1e5
    checkpoint.save(tmp_path / "a", MOE, params)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    with pytest.raises(checkpoint.SaveError, match=r"layers\.1\.attention\.wo: holds 100000, which float16 cannot"):
        checkpoint.convert(tmp_path / "a", tmp_path / "c", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    params.layers[1].attention.wo[2, 3] = np.inf  # it was infinite before: that is --verify's to say
    checkpoint.save(tmp_path / "a", MOE, params)
    checkpoint.convert(tmp_path / "a", tmp_path / "c", dtype="float16")


def test_a_checkpoint_may_be_converted_where_it_is(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "stacked")
    expected = hashes(folder)
    (folder / "README.md").write_text("card")
    for layout in ("hf", "mistral"):
        checkpoint.convert(folder, folder, layout=layout)
        assert hashes(folder) == expected
        assert checkpoint.headers(folder).layout.name == layout
    assert sorted(os.listdir(folder)) == ["README.md", "consolidated.safetensors", "params.json"]


def test_the_tokenizer_goes_along_and_training_state_does_not(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "mistral")
    for name in ("tokenizer.model", "tokenizer.json", "generation_config.json", "training_state.safetensors", "x.py"):
        (folder / name).write_text(name)
    checkpoint.convert(folder, tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    assert (tmp_path / "b/tokenizer.json").read_text() == "tokenizer.json"


def test_a_source_that_is_not_whole_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "mistral")
    checkpoint.save(tmp_path / "b", MOE, model())
    tensors = safetensors.numpy.load_file(folder / "consolidated.safetensors")
    del tensors["norm.weight"]
    safetensors.numpy.save_file(tensors, folder / "consolidated.safetensors")
    with pytest.raises(checkpoint.TensorMismatchError, match="missing"):
        checkpoint.convert(folder, tmp_path / "b")
    assert same_bits(checkpoint.load_params(tmp_path / "b")[1], model())
    made(tmp_path / "c", "mistral")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(tmp_path / "c", tmp_path / "b", progress=interrupt)
    assert same_bits(checkpoint.load_params(tmp_path / "b")[1], model())
    assert sorted(os.listdir(tmp_path)) == ["b", "c", "m"]


WIDE = MOE.replace(hidden_size=256, intermediate_size=384, num_layers=4, num_experts=8, vocab_size=512)


def peak(work: Any) -> int:
    """Most bytes that Python and NumPy had allocated at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Largest: embeddings, 0.5 MB in float32. Whole: 40 MB. A copy, a cast and its check take three at most."""
    checkpoint.initialise(tmp_path / "hf", WIDE, dtype="float32")
    largest, whole = 4 * 512 * 256, 4 * WIDE.num_parameters()
    assert whole > 60 * largest
    last = "hf"
    for layout in ("fused", "stacked", "mistral", "hf"):
        took = peak(lambda: checkpoint.convert(tmp_path / last, tmp_path / layout, layout=layout))  # noqa: B023
        assert took < 2 * largest + 1_000_000, (layout, took)
        last = layout
    assert peak(lambda: checkpoint.convert(tmp_path / "hf", tmp_path / "b", dtype="bfloat16")) < 4 * largest + 10**6
    assert peak(lambda: checkpoint.initialise(tmp_path / "i", WIDE, layout="fused")) < 4 * largest + 10**6


# ---- random checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_random_checkpoint_is_that_of_random(tmp_path: Path, layout: str) -> None:
    for config, dtype in ((MOE, "float32"), (DENSE, "bfloat16")):
        checkpoint.initialise(tmp_path / "m", config, 3, layout=layout, dtype=dtype)
        loaded, params = checkpoint.load_params(tmp_path / "m")
        assert loaded == config
        assert same_bits(params, random(config, 3, np.dtype(dtype)))
    checkpoint.initialise(tmp_path / "n", MOE, 4)
    assert not same_bits(checkpoint.load_params(tmp_path / "n")[1], random(MOE, 3, np.dtype("bfloat16")))


# ---- the commands

TINY = ["--hidden-size", "32", "--head-dim", "8", "--heads", "4", "--kv-heads", "2", "--intermediate-size", "24"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as end:  # of the parser
        status = end.code
    return status, *capsys.readouterr()


def test_init_and_convert_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "init", tmp_path / "m", "--preset", "mixtral-8x7b", "--layers", 2, *TINY, "--vocab-size", 1024,
        "--experts", 4, "--seed", 5, "--dtype", "float32", "--layout", "stacked", "--shard-size", "0.1MB",
        "--tokenizer", small.TOKENIZER, "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    config = preset("mixtral-8x7b").replace(
        num_layers=2, hidden_size=32, head_dim=8, num_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=1024,
        num_experts=4,
    )  # fmt: skip
    told = json.loads(out)
    assert told["layout"] == "stacked" and told["dtypes"] == ["float32"] and len(told["files"]) > 2
    assert told["bytes"] == 4 * config.num_parameters() == 4 * told["parameters"]
    first = minimoe.load(tmp_path / "m", backend="numpy")
    assert first.config == config and first.tokenizer is not None
    status, out, _ = run(capsys, "convert", tmp_path / "m", tmp_path / "b", "--layout", "fused", "--dtype", "bfloat16")
    assert (
        status == 0
        and out.startswith(f"wrote {tmp_path / 'b'}: ")
        and "bfloat16, layout fused, 0.2 MB in 1 file" in out
    )
    second = minimoe.load(tmp_path / "b", backend="numpy")
    assert second.tokenizer is not None
    np.testing.assert_array_equal(second.params.norm, first.params.norm.astype("bfloat16"))
    assert main(["convert", "tiny", str(tmp_path / "t"), "--layout", "mistral"]) == 0
    assert same_bits(minimoe.load(tmp_path / "t").params, minimoe.load("tiny").params)
    logits = [minimoe.load(folder, backend="numpy").forward([1, 5, 7]) for folder in ("tiny", tmp_path / "t")]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "nowhere", "x"], "nowhere: there is no such folder"),
        (["convert", "tiny", "x", "--layout", "gguf"], "unknown layout gguf; those that are written are hf"),
        (["convert", "tiny", "x", "--dtype", "int8"], "dtype must be one of float64"),
        (["convert", "tiny", "x", "--shard-size", "5 apples"], "--shard-size must be a size such as 500MB or 5GB"),
        (["convert", "tiny", "x", "--shard-size", "0"], "--shard-size must be a size"),
        (["convert", "tiny", "file"], "is a file"),
        (["init", "x"], "--preset"),
        (["init", "x", "--preset", "giant"], "unknown preset 'giant'"),
        (["init", "x", "--preset", "tiny", "--seed", "-1"], "--seed must be at least 0"),
        (["init", "x", "--preset", "tiny", "--heads", "3"], "num_heads (H = 3) must be a multiple"),
        (["init", "x", "--preset", "tiny", "--layers", "0"], "num_layers must be an integer"),
        (["init", "x", "--preset", "mixtral-8x22b", "--layers", "100000"], "are free"),
        (["init", "x", "--preset", "tiny", "--tokenizer", "none"], "none"),
        (["init", "x", "--preset", "mistral-7b", "--tokenizer", str(small.TOKENIZER)], "add --vocab-size 1024"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("minimoe: error: ") and err.count("\n") == 1
    assert words in err
    assert os.listdir(tmp_path) == ["file"]
