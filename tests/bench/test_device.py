"""The benchmark on a device: its limits, the weights that are drawn there, and whole runs at sizes of a few numbers."""

import json

import jsonschema
import numpy as np
import pytest

from minimoe import cli
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend, reference_over
from minimoe.bench import device, limits, models, plan, report, run, tables, theirs
from minimoe.bench.models import Source
from minimoe.bench.plan import Order
from minimoe.bench.profile import profile
from minimoe.bench.workloads import WORKLOADS, Prefill, task
from minimoe.config import ConfigError
from minimoe.params import leaves, named, random
from tests.bench.documents import SCHEMA, FixedProbe
from tests.bench.test_work import SMALL
from tests.cuda_on_cpu.measuring import to_host


@pytest.fixture
def on_device(quick, cupy, monkeypatch):
    """A preset whose weights are drawn on the device."""
    monkeypatch.setitem(limits.PROBES, "gpu", FixedProbe)
    preset = models.Preset(SMALL, ("bfloat16",), 5, ("prefill", "decode"), on_device=True)
    monkeypatch.setitem(models.BENCHMARKS, "drawn", preset)
    return cupy


@pytest.fixture
def probe(cupy, monkeypatch):
    monkeypatch.setattr(device, "READ_BYTES", 1 << 18)
    monkeypatch.setattr(device, "SIDE", 32)
    monkeypatch.setattr(device, "_THREADS", 64)
    return device.GpuProbe()


def measured(**order):
    return run.run(Order(**{"preset": "drawn", "backends": ("cuda",), "rounds": 1} | order))


