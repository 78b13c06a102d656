"""A whole run is one document: checked against a schema, its arithmetic done again, wrong answers named."""

import json
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from minimoe import params
from minimoe.backends import make_backend
from minimoe.bench import cold, models, plan, report, run, tables
from minimoe.bench.measure import Samples
from minimoe.bench.models import Source
from minimoe.bench.plan import Order
from minimoe.bench.work import Work
from minimoe.bench.workloads import Decode, Prefill, chunks, task
from tests import small
from tests.bench.documents import SCHEMA
from tests.bench.test_work import SMALL

EVERY = ("prefill", "decode", "first-token", "train", "ops")


@pytest.fixture
def small_preset(quick, monkeypatch):
    preset = models.Preset(SMALL, ("float32",), 5, ("prefill", "decode"))
    monkeypatch.setitem(models.BENCHMARKS, "small", preset)


def measured(**order):
    return run.run(Order(**{"preset": "small", "rounds": 2} | order))


def test_a_document_is_what_the_schema_says(small_preset):
    document = measured(backends=("numpy", "numba"), dtypes=("float32", "bfloat16"), what=EVERY)
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    assert [(e["what"], e["dtype"], e["backend"]) for e in document["results"]] == [
        (what, dtype, backend)
        for dtype in ("float32", "bfloat16")
        for what in ("prefill", "decode", "first-token", "train")
        for backend in ("numpy", "numba")
    ]
    assert all(e["check"] is None for e in document["results"] if e["backend"] == "numpy")
    assert all(e["check"]["right"] for e in document["results"] if e["backend"] == "numba")
    assert {(e["what"], e["backend"]) for e in document["ops"]} == {
        (what, backend) for what in ("prefill", "decode") for backend in ("numpy", "numba")
    }


def test_the_share_of_the_roof_is_the_bound_over_the_time(small_preset):
    [prefill, decode] = measured(rounds=1)["results"]
    for entry, tokens in ((prefill, 5), (decode, 1)):
        work = Work(entry["flops"], entry["weight_bytes"], entry["cache_bytes"])
        bound, roof = work.bound(10e9, 200e9)
        assert entry["roof"] == roof and entry["tokens"] == tokens
        assert entry["of_roof"]["median"] == pytest.approx(bound / entry["seconds"]["median"])
        assert entry["tokens_per_second"] == pytest.approx(tokens / entry["seconds"]["median"])
    assert decode["cache_bytes"] == pytest.approx(4 * 2 * 2 * 2 * np.mean(5 + np.arange(16)))


def test_bandwidth_is_measured_right_before_and_right_after(small_preset, monkeypatch):
    taken = []

    def noted(count, turns):
        taken.append(list(turns))
        values = {"bandwidth cpu before": [1e9, 2e9], "bandwidth cpu after": [3e9, 6e9], "rate cpu": [1e15, 1e15]}
        return {name: Samples(values.get(name, [1.0, 1.0])) for name in turns}

    monkeypatch.setattr(run, "rounds", noted)
    [decode] = measured(what=("decode",))["results"]
    assert taken == [["rate cpu", "bandwidth cpu before", "numba", "bandwidth cpu after"]]
    assert decode["bandwidth"]["median"] == 3e9
    read = decode["weight_bytes"] + decode["cache_bytes"]
    assert decode["of_roof"]["median"] == pytest.approx((read / 2e9 + read / 4e9) / 2)


def test_batches_contexts_and_experts_are_all_combined(small_preset):
    document = measured(batches=(1, 3), contexts=(4, 6), experts=(2, 1), what=("decode",), rounds=1)
    found = [(e["experts"], e["batch"], e["context"]) for e in document["results"]]
    assert found == [(E, B, T) for E in (2, 1) for B in (1, 3) for T in (4, 6)]
    assert {row[0] for row in report.rows(document)} == {"decode E=1", "decode E=2"}


