"""Mutated files: whatever they hold, a typed error of one line, in less than a second and in little memory.

    MINIMOE_FUZZ=20000 pytest tests/checkpoint/test_fuzz.py

draws so many files of every kind instead of the few that keep the tests short.
"""

import contextlib
import copy
import gc
import json
import os
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimoe import checkpoint
from minimoe.checkpoint import CheckpointError, strict_json
from minimoe.checkpoint.mathematics import NEUTRAL
from minimoe.tokenizer import Tokenizer, TokenizerError
from minimoe.tokenizer_json import JsonTokenizer
from tests import small
from tests.checkpoint.folders import MOE, model, read_parts, write_parts

SINGLE, INDEX, CONFIG, PARAMS = "model.safetensors", "model.safetensors.index.json", "config.json", "params.json"
CONFIG_OF = MOE.replace(num_layers=1, num_experts=2)
SECONDS = 1.0  # of processor time
FACTOR, CONSTANT = 40, 500_000  # bytes of memory for each in the file, and besides

pytestmark = pytest.mark.filterwarnings("ignore:.*of unaligned tensors are copied:UserWarning")

EXAMPLES = int(os.environ.get("MINIMOE_FUZZ", 60))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

SNIPPETS = [
    b"-",
    b"9" * 30,
    b"null",
    b"[",
    b"]",
    b'"',
    b"{",
    b"{}",
    b",",
    b":",
    b"1e9",
    b"NaN",
    b"\\ud800",
    b"../",
    b"\0",
]
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 5), st.sampled_from(SNIPPETS) | st.binary(max_size=4)),
    min_size=1, max_size=3,
)  # fmt: skip
ODD = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 7, 16, 2**31, 2**62, 2**64, 10**30, 0.5, -0.0, 1e300, "", "a", "../x", "F32",
    "F8_E4M3", "\ud800\x1b[2J", "x" * 3000, [], {}, [0], [0, 64], [-4, 4], [2**62] * 8, ["../x"], {"a": 1},
    {"rope_type": "yarn"},
])  # fmt: skip
CONFIG_KEYS = st.sampled_from([*NEUTRAL, "rope_theta", "rope_parameters", "rope_scaling", "layer_types", "minimoe"])


def edited(content, edits, reach):
    """Change bytes near the start of a file, where its header is."""
    content = bytearray(content)
    for at, length, new in edits:
        at %= max(1, min(reach, len(content)))
        content[at : at + length] = new
    return bytes(content)


def replaced(tree, path, value):
    """Change one place of a JSON tree, to which the numbers of `path` lead; `...` removes it."""
    for number in path:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            return
        key = keys[number % len(keys)]
        inner = tree[key]
        if number == path[-1] or not isinstance(inner, dict | list) or not inner:
            if value is ...:
                del tree[key]
            else:
                tree[key] = copy.deepcopy(value)
            return
        tree = inner


