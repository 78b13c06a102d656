"""Models called hf:owner/name, against a stand-in for the Hub on this machine; nothing else is asked."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from minimoe import checkpoint, cli
from minimoe.checkpoint import download
from minimoe.checkpoint.download import DownloadError
from tests import small
from tests.checkpoint.hub import COMMIT, Hub

needs_package = pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")

# huggingface_hub reads its settings when it is imported: so every case has a process of its own.
FETCH = """
import json, sys
from minimoe.checkpoint import CheckpointError, download
for name in sys.argv[1:]:
    try:
        print(json.dumps(["folder", str(download.fetch(name))]))
    except CheckpointError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.parametrize("name", [
    "hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../c", "hf:a/b@-x", "hf:/a/b", "hf:a/b c",
    "hf:a/b@" + "x" * 300, "hf:a\n/b", "hf:-a/b", "hf:a/b\x1b[2J",
])  # fmt: skip
def test_what_is_no_name_is_refused_before_anything_is_asked(name):
    with pytest.raises(DownloadError, match="a model on the Hub is called hf:owner/name") as caught:
        download.fetch(name)
    assert str(caught.value).isprintable()


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["generate", "a", "--model", "hf:owner/name"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "minimoe: error: hf:owner/name: downloading needs pip install 'minimoe[download]'\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint in two shards, and beside it what must not be fetched."""
    base = tmp_path_factory.mktemp("model")
    small.save(base / "one")
    config, params = checkpoint.load_params(base / "one")
    checkpoint.save(base / "m", config, params, tokenizer_file=small.TOKENIZER, max_shard_bytes=60_000)
    files = {path.name: path.read_bytes() for path in (base / "m").iterdir()}
    assert len(files) > 4
    return files


OTHERS = {
    "pytorch_model.bin": b"pickle", "modeling_own.py": b"boom", "consolidated.safetensors": b"twice",
    "original/params.json": b"{}", "original/model.safetensors": b"x", "README.md": b"card",
}  # fmt: skip


@pytest.fixture
def hub(files):
    with Hub({"owner/name": files | OTHERS, "owner/pickles": {"config.json": b"{}", "x.bin": b"x"}}) as opened:
        yield opened


def fetch(hub, home, *names, program=FETCH):
    """Ask for models in a process that knows only this Hub; its cache is `home`."""
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, env=environment | given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@needs_package
def test_weights_json_and_tokenizer_are_fetched_once_and_open_without_a_network(hub, files, tmp_path):
    (kind, folder), *again = fetch(hub, tmp_path, "hf:owner/name@v2", f"hf:owner/name@{COMMIT}")
    assert (kind, again) == ("folder", [["folder", folder]])
    assert contents(folder) == files
    assert sorted(hub.fetched()) == sorted(files)
    checkpoint.load_params(folder)
    hub.__exit__()
    assert fetch(hub, tmp_path, "hf:owner/name@v2") == [["folder", folder]]


@needs_package
def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, files, tmp_path):
    name = max(files, key=lambda name: len(files[name]) * name.endswith(".safetensors"))
    hub.cut[name] = 40_000
    small_pieces = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 10_000\n"
    found = fetch(hub, tmp_path, "hf:owner/name", "hf:owner/name", program=small_pieces + FETCH)
    kind, folder = found[-1]
    assert kind == "folder" and contents(folder) == files
    parts = [part for method, path, part in hub.asked if method == "GET" and path.endswith(name)]
    assert len(parts) == 2 and int(parts[1].removeprefix("bytes=").removesuffix("-")) > 0


@needs_package
def test_what_cannot_be_fetched_is_said_in_one_line(hub, tmp_path):
    names = ["hf:owner/nothing", "hf:owner/name@v9", "hf:owner/pickles"]
    reasons = ["there is no such model on the Hub", "it has no revision 'v9'", "holds no safetensors"]
    for name, reason, (kind, message) in zip(names, reasons, fetch(hub, tmp_path, *names), strict=True):
        assert kind == "DownloadError" and message.startswith(f"{name}: ") and reason in message, message
        assert message.isprintable()
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".py"))]


@needs_package
def test_without_a_network_what_is_not_complete_is_said_in_one_line(hub, files, tmp_path):
    folder = Path(fetch(hub, tmp_path / "partly", "hf:owner/name")[0][1])
    min(folder.glob("model-*")).unlink()  # as after an interruption
    hub.__exit__()
    for home in ("partly", "empty"):
        ((kind, message),) = fetch(hub, tmp_path / home, "hf:owner/name")
        assert kind == "DownloadError" and message.isprintable(), message
        assert "the Hub cannot be reached, and the model is not complete on this machine" in message