def test_the_read_test_reads_all_of_it(probe):
    assert probe.bandwidth() > 0
    for index in (0, 12345, probe._read.size - 1):
        probe._read[index] += 1
        with pytest.raises(AssertionError, match="did not read everything"):
            probe.bandwidth()
        probe._read[index] -= 1
    assert probe.bandwidth() > 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_products_are_of_random_numbers_and_are_counted(probe, monkeypatch, dtype):
    monkeypatch.setattr(probe, "_timed", lambda work: 0.5 if work() is not None else None)
    assert probe.rate(dtype) == 2 * 2 * 32**3
    x, w = (to_host(one).astype(float) for one in probe._matrices[dtype])
    assert 0.8 < x.std() < 1.2 and abs(np.corrcoef(x.ravel(), w.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_numbers_drawn_on_the_device_are_normal_and_depend_on_seed_and_stream_alone(cupy, monkeypatch, dtype):
    def drawn(seed, stream, size=10_001):
        w = cupy.empty(size, dtype)
        device.draw_normal(cupy, w, seed, stream, 0.5)
        return to_host(w)

    x = drawn(3, 7)
    values = np.sort(x.astype(float)) / 0.5
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03
    for quantile, normal in ((0.02275, -2), (0.15866, -1), (0.5, 0), (0.84134, 1), (0.97725, 2)):
        assert abs(np.quantile(values, quantile) - normal) < 0.12
    assert abs(np.corrcoef(x[:-1].astype(float), x[1:].astype(float))[0, 1]) < 0.04
    for other in (drawn(4, 7), drawn(3, 8), drawn(7, 3)):
        assert abs(np.corrcoef(x.astype(float), other.astype(float))[0, 1]) < 0.04
    monkeypatch.setattr(device, "_blocks", lambda xp: 3)
    np.testing.assert_array_equal(drawn(3, 7), x)  # whatever the grid
    np.testing.assert_array_equal(drawn(3, 7, 100), x[:100])


@pytest.mark.parametrize("changes", [{}, {"dense": True, "num_experts": 1, "num_experts_per_token": 1}])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_drawn_on_the_device_are_distributed_as_those_of_the_host(cupy, changes, tied):
    config = SMALL.replace(tie_embeddings=tied, hidden_size=64, intermediate_size=48, head_dim=16, **changes)
    there, here = device.draw(config, 0, np.float32, quiet=True), random(config, 0)
    seen = set()
    for (name, w), (other, v) in zip(named(there), named(here), strict=True):
        w = to_host(w)
        assert name == other and w.shape == v.shape and w.dtype == v.dtype
        if w.ndim == 1:
            assert (w == 1).all()
        else:
            assert abs(w.std() / v.std() - 1) < (0.1 if w.size > 1000 else 0.25), name
            seen.add(w.tobytes())
    assert len(seen) == sum(len(shape) > 1 for shape in (w.shape for _, w in named(here)))
    assert all(isinstance(leaf, cupy.ndarray) for _, leaf in leaves(there))  # a layer's experts are one array


def test_a_whole_run_on_a_device(on_device):
    document = measured(what=("prefill", "decode", "first-token", "ops"))
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    assert [e["what"] for e in document["results"]] == ["prefill", "decode", "first-token"]
    for entry in document["results"]:
        assert entry["device"] == "gpu" and entry["check"]["right"] and entry["check"]["against"] == "array code"
    assert document["processes"] == []
    assert document["machine"]["gpu"]["card"] and document["machine"]["gpu"]["cuda"]
    assert {e["name"] for e in document["ops"]} >= {"experts", "attention", "linear qkv"}
    assert any("gpu: " in line and "driver" in line for line in report.lines(document))
    assert document["machine"]["gpu"]["card"] in tables.markdown([document | {"command": "minimoe bench"}])


def test_host_and_device_beside_each_other(on_device, monkeypatch):
    monkeypatch.setitem(models.BENCHMARKS, "both", models.Preset(SMALL, ("float32",), 5, ("decode", "train")))
    document = measured(preset="both", backends=("numpy", "cuda"), batches=(2,))
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    assert [(e["backend"], e["device"]) for e in document["results"]] == [("numpy", "cpu"), ("cuda", "gpu")] * 2
    assert all(e["check"]["right"] for e in document["results"] if e["backend"] == "cuda")


def test_decoding_is_timed_as_generation_does_it(on_device):
    """By replaying one graph; each run begins where the prompt ends, and so gives the same again."""
    ops, weights = make_backend("cuda"), device.draw(SMALL, 0, np.float32, quiet=True)
    wanted = task("decode", SMALL, 2, 5)
    decode = WORKLOADS["decode"](ops, SMALL, weights, wanted)
    expected = WORKLOADS["decode"](reference_over(ops), SMALL, weights, wanted).answer()
    for _ in range(3):
        decode.run()
        np.testing.assert_allclose(decode.answer(), expected, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_is_read_in_chunks_and_counted_so(on_device, monkeypatch):
    ops, weights, wanted = (
        make_backend("cuda"),
        device.draw(SMALL, 0, np.float32, quiet=True),
        task("prefill", SMALL, 2, 7),
    )
    whole = Prefill(ops, SMALL, weights, wanted)
    expected, work = whole.answer(), whole.work()
    monkeypatch.setattr("minimoe.bench.workloads.CHUNK", 3)
    parts = Prefill(ops, SMALL, weights, wanted)
    np.testing.assert_allclose(parts.answer(), expected, rtol=1e-4, atol=1e-5)
    counted = parts.work()
    assert counted.weights > 2 * work.weights  # once a chunk
    assert work.cache == 0 < counted.cache and counted.flops >= work.flops


def test_a_task_too_large_for_the_reference_is_not_checked(on_device, monkeypatch):
    monkeypatch.setattr(run, "MOST_CHECKED", 5)
    document = measured(contexts=(5, 6), what=("prefill",))
    assert [e["check"] is None for e in document["results"]] == [False, True]


def test_as_many_layers_as_fit_are_measured_and_said(on_device, monkeypatch, capsys):
    one = SMALL.replace(num_layers=1).num_parameters() * 2
    monkeypatch.setattr(plan, "_device_memory", lambda: one * 1.2)
    assert cli.main(["bench", "--preset", "drawn", "--backend", "cuda", "--rounds", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {e["layers"] for e in document["results"]} == {1} and document["layers"] == 2
    assert report.sizes(document) == "drawn, 1 of 2 layers"
    assert "| drawn, 1 of 2 layers |" in tables.markdown([document])
    monkeypatch.setattr(plan, "_device_memory", lambda: one * 0.9)
    with pytest.raises(ConfigError, match="one layer and the vocabulary need"):
        plan.check(Order(preset="drawn", backends=("cuda",)))


def test_memory_is_kept_back_for_what_goes_with_the_weights(on_device, monkeypatch):
    monkeypatch.setattr(on_device.cuda.runtime, "memGetInfo", lambda: (140 * 10**9, 141 * 10**9))
    assert plan._device_memory() == 140e9 - plan._RESERVED
    [source] = plan.check(Order(preset="mixtral-8x7b", backends=("cuda",))).sources
    assert source.config.num_layers == 32 and source.on_device
    [fewer] = plan._sources(Order(preset="mixtral-8x7b", backends=("cuda",), peers=("transformers",)),
                            models.benchmark("mixtral-8x7b"))  # fmt: skip
    assert fewer.config.num_layers < 16


def test_goals_are_judged(on_device):
    document = measured(what=("prefill", "decode"), contexts=(5,)) | {"model": "mixtral-8x7b"}
    first, second = document["results"]
    first |= {"context": 4096, "of_roof": {"median": 0.55}, "peer": {"ratio": {"median": 1.2}}}
    second |= {"of_roof": {"median": 0.7}, "peer": {"ratio": {"median": 4.5}}}
    assert list(report.goals(document)) == [
        "goal met: prefill, batch 1, context 4,096: 0.55 of the roof, wanted 0.50",
        "goal NOT met: prefill, batch 1, context 4,096: 1.20 times as fast as transformers, wanted 1.30",
        "goal NOT met: decode, batch 1, context 5: 0.70 of the roof, wanted 0.80",
        "goal met: decode, batch 1, context 5: 4.50 times as fast as transformers, wanted 4.00",
    ]


def test_a_profile_runs_every_op(on_device):
    found = profile(
        make_backend("cuda"), SMALL, device.draw(SMALL, 0, np.float32, quiet=True), task("decode", SMALL, 1, 5), 1
    )
    assert all(one.seconds > 0 for one in found)


def test_theirs_get_the_weights_that_were_drawn(cupy):
    drawn = dict(named(Source(SMALL, "float32", on_device=True).params()))
    given = theirs._to_theirs(SMALL, drawn)
    both = to_host(given["model.layers.1.mlp.experts.gate_up_proj"])
    prefix = "layers.1.feed_forward.experts.2."
    np.testing.assert_array_equal(both[2], np.concatenate([to_host(drawn[prefix + w]) for w in ("w1", "w3")]))
