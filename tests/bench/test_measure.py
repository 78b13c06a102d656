"""Rounds, medians and quartiles; the limits' arithmetic; the profile names and counts what a model calls."""

import itertools

import numpy as np
import pytest

from minimoe import params, products, schedule, threads
from minimoe.backends import make_backend
from minimoe.bench import limits, measure
from minimoe.bench.measure import Samples, ratio, rounds, turn
from minimoe.bench.profile import BETWEEN, profile
from minimoe.bench.work import Pass
from minimoe.bench.workloads import distance, task
from minimoe.tiles import MULTIPLIES_PAIRS, PAIR
from tests.bench.test_work import SMALL


def test_every_round_gives_all_their_turn_and_every_other_in_reverse(monkeypatch):
    monkeypatch.setattr(measure, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "BURST", 0.0)
    order = []
    samples = rounds(3, {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or len(order)})
    assert "".join(order) == "abbaab"
    assert samples["b"].values == [2, 3, 6]


def test_median_and_quartiles():
    samples = Samples([4.0, 1.0, 2.0, 3.0, 100.0])
    assert samples.summary() == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert samples.spread == pytest.approx(2 / 3)


def test_ratios_are_taken_round_by_round():
    assert ratio(Samples([2.0, 9.0]), Samples([1.0, 3.0])).values == [2.0, 3.0]


def test_the_first_of_several_runs_is_left_out(monkeypatch):
    """It may compile, or find nothing in the caches; of the others the middle one counts, not the best."""
    clock = itertools.count(0, measure.BURST / 4.5)
    monkeypatch.setattr(measure, "perf_counter", lambda: next(clock))
    times = iter([0.001, 4.0, 6.0, 7.0, 8.0])
    assert turn(lambda: next(times)) == 6.0


def test_a_limit_and_what_is_held_against_it_are_the_same_figure_of_the_same_noise(monkeypatch):
    """Many short reads and one long run of as many steps: on a machine that is busy half the time, both find it so."""
    now, busy = [0.0], itertools.cycle([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "sleep", lambda seconds: None)

    def read():
        took = next(busy) * measure.BURST / 40
        now[0] += took
        return 1 / took

    def steps():
        return sum(1 / read() for _ in range(80)) / 80

    samples = rounds(3, {"read": read, "step": steps})
    reached = 1 / samples["step"].median / samples["read"].median
    assert reached == pytest.approx(1, abs=0.15)


def test_a_run_longer_than_a_turn_is_taken_once(monkeypatch):
    clock = itertools.count(0, 10.0)
    monkeypatch.setattr(measure, "perf_counter", lambda: next(clock))
    times = iter([8.0])
    assert turn(lambda: next(times)) == 8.0


@pytest.fixture
def small_probe(monkeypatch):
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "SIDE", 64)
    return limits.CpuProbe()


def test_the_read_test_reads_all_of_it(small_probe):
    assert small_probe.bandwidth() > 0
    small_probe._read[12345] += 1  # it would be noticed
    with pytest.raises(AssertionError, match="did not read everything"):
        small_probe.bandwidth()


def test_limits_are_bytes_and_operations_per_second(small_probe, monkeypatch):
    clock = itertools.count(0, 0.5)  # every measurement takes half a second
    monkeypatch.setattr(limits, "perf_counter", lambda: next(clock))
    assert small_probe.bandwidth() == 2 * (1 << 22)
    for dtype in ("float32", "float64", "bfloat16"):
        assert small_probe.rate(dtype) == 2 * 2 * 64**3


@pytest.mark.skipif(not MULTIPLIES_PAIRS, reason="this processor does not multiply pairs of bfloat16")
def test_the_rate_of_bfloat16_is_that_of_pairs(small_probe, monkeypatch):
    kinds, fill = [], products._fill

    def watched(factors, blocks, stored, kind, *others):
        kinds.append(kind)
        fill(factors, blocks, stored, kind, *others)

    monkeypatch.setattr(products, "_fill", watched)
    small_probe.rate("bfloat16")
    small_probe.rate("int8")
    assert kinds == [PAIR, PAIR, np.float32, np.float32]


def test_threads_are_held_and_given_back():
    import numba

    before = numba.get_num_threads()
    with limits.held_to(1):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
    for wrong in (0, threads.most() + 1):
        with pytest.raises(ValueError, match="--threads must be between 1 and"), limits.held_to(wrong):
            pass


@pytest.mark.parametrize("what", ["prefill", "decode"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_profile_names_every_op_and_counts_what_the_pass_does(what, backend):
    weights = params.random(SMALL, 0)
    wanted = task(what, SMALL, 2, 5)
    found = profile(make_backend(backend), SMALL, weights, wanted, passes=2)
    assert [one.name for one in found] == [
        "rope", "embedding", "rmsnorm", "linear qkv", "attention", "linear out", "gating", "experts", "linear logits",
        "kv_cache", BETWEEN,
    ]  # fmt: skip
    calls = {one.name: one.calls for one in found}
    assert calls["experts"] == calls["linear qkv"] == 2 and calls["rmsnorm"] == 5
    assert (calls["rope"], calls["kv_cache"]) == ((5, 2) if what == "prefill" else (3, 0))
    assert all(one.seconds > 0 for one in found)
    described = Pass(2, 5 if what == "prefill" else 1, 0 if what == "prefill" else 5, [3, 3], 4)
    flops = sum(one.flops for one in found)
    assert flops == described.work(SMALL).flops
    size = {one.name: one.bytes for one in found}
    tokens = described.batch * described.tokens
    written = 2 * 2 * tokens * 2 * 4  # layers, keys and values, K·C, bytes
    turned = sum(described.cost(SMALL, step).bytes for step in schedule.schedule(SMALL) if step.room == "rope")
    expected = (turned, written) if what == "prefill" else (turned + written, 0)
    assert (size["rope"], size["kv_cache"]) == expected
    # q, context (H·C = 4) and new k, v (K·C = 2) in both layers; when decoding five cached keys and values of each
    cached = 0 if what == "prefill" else 2 * 5 * 2 * 2 * 4
    assert size["attention"] == 2 * (tokens * (4 + 4 + 2 + 2) * 4 + cached)


def test_one_row_that_chose_otherwise_does_not_count():
    truth = np.arange(12.0).reshape(4, 3) + 1
    answer = truth.copy()
    answer[2] = 0
    assert distance(answer, truth) == 0
    assert distance(1.5 * truth, truth) == pytest.approx(0.5)