def test_int8_is_measured_and_compared_with_bfloat16(small_preset):
    document = measured(dtypes=("float32", "bfloat16", "int8"), what=("prefill", "decode", "ops"))
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    wide, _, narrow = (e for e in document["results"] if e["what"] == "decode")
    assert narrow["dtype"] == "int8" and narrow["check"]["right"] and narrow["cache_bytes"] == wide["cache_bytes"]
    assert narrow["weight_bytes"] < 0.75 * wide["weight_bytes"]  # a scale of four bytes for rows of a few numbers
    assert any(line.startswith("int8 is ") and "as fast as bfloat16: decode" in line for line in report.lines(document))


@pytest.mark.parametrize(
    ("order", "told"), [({"what": ("train",)}, "is for inference"), ({"preset": "mixtral-2-layers"}, "no checkpoint")]
)
def test_what_int8_is_not_for(order, told, small_preset):
    with pytest.raises(ValueError, match=told):
        plan.check(Order(**{"preset": "small", "dtypes": ("int8",)} | order))


def test_a_folder_is_measured_as_it_is_stored(quick, tmp_path):
    small.save(tmp_path / "model")
    document = measured(preset=None, folder=str(tmp_path / "model"), contexts=(5,), what=EVERY)
    assert {e["dtype"] for e in document["results"]} == {"bfloat16"}
    assert document["model"] == str(tmp_path / "model")
    assert all(e["check"]["right"] for e in document["results"]) and len(document["results"]) == 4


def test_a_mapped_preset_is_written_mapped_and_removed(quick, monkeypatch, tmp_path):
    monkeypatch.setitem(models.BENCHMARKS, "small", models.Preset(SMALL, ("bfloat16",), 5, ("decode",), mapped=True))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def look(source, *rest):
        seen.append(source.folder)
        tree = source.params()
        assert isinstance(tree.layers[0].feed_forward.w1[0].base, np.memmap | memoryview | np.ndarray)
        assert not tree.tok_embeddings.flags.writeable
        return {"import_seconds": 0.0, "model_seconds": 0.0, "first_token_seconds": 0.0, "peak_bytes": 1}

    monkeypatch.setattr(cold, "measure", look)
    document = measured()
    assert seen[0].startswith(str(tmp_path)) and not list(tmp_path.iterdir())
    assert document["results"][0]["check"]["right"]


def test_the_reference_reads_a_prompt_in_smaller_pieces(monkeypatch):
    weights, wanted = params.random(SMALL, 0, np.dtype(np.float64)), task("prefill", SMALL, 2, 7)
    expected = Prefill(make_backend("numpy"), SMALL, weights, wanted).answer()
    monkeypatch.setattr("minimoe.bench.workloads.REFERENCE_CHUNK", 3)
    sizes = {name: [len(c[0]) for c in chunks(make_backend(name), wanted.prompt)] for name in ("numpy", "numba")}
    assert sizes == {"numpy": [3, 3, 1], "numba": [7]}
    np.testing.assert_allclose(Prefill(make_backend("numpy"), SMALL, weights, wanted).answer(), expected, rtol=1e-12)


def test_the_medium_preset_takes_long_contexts():
    assert task("decode", models.BENCHMARKS["medium"].config, 1, 16384).prompt.shape == (1, 16384)


def test_a_wrong_answer_is_named(small_preset, monkeypatch):
    right = Prefill.answer
    monkeypatch.setattr(Prefill, "answer", lambda self: right(self) * (1 if self.ops.name == "numpy" else 1.01))
    document = measured()
    assert [e["check"]["right"] for e in document["results"]] == [False, True]
    [warning] = [text for text in document["warnings"] if "WRONG" in text]
    assert warning.startswith("prefill numba float32 batch 1: WRONG ANSWER, 1.0e-02 from numpy")
    assert [row[-1] for row in report.rows(document)] == ["WRONG", "ok"]
    with pytest.raises(ValueError, match="the answer was wrong: not published"):
        tables.markdown([document | {"command": "minimoe bench"}])


