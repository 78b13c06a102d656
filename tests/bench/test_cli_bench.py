"""`minimoe bench`: what it prints is what the document says, and every mistake is one line before anything is made."""

import json
import os
import subprocess
import sys

import jsonschema
import pytest
from PIL import Image

from minimoe import cli
from minimoe.bench import models, workloads
from tests import small
from tests.bench.documents import SCHEMA
from tests.bench.test_work import SMALL


@pytest.fixture
def bench(quick, monkeypatch, tmp_path, capsys):
    """Run the command in a folder of its own; return status, stdout and stderr."""
    monkeypatch.setitem(models.BENCHMARKS, "small", models.Preset(SMALL, ("float32",), 5, ("prefill", "decode")))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = cli.main(["bench", *words])
        return status, *capsys.readouterr()

    return run


def test_the_table_fits_a_screen(bench):
    status, out, err = bench("--preset", "small", "--rounds", "2")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("small on ") and lines[0].endswith("median of 2 rounds")
    assert [line.split()[0] for line in lines[2:5]] == ["what", "prefill", "decode"]
    assert "10.0" not in lines[3] and max(map(len, lines)) <= 120 and len(lines) <= 24
    assert "cpu: reads 10 GB/s, multiplies float32 weights at 200 GFLOP/s" in lines
    assert any("123 MB" in line for line in lines)


def test_json_is_the_document_that_out_keeps(bench, tmp_path):
    status, out, _ = bench("--preset", "small", "--rounds", "2", "--json", "--out", "kept.json")
    document = json.loads(out)
    assert status == 0 and document == json.loads((tmp_path / "kept.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert document["command"] == "minimoe bench --preset small --rounds 2" and document["date"].startswith("20")


def test_lists_of_flags_may_be_written_in_two_ways(bench):
    out = bench("--preset", "small", "--batch", "1", "2", "--batch", "2", "--what", "decode", "--json")[1]
    document = json.loads(out)
    assert [entry["batch"] for entry in document["results"]] == [1, 2]
    assert document["command"] == "minimoe bench --preset small --batch 1 2 --what decode"


def test_a_folder_and_its_roofline(bench, tmp_path):
    small.save(tmp_path / "model")
    status, out, err = bench("--model", "model", "--context", "9", "--rounds", "1", "--figure", "roof.png")
    assert status == 0 and "wrote roof.png" in err
    assert "linear qkv" in out and "between ops" in out
    with Image.open(tmp_path / "roof.png") as picture:
        assert min(picture.size) > 300


def test_a_wrong_answer_is_status_1(bench, monkeypatch):
    answer = workloads.Decode.answer
    monkeypatch.setattr(workloads.Decode, "answer", lambda self: answer(self) + (self.ops.name == "numba"))
    status, out, _ = bench("--preset", "small", "--rounds", "1")
    assert status == 1 and "WRONG ANSWER" in out


MISTAKES = {
    "preset": (
        ["--preset", "huge"],
        "unknown preset 'huge'; minimoe bench has tiny, medium, mixtral-2-layers, mixtral-8x7b",
    ),
    "layers": (["--layers", "0"], "--layers must be between 1 and the model's 6, not 0"),
    "layers of a folder": (["--model", "model", "--layers", "4"], "--layers: the layers of a folder are given"),
    "host": (["--preset", "mixtral-8x7b"], "its weights are drawn on the device: choose --backend cuda alone"),
    "batch": (["--batch", "-2"], "--batch must be at least 1, not -2"),
    "batch 0": (["--batch", "0"], "--batch must be at least 1, not 0"),
    "long": (["--context", "300"], "--context must be between 1 and 256 tokens for this model, not 300"),
    "full": (["--what", "decode", "--context", "256"], "--context must be between 1 and 255 tokens"),
    "no context": (["--context", "0"], "--context must be between 1 and"),
    "dtype": (["--dtype", "int4"], "dtype must be one of float32, float64, bfloat16, int8, not 'int4'"),
    "backend": (["--backend", "rust"], "unknown backend 'rust'"),
    "what": (["--what", "sing"], "--what must be of prefill, decode, first-token, train and ops, not 'sing'"),
    "rounds": (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    "threads": (["--threads", "0"], "--threads must be between 1 and"),
    "more threads": (["--threads", "4096"], "--threads must be between 1 and"),
    "experts": (["--experts", "0"], "num_experts must be an integer in [1,"),
    "both": (["--preset", "tiny", "--model", "x"], "--preset tiny and --model x exclude each other"),
    "folder": (["--model", "nowhere"], "nowhere"),
    "experts of a folder": (["--model", "model", "--experts", "4"], "--experts: the experts of a folder are given"),
    "peer": (["--peers", "llama.cpp"], "--peers knows transformers, not 'llama.cpp'"),
    "out": (["--out", "nowhere/x.json"], "there is no folder nowhere"),
    "out name": (["--out", "x.txt"], "the name must end in .json"),
    "figure": (["--figure", "x.gif"], "the name must end in .png, .pdf, .svg"),
    "number": (["--batch", "two"], "argument --batch: invalid int value: 'two'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(bench, mistake, tmp_path, monkeypatch):
    small.save(tmp_path / "model")
    monkeypatch.setattr(models.Source, "params", lambda *args: pytest.fail("weights were made"))
    words, complaint = MISTAKES[mistake]
    try:
        status, out, err = bench(*words)
    except SystemExit as stopped:
        status, out, err = stopped.code, "", complaint
    assert (status, out) == (2, "")
    assert complaint in err and err.count("\n") <= 1


def test_transformers_missing_is_said_with_what_installs_it(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else True)
    status, _, err = bench("--peers", "transformers")
    assert status == 2
    assert "needs transformers, not installed here: pip install 'minimoe[peers]'" in err


def test_memory_that_is_not_there_is_said_in_advance(bench, monkeypatch):
    monkeypatch.setattr("minimoe.checkpoint.memory.free_memory", lambda: 2_000_000_000)
    status, _, err = bench("--preset", "medium", "--dtype", "float32")
    assert status == 2 and "791,233,536 parameters in float32" in err and "need" in err and "are free" in err


def test_the_command_as_a_program(tmp_path):
    """Nothing is patched: one round with the machine's own limits, and the process's exit status."""
    words = ["bench", "--what", "decode", "--rounds", "1", "--context", "8", "--json"]
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "minimoe", *words], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, SCHEMA)
    [entry] = document["results"]
    assert entry["check"]["right"] and 1e8 < entry["bandwidth"]["median"] < 1e13
    assert document["threads"] == 1 and document["machine"]["threading_layer"] in ("omp", "tbb", "workqueue")
