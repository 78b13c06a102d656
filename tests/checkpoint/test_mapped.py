"""Files under a running model: removed or replaced they stay what they were; written to, they are refused."""

import gc
import json
import os
import shutil

import numpy as np
import pytest

import minimoe
from minimoe import checkpoint, cli
from minimoe.checkpoint import ChangedFileError, mapped
from tests import small

IDS = np.array([1, 5, 9, 200])


@pytest.fixture
def folder(tmp_path):
    return small.save(tmp_path / "model")


def weights(folder):
    return folder / "model.safetensors"


def write_later(path, change):
    """Change a file, at a time that no file system's clock confuses with that of its making."""
    with path.open("r+b") as file:
        change(file)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def spoil(file):
    file.seek(-2, os.SEEK_END)
    file.write(b"\x00\x40")


def lengthen(file):
    file.seek(0, os.SEEK_END)
    file.write(b"\x00" * 100)


CALLS = {
    "forward": lambda model: model.forward(IDS),
    "generate": lambda model: model.generate("a", max_new_tokens=2),
    "generate_ids": lambda model: model.generate_ids(IDS, max_new_tokens=2),
    "trace": lambda model: model.trace(IDS),
    "loss_and_grads": lambda model: model.loss_and_grads(IDS),
    "save": lambda model: model.save("copy"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_changed_file_is_refused_before_every_call(folder, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    model = minimoe.load(folder, backend="numpy")
    CALLS[call](model)
    write_later(weights(folder), spoil)
    with pytest.raises(ChangedFileError, match=r"model\.safetensors: the file was changed while .*mmap=F"):
        CALLS[call](model)


def test_a_file_of_another_size_is_refused_with_both_sizes_even_at_the_same_time_of_change(folder):
    model = minimoe.load(folder, backend="numpy")
    before = weights(folder).stat()
    write_later(weights(folder), lengthen)
    os.utime(weights(folder), ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChangedFileError, match=rf"had {before.st_size:,} bytes, and has {before.st_size + 100:,}"):
        model.forward(IDS)


def test_a_change_between_two_tokens_ends_the_stream(folder):
    pieces = minimoe.load(folder, backend="numpy").generate("a", max_new_tokens=40, stream=True)
    next(pieces)
    write_later(weights(folder), spoil)
    with pytest.raises(ChangedFileError):
        list(pieces)


def test_wrong_settings_are_named_at_once_and_not_when_the_stream_is_read(folder):
    with pytest.raises(ValueError, match="temperature"):
        minimoe.load(folder, backend="numpy").generate("a", temperature=-1, stream=True)


@pytest.mark.parametrize("change", ["removed", "replaced", "renamed"])
def test_a_file_that_is_no_longer_there_keeps_working(folder, change):
    model = minimoe.load(folder, backend="numpy")
    before = model.forward(IDS)
    if change == "removed":
        shutil.rmtree(folder)
    elif change == "replaced":
        small.save(folder, change=lambda tree: tree.norm.fill(0.5))
    else:
        folder.rename(folder.with_name("other"))
    np.testing.assert_array_equal(model.forward(IDS), before)


def test_weights_read_into_memory_do_not_see_the_file_change(folder):
    model = minimoe.load(folder, backend="numpy", mmap=False)
    before = model.forward(IDS)
    np.testing.assert_array_equal(before, minimoe.load(folder, backend="numpy").forward(IDS))
    write_later(weights(folder), lambda file: file.truncate(100))
    np.testing.assert_array_equal(model.forward(IDS), before)


def test_without_mmap_no_file_is_mapped_at_any_moment_and_the_command_says_so(folder, monkeypatch, capsys):
    def generate(*flags):
        arguments = ["generate", "a", "--model", str(folder), "--max-new-tokens", "3", "--backend", "numpy"]
        assert cli.main([*arguments, "--stats", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    mapped_run = generate()
    assert mapped_run["stats"]["mapped_bytes"] == weights(folder).stat().st_size
    monkeypatch.setattr("minimoe.checkpoint.tensors.map_file", None)
    copied_run = generate("--no-mmap")
    assert copied_run["stats"]["mapped_bytes"] == 0 and copied_run["text"] == mapped_run["text"]
    assert not checkpoint.MappedFiles(minimoe.load(folder, backend="numpy", mmap=False).params).files


def test_a_file_that_shrinks_while_it_is_read_into_memory_is_an_error(folder, monkeypatch):
    matched = checkpoint.reading.match

    def shrink(*given):
        os.truncate(weights(folder), 3000)
        return matched(*given)

    monkeypatch.setattr(checkpoint.reading, "match", shrink)
    with pytest.raises(checkpoint.DamagedFileError, match="became shorter while it was read"):
        minimoe.load(folder, backend="numpy", mmap=False)


def test_weights_that_were_all_converted_are_not_looked_for_in_the_file(folder):
    model = minimoe.load(folder, backend="numpy", dtype="float64")
    write_later(weights(folder), spoil)
    model.forward(IDS)


def test_a_call_asks_once_for_each_file(folder, monkeypatch):
    _, params = checkpoint.load_params(folder)
    other = checkpoint.load_params(folder)[1]
    params.layers[1], params.norm = other.layers[1], other.norm
    files = mapped.MappedFiles(params)
    asked = []
    monkeypatch.setattr(mapped.os, "fstat", lambda fd, fstat=os.fstat: asked.append(fd) or fstat(fd))
    files.check()
    assert len(files) == len(asked) == len(set(asked)) == 2
    assert files.nbytes == 2 * weights(folder).stat().st_size


def test_descriptors_are_given_back_with_the_last_view(folder):
    with (weights(folder)).open("rb") as file:
        mapping = mapped.map_file(file, "a file")
    fd, view = mapping.fd, np.frombuffer(mapping, np.uint8)[100:]
    del mapping
    gc.collect()
    os.fstat(fd)
    del view
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_in_use_tells_what_was_allocated_from_what_is_mapped(tmp_path):
    size = 64 << 20
    before = checkpoint.memory_in_use()
    if before is None:
        pytest.skip("the system does not say (no /proc/self/status)")
    held = np.ones(size, np.uint8)
    with_array = checkpoint.memory_in_use()
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        data = np.frombuffer(mapped.map_file(file, "a file"), np.uint8)
    assert not data.any()
    with_both = checkpoint.memory_in_use()
    assert with_array["anonymous"] - before["anonymous"] > 0.9 * held.nbytes
    assert with_both["files"] - with_array["files"] > 0.9 * size
    assert abs(with_both["anonymous"] - with_array["anonymous"]) < 0.1 * size
    assert with_both["peak"] >= with_both["anonymous"]