class SlowPeer:
    """A peer that takes three seconds, and finds something else where `wrong`."""

    versions = {"torch": "9", "transformers": "8"}  # noqa: RUF012
    implementation, wrong = "eager", False

    def __init__(self, *given):
        self.task, self.device = given[1], "cpu"

    def ask(self, method, *arguments):
        return 5e9

    def run(self):
        return 3.0

    def peak(self):
        return 7

    def close(self):
        pass

    @property
    def expected(self):
        tree = Source(SMALL, "float32").params()
        return Decode(make_backend("numpy"), SMALL, tree, self.task).answer() * (2 if self.wrong else 1)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_ratio_is_their_time_over_ours_and_their_answer_is_compared(small_preset, monkeypatch, wrong):
    monkeypatch.setattr(run, "turn", lambda take: take())
    monkeypatch.setattr(Decode, "run", lambda self: 2.0)
    monkeypatch.setattr(SlowPeer, "wrong", wrong)
    monkeypatch.setattr(run.peers, "require", lambda: None)
    monkeypatch.setattr(run.peers, "Peer", SlowPeer)
    monkeypatch.setattr(run.peers, "PeerWorkload", SlowPeer)
    document = measured(what=("decode",), peers=("transformers",))
    [entry] = document["results"]
    assert entry["peer"]["ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert entry["peer"]["right"] is not wrong and entry["check"]["right"]
    assert any("WRONG ANSWER, 5.0e-01 from transformers" in text for text in document["warnings"]) is wrong
    assert document["peer_rates"] == {"float32": 5e9} and document["peer_versions"] == SlowPeer.versions
    jsonschema.validate(document, SCHEMA)


def test_a_noisy_machine_is_named(small_preset, monkeypatch):
    document = measured()
    for entry in document["results"]:
        entry["spread"] = 0.0
    assert run._warnings(document["results"]) == []
    document["results"][1]["spread"] = 0.4
    [warning] = run._warnings(document["results"])
    assert warning == "decode numba float32 batch 1: the quartiles of the rounds are 40% apart: the machine was busy"


def test_a_machine_that_changed_is_named(small_preset):
    results = [entry | {"spread": 0.0} for entry in measured()["results"]]
    assert run._warnings(results) == []
    results[1]["bandwidth"] = {"median": 14e9}
    assert run._warnings(results) == ["cpu: its read bandwidth moved between 10 and 14 GB/s in this run"]


def test_too_little_memory_is_said_before_anything_is_made(small_preset, monkeypatch):
    monkeypatch.setattr("minimoe.checkpoint.memory.free_memory", lambda: 1000)
    monkeypatch.setattr(Source, "params", lambda *args: pytest.fail("made"))
    with pytest.raises(ValueError, match=r"parameters in float32 .* need .* of memory; .* are free"):
        measured()


def test_weights_that_are_made_in_memory_count_twice(small_preset, monkeypatch):
    weights = 4 * SMALL.num_parameters()
    free = 2 * weights
    monkeypatch.setattr("minimoe.checkpoint.memory.free_memory", lambda: free)
    assert plan.check(Order(preset="small")).sources[0].nbytes == weights
    free -= 1
    with pytest.raises(ValueError, match=f"minimoe bench: the weights of {SMALL.num_parameters()} parameters"):
        plan.check(Order(preset="small"))


def test_a_full_disk_is_said_before_anything_is_written(quick, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"the checkpoint that is to be mapped needs 0\.0 GB"):
        Source(SMALL, "bfloat16").written(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_weights_that_are_compared():
    one, other = (Source(SMALL, "float32").params(stacked=flag) for flag in (True, False))
    for (_, a), (_, b) in zip(params.named(one), params.named(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fresh_process_reports_its_times_and_its_memory(tmp_path):
    found = cold.measure(Source(SMALL, "float32"), "numpy", 1, 5)
    assert set(found) == {"import_seconds", "model_seconds", "first_token_seconds", "peak_bytes"}
    assert all(value > 0 for value in found.values()) and found["peak_bytes"] > 20e6
    with pytest.raises(ValueError, match=r"the process that measures memory failed \(status 1\): .*no_such"):
        cold.measure(Source(SMALL, "float32", str(tmp_path / "no_such")), "numpy", 1, 5)


def test_nothing_of_torch_is_imported_without_peers():
    code = "import sys, minimoe.cli.bench; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
