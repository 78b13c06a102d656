"""What a workload has to do, counted by hand for a model small enough."""

import numpy as np
import pytest

from minimoe import params
from minimoe.backends import make_backend
from minimoe.bench.models import BENCHMARKS
from minimoe.bench.work import TRAINING, Pass, Work
from minimoe.bench.workloads import Decode, Prefill, Train, task
from minimoe.config import ModelConfig

# D = 4, H·C = 4, K·C = 2, F = 3, E = 3, k = 2, V = 5
SMALL = ModelConfig(
    vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2,
    num_experts=3, num_experts_per_token=2, max_length=64,
)  # fmt: skip


def test_a_decoding_step_counted_by_hand():
    work = Pass(batch=1, tokens=1, held=3, chosen=[2, 2], stored=4).work(SMALL)
    attention = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4
    block = attention + 4 + 4 + 3 * 4 + 2 * 3 * 3 * 4  # two norms, the gate, two of three experts
    assert work.weights == 4 * (2 * block + 4 + 5 * 4 + 4)  # the last norm, the output, one row of embeddings
    assert work.cache == 4 * 2 * (3 * 2 * 2)  # of each layer three keys and three values of K·C = 2
    norms = (4 * 4 + 3) + 4 * (5 * 4 + 3)  # the first has no residual to add
    qkv, out, rope = 2 * 4 * (4 + 2 + 2), 2 * 4 * 4, 3 * 4 + 3 * 2
    scores = 4 * 2 * (4 * 2 + 4)  # four keys, two heads
    gate, experts = 2 * 4 * 3 + 3 * 2, 2 * (6 * 4 * 3 + 5 * 3 + 2 * 4)
    assert work.flops == 2 * (qkv + out + rope + scores + gate + experts) + norms + 2 * 4 * 5


def test_weights_in_bfloat16_are_half_the_bytes_and_as_many_operations():
    wide, narrow = (Pass(2, 1, 7, [3, 2], stored).work(SMALL) for stored in (4, 2))
    assert (narrow.weights, narrow.cache, narrow.flops) == (wide.weights / 2, wide.cache / 2, wide.flops)


def test_a_prompt_makes_the_logits_of_its_last_token_only():
    last, every = (Pass(2, 6, 0, [3, 3], 4, last_only=flag).work(SMALL) for flag in (True, False))
    assert every.flops - last.flops == 5 * 2 * (2 * 4 * 5 + 5 * 4 + 3)  # five tokens of two: output and last norm
    assert every.weights == last.weights and last.cache == 0


def test_all_experts_that_were_chosen_are_read_and_no_other():
    few, many = (Pass(4, 1, 1, chosen, 4).work(SMALL) for chosen in ([1, 3], [3, 3]))
    assert many.weights - few.weights == 4 * 2 * 3 * 3 * 4
    assert many.flops == few.flops


def test_a_window_limits_what_is_seen_and_read():
    config = SMALL.replace(sliding_window=4)
    assert Pass(1, 6, 0, [2, 2], 4).visible(config) == 1 + 2 + 3 + 4 + 4 + 4
    assert Pass(1, 1, 9, [2, 2], 4).visible(config) == 4
    assert Pass(1, 1, 9, [2, 2], 4).cached(config) == 3 * 2 * 2 * 4  # and its own key is not read from the cache


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_sizes_are_those_of_the_presets(name):
    parameters = {
        "tiny": 3_513_984, "medium": 791_233_536, "mixtral-2-layers": 3_164_688_384, "mixtral-8x7b": 46_702_792_704,
    }  # fmt: skip
    assert BENCHMARKS[name].config.num_parameters() == parameters[name]


def test_weights_of_one_token_are_the_active_parameters():
    config = BENCHMARKS["medium"].config
    work = Pass(1, 1, 0, [2] * 8, 2).work(config)
    table = 32000 * 1024  # of which one row is read
    assert work.weights == 2 * (config.num_active_parameters() - table + 1024)


def test_the_bound_is_the_longer_of_reading_and_computing():
    assert Work(flops=10.0, weights=3.0, cache=1.0).bound(2.0, 100.0) == (2.0, "memory")
    assert Work(flops=1000.0, weights=3.0, cache=1.0).bound(2.0, 100.0) == (10.0, "arithmetic")


def drawn(what, batch, context, config=SMALL):
    return task(what, config, batch, context), params.random(config, 0)


def test_a_prefill_reads_the_experts_that_its_tokens_chose():
    wanted, weights = drawn("prefill", 2, 5)
    workload = Prefill(make_backend("numpy"), SMALL, weights, wanted)
    ((_, routed),) = workload._forward()
    chosen = [len(set(layer.ids.reshape(-1).tolist())) for layer in routed]
    assert workload.work() == Pass(2, 5, 0, chosen, 4).work(SMALL)
    assert workload.tokens == 10


def test_decoding_counts_the_mean_of_its_steps():
    wanted, weights = drawn("decode", 1, 5)
    workload = Decode(make_backend("numpy"), SMALL, weights, wanted)
    steps = wanted.following.shape[1]
    assert steps == 16
    counted = [Pass(1, 1, 5 + i, [2, 2], 4).work(SMALL) for i in range(steps)]  # one token always chooses k
    mean = workload.work()
    assert mean.cache == pytest.approx(np.mean([one.cache for one in counted]))
    assert mean.flops == pytest.approx(np.mean([one.flops for one in counted]))
    assert mean.weights == pytest.approx(counted[0].weights)


def test_decoding_again_gives_the_same_logits():
    """The cache is wound back: a later run sees the prompt only."""
    wanted, weights = drawn("decode", 2, 5)
    workload = Decode(make_backend("numpy"), SMALL, weights, wanted)
    first = workload.answer()
    assert workload.run() > 0
    np.testing.assert_array_equal(workload.answer(), first)
    workload._rewind()
    assert (workload._cache.positions[:, :5] == np.arange(5)).all() and (workload._cache.positions[:, 5:] == -1).all()


def test_decoding_answers_what_a_prompt_of_the_same_tokens_would():
    wanted, weights = drawn("decode", 2, 5)
    answer = Decode(make_backend("numpy"), SMALL, weights, wanted).answer().reshape(4, 2, 5)
    longer = task("prefill", SMALL, 2, 5)
    for i in range(4):
        prompt = np.concatenate([wanted.prompt, wanted.following[:, : i + 1]], axis=1)
        whole = Prefill(make_backend("numpy"), SMALL, weights, type(longer)("prefill", prompt, wanted.following))
        np.testing.assert_allclose(answer[i], whole.answer(), rtol=1e-4, atol=1e-5)


def test_training_counts_three_forwards_of_all_logits():
    wanted, weights = drawn("train", 2, 4)
    workload = Train(make_backend("numpy"), SMALL, weights, wanted)
    found = workload.work()
    assert found.flops == TRAINING * Pass(2, 4, 0, [3, 3], 4, last_only=False).work(SMALL).flops
    before = weights.norm.copy()
    workload.run()
    np.testing.assert_array_equal(weights.norm, before)  # it trains a copy


@pytest.mark.parametrize(
    ("what", "batch", "context", "complaint"),
    [
        ("decode", 1, 64, "--context must be between 1 and 63"),
        ("prefill", 1, 65, "--context must be between 1 and 64"),
        ("prefill", 1, 0, "--context must be between 1 and 64"),
        ("prefill", -2, 4, "--batch must be at least 1, not -2"),
        ("train", 1, 1, "at least 2"),
        ("sing", 1, 4, "--what must be of"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(what, batch, context, complaint):
    with pytest.raises(ValueError, match=complaint):
        task(what, SMALL, batch, context)
