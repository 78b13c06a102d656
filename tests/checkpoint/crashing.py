"""Programs that `test_atomic` runs in processes of their own, because they die: python -m tests.checkpoint.crashing."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from minimoe import checkpoint
from minimoe.checkpoint import atomic
from tests.checkpoint.folders import MOE, model, same_bits

# What the file system is asked to do; Python announces each before it does it.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.listdir", "os.scandir",
          "ctypes.dlsym", "fcntl.flock")  # fmt: skip
CONFIGS = {"old": MOE, "new": MOE.replace(norm_eps=0.25, num_layers=3)}
SHARD_BYTES = {"old": 4000, "new": 10**9}


def put(folder: Path, version: str) -> None:
    """Save one of two checkpoints that differ in everything."""
    tokenizer = folder.parent.parent / f"{version}.model"
    checkpoint.save(folder, CONFIGS[version], model(CONFIGS[version], seed=len(version) + ord(version[0])),
                    tokenizer_file=tokenizer, max_shard_bytes=SHARD_BYTES[version])  # fmt: skip


def put_converted(folder: Path, version: str) -> None:
    """As `put`, by `convert` from a checkpoint in another layout, which is made where it is not there yet."""
    source = folder.parent.parent / f"{version}-{os.getpid()}"
    if not source.exists():
        checkpoint.save(source, CONFIGS[version], model(CONFIGS[version], seed=len(version) + ord(version[0])),
                        layout="mistral", tokenizer_file=folder.parent.parent / f"{version}.model")  # fmt: skip
    checkpoint.convert(source, folder, max_shard_bytes=SHARD_BYTES[version])


def version_of(folder: Path) -> str:
    """Which of the two lies there; an error if it is neither, or a mix."""
    config, params = checkpoint.load_params(folder)
    (version,) = (name for name, known in CONFIGS.items() if known == config)
    assert same_bits(params, model(config, seed=len(version) + ord(version[0])))
    return version


def check(folder: Path) -> str:
    """As `version_of`, with the files that `load_params` does not read."""
    version = version_of(folder)
    there = folder if folder.exists() else atomic.backup_of(folder)
    assert (there / "tokenizer.model").read_bytes() == version.encode()
    assert (there / "README.md").read_text() == "card"
    return version


def crash_at(point: int, kind: str, folder: Path) -> int:
    """Save in a forked process that dies, or is interrupted, at one point; return its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = itertools.count(point, -1)

    def hook(event: str, _: object) -> None:
        if event in EVENTS and next(left) == 0:
            if kind == "kill":
                os._exit(9)
            raise KeyboardInterrupt

    sys.addaudithook(hook)
    try:
        put(folder, "new")
    except KeyboardInterrupt:
        os._exit(9)
    os._exit(0)


def points(folder: Path, kind: str) -> None:
    """Crash at every point of a save, one after the other; after each, the folder must be whole."""
    found = []
    for point in itertools.count():
        put(folder, "old")
        assert os.listdir(folder.parent) == [folder.name], os.listdir(folder.parent)
        assert check(folder) == "old"
        status = crash_at(point, kind, folder)
        assert status in (0, 9), status
        found.append(check(folder))
        if kind == "interrupt":
            assert os.listdir(folder.parent)[0] == folder.name or len(os.listdir(folder.parent)) == 2
        if status == 0:
            break
    assert found == sorted(found, reverse=True), "new, then old again"
    print(len(found), found.count("old"))


def loop(folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write one and the other until killed."""
    for version in CONFIGS:
        write(folder, version)
    print("ready", flush=True)
    for version in itertools.cycle(CONFIGS):
        write(folder, version)


if __name__ == "__main__":
    program, path, how, what = sys.argv[1:]
    os.fsync = lambda fd: (
        None
    )  # a killed process, unlike a failing power supply, loses nothing; `test_atomic` has its own
    if how == "rename":
        atomic._exchange = lambda a, b: False
    if program == "points":
        points(Path(path), what)
    else:
        loop(Path(path), {"save": put, "convert": put_converted}[what])
