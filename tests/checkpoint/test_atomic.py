"""Whatever interrupts a save, the folder holds the old checkpoint or the new one, whole."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe import checkpoint
from minimoe.checkpoint import atomic
from tests.checkpoint.crashing import check, put, version_of
from tests.checkpoint.folders import MOE, model, same_bits

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MINIMOE_KILLS", 0))  # at random moments, instead of a few: 200 take minutes
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The old checkpoint, with a file in it that is not ours, alone in its parent."""
    for version in ("old", "new"):
        (tmp_path / f"{version}.model").write_text(version)
    path = tmp_path / "parent/m"
    put(path, "old")
    (path / "README.md").write_text("card")
    return path


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.checkpoint.crashing", *arguments]


@pytest.mark.parametrize("how", ["swap", "rename"])
@pytest.mark.parametrize("kind", ["kill", "interrupt"])
def test_a_crash_at_any_step_of_a_save_leaves_old_or_new(folder: Path, kind: str, how: str) -> None:
    command = program("points", str(folder), how, kind)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, old = map(int, done.stdout.split())
    assert steps > 30
    assert 10 < old < steps


@pytest.mark.parametrize(
    ("what", "how", "kills"),
    [
        ("save", "swap", KILLS or 8), ("save", "rename", KILLS or 5), ("convert", "swap", KILLS or 4),
    ],
)  # fmt: skip
def test_kill_9_at_random_moments_while_two_write_and_one_reads(folder: Path, what: str, how: str, kills: int) -> None:
    rng = random.Random(kills)
    writers = 2 if how == "swap" else 1  # without the swap, two at once may refuse each other
    for _ in range(kills):
        command = program("loop", str(folder), how, what)
        children = [
            subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(writers)
        ]
        try:
            for child in children:
                assert child.stdout.readline() == b"ready\n", child.stderr.read()
            end = time.monotonic() + rng.uniform(0, 0.1)
            while time.monotonic() < end:
                version_of(folder)
        finally:
            for child in children:
                child.kill()
                _, errors = child.communicate()
        assert not errors, errors
        check(folder)
    put(folder, "old")
    assert os.listdir(folder.parent) == ["m"]
    assert check(folder) == "old"


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minimoe.checkpoint.writing.write_tensors", full)
    with pytest.raises(checkpoint.SaveError, match=r"m: cannot be saved: No space left on device; what was there"):
        put(folder, "new")
    monkeypatch.undo()
    assert check(folder) == "old"
    assert os.listdir(folder.parent) == ["m"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB: the old checkpoint fits, and not the new one beside it."""
    disk = tmp_path / "parent"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_really_full_does_too(small_disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool) -> None:
    for version in ("old", "new"):
        (small_disk.parent / f"{version}.model").write_text(version)
    folder = small_disk / "m"
    put(folder, "old")
    (folder / "README.md").write_text("card")
    if not foreseen:  # as where others write meanwhile
        monkeypatch.setattr("minimoe.checkpoint.writing.check_space", lambda *_: None)
    with pytest.raises(checkpoint.SaveError, match="MB are free" if foreseen else "No space left on device"):
        put(folder, "new")
    assert check(folder) == "old"
    assert os.listdir(small_disk) == ["m"]


def test_a_limit_on_file_size_does_too(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(checkpoint.SaveError, match="cannot be saved: File too large"):
            put(folder, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert check(folder) == "old"
    assert os.listdir(folder.parent) == ["m"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_while_writing_leaves_the_old_checkpoint(folder: Path, error: type[BaseException]) -> None:
    def also(new: Path) -> None:
        assert (new / "model.safetensors").exists()
        raise error

    with pytest.raises(error):
        checkpoint.save(folder, MOE, model(seed=9), also=also)
    assert check(folder) == "old"
    assert os.listdir(folder.parent) == ["m"]


def test_wrong_parameters_are_refused_before_anything_is_written(folder: Path) -> None:
    params = model()
    params.norm = np.ones(17, np.float32)
    params.layers[0].attention.wq = params.layers[0].attention.wq.T
    with pytest.raises(checkpoint.TensorMismatchError, match=r"wq is \(16, 24\), .*norm is \(17,\), should be \(16,\)"):
        checkpoint.save(folder, MOE, params)
    params = model()
    params.norm = params.norm.astype(np.int32)
    with pytest.raises(checkpoint.SaveError, match="norm is int32"):
        checkpoint.save(folder, MOE, params)
    with pytest.raises(checkpoint.SaveError, match="No such file"):
        checkpoint.save(folder, MOE, model(), tokenizer_file="nowhere/tokenizer.model")
    assert check(folder) == "old"


def test_leftovers_of_killed_saves_go_and_running_ones_stay(folder: Path) -> None:
    leftover = folder.with_name(f".{folder.name}.minimoe-saving-0123")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    unrelated = folder.with_name(".m.minimoe")
    unrelated.mkdir()

    def also(new: Path) -> None:
        assert not leftover.exists()
        put(folder, "new")  # another save of the same folder, from start to end
        assert new.exists()

    checkpoint.save(folder, MOE, model(seed=9), also=also)
    assert same_bits(checkpoint.load_params(folder)[1], model(seed=9))
    assert sorted(os.listdir(folder.parent)) == [".m.minimoe", "m"]


def test_a_file_put_into_the_folder_during_a_save_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = atomic._exchange

    def late(new: Path, target: Path) -> bool:
        (target / "metrics.jsonl").write_text("{}")
        (target / "events").mkdir()
        return exchange(new, target)

    monkeypatch.setattr(atomic, "_exchange", late)
    put(folder, "new")
    assert (folder / "metrics.jsonl").read_text() == "{}"
    assert (folder / "events").is_dir()
    assert check(folder) == "new"


def test_all_has_reached_the_disk_before_the_swap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: set[int] = set()
    exchange = atomic._exchange

    def swap(new: Path, target: Path) -> bool:
        for path in [new, *new.rglob("*")]:
            assert path.stat().st_ino in synchronised, path
        synchronised.clear()
        return exchange(new, target)

    (folder / "deep").mkdir()
    (folder / "deep/a").write_text("a")
    monkeypatch.setattr(os, "fsync", lambda fd: synchronised.add(os.fstat(fd).st_ino))
    monkeypatch.setattr(atomic, "_exchange", swap)
    put(folder, "new")
    assert folder.parent.stat().st_ino in synchronised


def test_without_hard_links_other_files_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (folder / "deep").mkdir()
    (folder / "deep/a").write_text("a")
    put(folder, "new")
    assert check(folder) == "new"
    assert (folder / "deep/a").read_text() == "a"


def test_a_backup_left_by_a_kill_between_two_renames_is_read_and_put_back(folder: Path) -> None:
    folder.rename(atomic.backup_of(folder))
    assert check(folder) == "old"
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, MOE, model(), also=_interrupt)
    assert os.listdir(folder.parent) == ["m"]
    assert check(folder) == "old"


def test_what_is_wrong_with_a_backup_is_said(folder: Path) -> None:
    folder.rename(atomic.backup_of(folder))
    (atomic.backup_of(folder) / "config.json").unlink()
    with pytest.raises(checkpoint.MissingFileError, match=r"no config\.json"):
        checkpoint.load_params(folder)


def _interrupt(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["file", "link to a file", "fifo", "device"])
def test_a_target_that_is_not_a_folder_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link to a file":
        (tmp_path / "mine").write_text("mine")
        target.symlink_to("mine")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target = Path("/dev/null")
    with pytest.raises(checkpoint.SaveError, match="is a"):
        checkpoint.save(target, MOE, model())
    assert os.path.lexists(target)
    assert "file" not in kind or target.read_text() == "mine"
    assert len(os.listdir(tmp_path)) <= 2


def test_folders_that_cannot_be_replaced_as_a_whole_are_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(checkpoint.SaveError, match="a mount point"):
        checkpoint.save("/proc", MOE, model())
    monkeypatch.chdir(folder)
    for target in (folder, folder.parent, "."):
        with pytest.raises(checkpoint.SaveError, match="the current directory"):
            checkpoint.save(target, MOE, model())
    checkpoint.save("inside", MOE, model())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.SaveError, match="cannot be saved: "):
        checkpoint.save(folder / "README.md/x", MOE, model())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(checkpoint.SaveError, match="is read-only"):
        checkpoint.save(folder, MOE, model())
    assert check(folder) == "old"
    assert checkpoint.read_config(folder / "inside") == MOE


def test_any_folder_can_be_written_atomically(tmp_path: Path) -> None:
    def write(text: str) -> Any:
        return lambda new: (new / "a").write_text(text)

    checkpoint.write_folder_atomically(tmp_path / "x", write("1"))
    (tmp_path / "x/b").write_text("b")
    (tmp_path / "x/c").write_text("c")
    checkpoint.write_folder_atomically(tmp_path / "x", write("2"), keep=lambda name: name == "b")
    assert {file.name: file.read_text() for file in (tmp_path / "x").iterdir()} == {"a": "2", "b": "b"}
    checkpoint.write_folder_atomically(tmp_path / "x", write("3"))
    assert os.listdir(tmp_path / "x") == ["a"]
