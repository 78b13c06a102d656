"""`minimoe train` as a user runs it: files, interruption, resuming."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minimoe import checkpoint, texts
from minimoe.params import leaves
from minimoe.training import command

TOKENIZER = Path(command.__file__).parents[1] / "models" / "tiny" / "tokenizer.model"
FAST = ["--batch-size", "2", "--sequence-length", "32", "--warmup", "2", "--tokenizer", str(TOKENIZER)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of the shipped texts as a user's own files."""
    folder = tmp_path_factory.mktemp("texts")
    loaded = texts.load()
    for name in ("python", "json"):
        (folder / f"{name}.txt").write_text(loaded[name])
    return [str(folder / f"{name}.txt") for name in ("python", "json")]


def arguments(out: Path, files: list[str], *more: str) -> list[str]:
    """The flags of a small run."""
    return ["--out", str(out), "--text", *files, "--steps", "6", *FAST, *more]


def train(out: Path, files: list[str], *more: str) -> int:
    """Run the command in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments(out, files, *more)))


def bits(folder: Path) -> dict[str, bytes]:
    """Every tensor of a run's state."""
    return {name: t.tobytes() for name, t in checkpoint.load_tensors(folder / "state" / "state.safetensors").items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two runs' states differ."""
    a, b = bits(one), bits(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train(out, files) == 0
    return out


def test_a_finished_run_is_a_checkpoint_that_loads(whole: Path) -> None:
    config, params = checkpoint.load_params(whole / "model")
    assert config.vocab_size == 1024
    assert str(params.dtype) == "bfloat16"
    assert (whole / "model" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    state = checkpoint.load_tensors(whole / "state" / "state.safetensors")
    assert int(state["step"][0]) == 6
    for name, leaf in leaves(params):
        stored = leaf if not isinstance(leaf, list) else np.stack(leaf)
        np.testing.assert_array_equal(stored, state[f"params.{name}"].astype(stored.dtype))
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 6
    assert 0 < log[-1]["loss"] < 10


def test_interrupted_and_resumed_gives_the_same_bits(
    whole: Path, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = command.train_step

    def step_then_interrupt(*args):
        metrics = step(*args)
        if metrics.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(command, "train_step", step_then_interrupt)
    assert train(tmp_path / "run", files) == 0
    stopped = checkpoint.load_tensors(tmp_path / "run" / "state" / "state.safetensors")
    assert int(stopped["step"][0]) == 3
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(command, "train_step", step)
    assert train(tmp_path / "run", files, "--resume") == 0
    assert differing(tmp_path / "run", whole) == []
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "run")]
    assert saved[0] == saved[1]


def test_killed_without_warning_resumes_from_the_last_checkpoint(whole: Path, files: list[str], tmp_path: Path) -> None:
    """Begun by a process that reads its loops from Numba's cache; ended by this one, which may have compiled them."""
    out = tmp_path / "run"
    run = [sys.executable, "-m", "minimoe", "train", *arguments(out, files, "--save-every", "1")]
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "state" / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert (out / "state" / "state.safetensors").exists()
    assert train(out, files, "--save-every", "1", "--resume") == 0
    assert differing(out, whole) == []


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(whole: Path, files: list[str]) -> None:
    before = bits(whole)
    with pytest.raises(ValueError, match="holds a run already: add --resume"):
        train(whole, files)
    with pytest.raises(ValueError, match="other settings: peak_lr differ"):
        train(whole, files, "--resume", "--peak-lr", "0.5")
    assert bits(whole) == before


def test_bad_flags_are_named(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(tmp_path / "a", files, "--resume")
    with pytest.raises(ValueError, match="--save-every"):
        train(tmp_path / "b", files, "--save-every", "0")
    with pytest.raises(ValueError, match="--mixture must read"):
        train(tmp_path / "c", files, "--mixture", "python:3")
    with pytest.raises(ValueError, match="must name the domains json, python, not python"):
        train(tmp_path / "d", files, "--mixture", "python=1")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: no text in it"):
        train(tmp_path / "e", [str(empty)])
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"binary\.txt: not UTF-8"):
        train(tmp_path / "f", [str(binary)])