PATHS = st.lists(st.integers(0, 60), min_size=1, max_size=4)
CHANGES = st.lists(st.tuples(PATHS, ODD | st.just(...)), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    base = tmp_path_factory.mktemp("originals")
    for name, settings_ in {
        "single": {}, "sharded": {"max_shard_bytes": 4000}, "mistral": {"layout": "mistral"},
        "fused": {"layout": "fused"}, "stacked": {"layout": "stacked"},
    }.items():  # fmt: skip
        checkpoint.save(base / name, CONFIG_OF, model(CONFIG_OF), **settings_)
    return base


@pytest.fixture(scope="module")
def work(originals, tmp_path_factory):
    """Copies that every example leaves as it found them."""
    return Path(shutil.copytree(originals, tmp_path_factory.mktemp("work") / "all"))


def examined(read, size):
    """Call a parser on files of `size` bytes: how it may end, how long it may take, how much memory it may use.

    What is too much once is measured again: an import, or a pass of the collector through all that was drawn before,
    happens once; what a file does to a parser happens each time.
    """
    for attempt in range(2):
        tracemalloc.start(1)
        start = time.process_time()
        try:
            read()
            message = ""
        except (CheckpointError, TokenizerError) as error:
            message = str(error)
        finally:
            seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if seconds < SECONDS and peak < FACTOR * size + CONSTANT:
            break
        assert attempt == 0, f"{seconds:.2f} s and {peak:,} bytes for a file of {size:,}"
    assert message.isprintable() and len(message) < 5000  # as the empty one is
    return message


def examined_folder(folder, change):
    """Let `change` damage files of a folder, read it, and put it right."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        change()
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        return examined(lambda: checkpoint.load_params(folder), size)
    finally:
        for path in folder.iterdir():
            if path not in before or path.is_symlink():
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


@fuzz
@given(layout=st.sampled_from(["single", "mistral", "fused", "stacked"]), edits=EDITS)
def test_bytes_of_a_header(work, layout, edits):
    (weights,) = (work / layout).glob("*.safetensors")
    content = edited(weights.read_bytes(), edits, 2600)
    examined_folder(work / layout, lambda: weights.write_bytes(content))


@fuzz
@given(layout=st.sampled_from(["single", "mistral", "fused", "stacked"]), changes=CHANGES)
def test_values_of_a_header(work, layout, changes):
    (weights,) = (work / layout).glob("*.safetensors")
    header, data = read_parts(weights)
    for path, value in changes:
        replaced(header, path, value)
    examined_folder(work / layout, lambda: write_parts(weights, header, data))


@fuzz
@given(layout=st.sampled_from(["single", "mistral"]), edits=EDITS)
def test_bytes_of_a_config(work, layout, edits):
    path = work / layout / (CONFIG if layout == "single" else PARAMS)
    content = edited(path.read_bytes(), edits, 1 << 20)
    examined_folder(work / layout, lambda: path.write_bytes(content))


@fuzz
@given(
    layout=st.sampled_from(["single", "mistral"]), changes=CHANGES, more=st.dictionaries(CONFIG_KEYS, ODD, max_size=2)
)
def test_values_of_a_config(work, layout, changes, more):
    path = work / layout / (CONFIG if layout == "single" else PARAMS)
    raw = json.loads(path.read_text())
    for place, value in changes:
        replaced(raw, place, value)
    examined_folder(work / layout, lambda: path.write_text(json.dumps(raw | more)))


@fuzz
@given(edits=EDITS, changes=CHANGES, by_bytes=st.booleans())
def test_an_index(work, edits, changes, by_bytes):
    path = work / "sharded" / INDEX
    raw = json.loads(path.read_text())
    if not by_bytes:
        for place, value in changes:
            replaced(raw, place, value)
    content = edited(path.read_bytes(), edits, 1 << 20) if by_bytes else json.dumps(raw).encode()
    examined_folder(work / "sharded", lambda: path.write_bytes(content))


FOLDER_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["remove", "empty", "cut", "longer", "swap", "copy", "link", "other"]),
        st.integers(0, 20), st.integers(0, 20), st.integers(0, 10_000),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def damage(folder, kind, which, other, at):
    """Change one file of a folder, or two."""
    paths = sorted(path for path in folder.iterdir() if not path.is_symlink())
    if not paths:
        return
    one, two = paths[which % len(paths)], paths[other % len(paths)]
    match kind:
        case "remove":
            one.unlink()
        case "empty":
            one.write_bytes(b"")
        case "cut":
            one.write_bytes(one.read_bytes()[:at])
        case "longer":
            one.write_bytes(one.read_bytes() + b"x" * at)
        case "swap" if one != two:
            one.rename(folder / "aside")
            two.rename(one)
            (folder / "aside").rename(two)
        case "copy" if one != two:
            two.write_bytes(one.read_bytes())
        case "link" if one != two:
            one.unlink()
            one.symlink_to(two.name if at % 2 else "../outside")
        case "other":
            names = ["consolidated.safetensors", PARAMS, SINGLE, INDEX, "x.bin", "model-00001-of-00002.safetensors"]
            name = folder / names[at % len(names)]
            if not name.is_symlink():
                name.write_bytes(one.read_bytes())


@fuzz
@given(layout=st.sampled_from(["single", "sharded", "mistral", "stacked"]), changes=FOLDER_CHANGES)
def test_whole_folders(work, layout, changes):
    def change():
        for given_change in changes:
            damage(work / layout, *given_change)

    examined_folder(work / layout, change)


def test_what_is_not_damaged_is_read(work):
    """So that what the tests above see is not one error for all."""
    for layout in ("single", "sharded", "mistral", "fused", "stacked"):
        assert examined_folder(work / layout, lambda: None) == ""


# ---- tokenizers: other packages parse them, so memory is that of the process


def examined_tokenizer(read, content, path):
    path.write_bytes(content)
    before = checkpoint.memory_in_use()
    examined(read, len(content))
    if before is not None:
        grown = checkpoint.memory_in_use()["peak"] - before["peak"]
        assert grown < 100_000_000, f"{grown:,} bytes for a file of {len(content):,}"


@fuzz
@given(seed=st.integers(0, 2**32), edits=EDITS)
def test_tokenizer_model(tmp_path, seed, edits):
    content = small.TOKENIZER.read_bytes()
    start = random.Random(seed).choice([0, 0, len(content) - 1500, seed % len(content)])  # the ends hold the settings
    content = content[:start] + edited(content[start:], edits, 1500)

    def read():
        tokenizer = Tokenizer(tmp_path / "tokenizer.model")
        tokenizer.decode(tokenizer.encode("def add(a, b): é"))
        tokenizer.pieces(range(tokenizer.vocab_size))

    examined_tokenizer(read, content, tmp_path / "tokenizer.model")


@pytest.fixture(scope="module")
def json_files():
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    from tests import tokenizer_files

    return [json.loads(made().to_str()) for made in tokenizer_files.KINDS.values()]


PARTS = st.sampled_from([
    {"type": "NFC"}, {"type": "Prepend", "prepend": "\u2581"}, {"type": "Fuse"}, {"type": "ByteFallback"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"},
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""},
    {"type": "Split", "pattern": {"Regex": "(a|b)*?c"}, "behavior": "Removed", "invert": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Strip", "content": " ", "start": 4_000_000_000, "stop": 9}, {"type": "Digits", "individual_digits": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "FixedLength", "length": 0},
])  # fmt: skip
MODEL_VALUES = st.dictionaries(
    st.sampled_from(["dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "ignore_merges", "merges"]),
    ODD, max_size=1,
)  # fmt: skip


@fuzz
@given(
    which=st.integers(0, 2), edits=st.none() | EDITS, changes=CHANGES,
    parts=st.dictionaries(st.sampled_from(["normalizer", "pre_tokenizer", "decoder"]), st.lists(PARTS, max_size=3)),
    values=MODEL_VALUES,
)  # fmt: skip
def test_tokenizer_json(tmp_path, json_files, which, edits, changes, parts, values):
    says = json.loads(json.dumps(json_files[which]))
    keys = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    says |= {name: {"type": "Sequence", keys[name]: given_parts} for name, given_parts in parts.items()}
    says["model"] |= values
    for path, value in changes[:1] if edits is None else ():
        replaced(says, path, value)
    content = json.dumps(says).encode()

    def read():
        tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
        tokenizer.decode(tokenizer.encode("def add(a, b): é"))
        tokenizer.pieces(range(tokenizer.vocab_size))

    examined_tokenizer(read, content if edits is None else edited(content, edits, 1 << 20), tmp_path / "tokenizer.json")


# ---- the worst that fits the bounds

WORST = {
    "lists": b"[],", "objects": b"{},", "numbers": b"1,", "reals": b"1e9,", "texts": b'"\\u0100",',
    "deep": b"[[[[[[]]]]]],", "digits": b"9" * 4000 + b",",
}  # fmt: skip


def worst(kind, size):
    if kind == "keys":
        return b"{" + b",".join(b'"%x":1' % i for i in range(size // 9)) + b"}"
    return b'{"a":[' + WORST[kind] * (size // len(WORST[kind])) + b"0]}"


def strict_json_seconds(content):
    """Time of this process; the least of three, as a busy neighbour on the same core slows a program down."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        with contextlib.suppress(CheckpointError):
            strict_json.parse(content, "a file")
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("size", [900_000, 9_999_000])
@pytest.mark.parametrize("kind", [*WORST, "keys"])
def test_json_takes_less_than_a_second(kind, size):
    assert strict_json_seconds(worst(kind, size)) < SECONDS


def test_the_time_json_takes_does_not_grow_with_what_else_the_process_holds():
    """Python's collector goes through all of that, again and again while lists are made."""
    passes = []
    content = worst("lists", 900_000)
    gc.callbacks.append(lambda phase, _: passes.append(phase))
    try:
        assert len(strict_json.parse(content, "a file")["a"]) == 300_001
        assert len(passes) <= 2 * 2  # begun and ended: once before it, once after
    finally:
        gc.callbacks.pop()
    with pytest.raises(CheckpointError):
        strict_json.parse(b"[", "a file")
    assert gc.isenabled()


@pytest.mark.parametrize("kind", [*WORST, "keys"])
def test_json_takes_memory_in_proportion(kind):
    content = worst(kind, 100_000)
    tracemalloc.start(1)
    with contextlib.suppress(CheckpointError):
        strict_json.parse(content, "a file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < FACTOR * len(content)
