import numpy as np
import pytest

import minimoe
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.config import ModelConfig
from minimoe.generate import Decoding, generate_ids
from minimoe.mixtral import CacheFullError, TokenError
from tests.draws import SIDES, draw_config, draw_dense_config, draw_params, draw_tokens, forward

CONFIG = ModelConfig(
    vocab_size=17, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    num_experts=4, num_experts_per_token=2, rope_theta=100.0, bos_id=None, eos_id=None,
)  # fmt: skip
SEEDS = range(8)


@pytest.fixture(params=["numpy", "numba"])
def ops(request):
    return make_backend(request.param)


@pytest.fixture
def params():
    return draw_params(CONFIG, np.random.default_rng(0))


def generate(ops, config, params, tokens, **given):
    steps = list(generate_ids(ops, config, params, tokens, **given))
    return np.stack(steps, axis=1) if steps else np.zeros((len(tokens), 0), int)


def draw(seed):
    """A model and prompts: windows shorter than the text, padding that takes turns, with and without a gate."""
    rng = np.random.default_rng([11, seed])
    window = [None, int(rng.integers(1, 7))][seed % 2]
    config = (draw_dense_config if seed % 4 == 3 else draw_config)(rng, sliding_window=window)
    tokens, mask = draw_tokens(rng, config, B=3, T=int(rng.integers(2, 10)), side=SIDES[seed // 2 % 4])
    return config, draw_params(config, rng), tokens, mask


def greedy(ops, config, params, prompt, n):
    """Each next token from a whole forward of all that stands before it."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(forward(ops, config, params, [text])[0][0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_is_the_argmax_of_repeated_whole_forwards_for_every_row(seed, ops):
    config, params, tokens, mask = draw(seed)
    found = generate(ops, config, params, tokens, mask=mask, max_new_tokens=9)
    assert found.shape == (3, 9)
    for b, row in enumerate(tokens):
        prompt = row if mask is None else row[mask[b]]
        assert found[b].tolist() == greedy(ops, config, params, prompt, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_gives_what_each_prompt_gives_alone(seed, ops):
    config, params, tokens, mask = draw(seed)
    found = generate(ops, config, params, tokens, mask=mask, max_new_tokens=6)
    for b, row in enumerate(tokens):
        prompt = row if mask is None else row[mask[b]]
        assert generate(ops, config, params, prompt[None], max_new_tokens=6)[0].tolist() == found[b].tolist()


def test_left_and_right_padding_give_the_same_continuation(ops, params):
    rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    mask = np.array([[t < len(row) for t in range(5)] for row in rows])
    left_mask = mask[:, ::-1]
    right, left = np.zeros((3, 5), int), np.zeros((3, 5), int)
    right[mask] = left[left_mask] = np.concatenate(rows)
    for given in ({}, {"temperature": 0.9, "seed": 4}):
        one, other = (generate(ops, CONFIG, params, x, mask=m, max_new_tokens=8, **given)
                      for x, m in ((right, mask), (left, left_mask)))  # fmt: skip
        assert one.tolist() == other.tolist()


def test_a_bfloat16_model_continues_as_its_whole_forwards_do(ops):
    config = CONFIG.replace(sliding_window=4)
    params = draw_params(config, np.random.default_rng(2), BFLOAT16)
    found = generate(ops, config, params, [[1, 2, 3]], max_new_tokens=10)
    assert found[0].tolist() == greedy(ops, config, params, [1, 2, 3], 10)


def test_a_seed_makes_sampling_reproducible(ops, params):
    def sample(seed, temperature=1.5):
        return generate(ops, CONFIG, params, [[1, 2], [3, 4]], max_new_tokens=20, temperature=temperature, seed=seed)

    assert sample(1).tolist() == sample(1).tolist() != sample(2).tolist()
    assert sample(None).tolist() != sample(None).tolist()
    assert sample(1, temperature=0.0).tolist() == sample(2, temperature=0.0).tolist()


def test_backends_sample_the_same_tokens(params):
    one, other = (generate(make_backend(name), CONFIG, params, [[1, 2], [3, 4]], max_new_tokens=30, temperature=1.0,
                           top_p=0.8, seed=3) for name in ("numpy", "numba"))  # fmt: skip
    assert one.tolist() == other.tolist()


def test_a_row_draws_its_own_number_of_every_step(ops, params):
    """The first row samples what it would alone in the first step; equal rows may differ."""
    tokens = np.tile([1, 2, 3], (64, 1))
    batch = generate(ops, CONFIG, params, tokens, max_new_tokens=1, temperature=2.0, seed=5)
    alone = generate(ops, CONFIG, params, tokens[:1], max_new_tokens=1, temperature=2.0, seed=5)
    assert batch[0, 0] == alone[0, 0]
    assert len(set(batch[:, 0].tolist())) > 3


def test_a_tiny_nucleus_or_a_low_temperature_is_greedy(ops, params):
    best = generate(ops, CONFIG, params, [[1, 2]], max_new_tokens=12)
    for given in ({"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1e-4}):
        assert generate(ops, CONFIG, params, [[1, 2]], max_new_tokens=12, seed=0, **given).tolist() == best.tolist()


def test_samples_follow_the_probabilities(ops, params):
    tokens = np.tile([1, 2, 3], (4000, 1))
    drawn = generate(ops, CONFIG, params, tokens, max_new_tokens=1, temperature=1.3, seed=0)[:, 0]
    logits = forward(ops, CONFIG, params, tokens[:1])[0][0, -1] / 1.3
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    share = np.bincount(drawn, minlength=17) / 4000
    assert np.abs(share - probs).max() < 5 * (0.25 / 4000) ** 0.5


def test_a_row_that_has_ended_repeats_eos_and_all_ended_stops(ops, params):
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    free = generate(ops, CONFIG, params, tokens, max_new_tokens=12)
    eos = int(free[0, 3])
    config = CONFIG.replace(eos_id=eos)
    found = generate(ops, config, params, tokens, max_new_tokens=12)
    first = [row.tolist().index(eos) if eos in row else 12 for row in free]
    assert first[0] <= 3 and len(set(first)) > 1  # some row goes on without the others
    assert found.shape[1] == min(12, max(first) + 1)
    for row, plain, end in zip(found, free, first, strict=True):
        assert row[: end + 1].tolist() == plain[: end + 1][: len(row)].tolist()
        assert set(row[end:].tolist()) <= {eos}
    alone = generate(ops, config, params, tokens[:1], max_new_tokens=12)
    assert alone[0].tolist() == free[0, : first[0] + 1].tolist()


def test_no_eos_means_no_end(ops, params):
    assert generate(ops, CONFIG, params, [[1]], max_new_tokens=25).shape == (1, 25)


def test_tokens_come_one_at_a_time(params):
    calls = []
    ops = make_backend("numpy")
    stream = generate_ids(ops, CONFIG, params, [[1, 2]], max_new_tokens=1000)
    for _ in range(3):
        calls.append(next(stream))
    assert [step.shape for step in calls] == [(1,)] * 3
    stream.close()


def test_no_new_tokens_is_nothing(ops, params):
    assert generate(ops, CONFIG, params, [[1, 2]], max_new_tokens=0).shape == (1, 0)


@pytest.mark.parametrize("value", [-1, 1.5, 2.0, True, None, "3", float("inf")])
def test_max_new_tokens_is_a_count(value, params):
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 0, not "):
        generate_ids(make_backend("numpy"), CONFIG, params, [[1]], max_new_tokens=value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_temperature_is_finite_and_not_negative(value, params):
    with pytest.raises(ValueError, match=f"temperature must be finite and at least 0, not {value}"):
        generate_ids(make_backend("numpy"), CONFIG, params, [[1]], temperature=value)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_top_p_is_a_share(value, params):
    with pytest.raises(ValueError, match=rf"top_p must be in \(0, 1\], not {value}"):
        generate_ids(make_backend("numpy"), CONFIG, params, [[1]], top_p=value)


def test_what_does_not_fit_is_refused_before_anything_is_computed(params):
    ops = make_backend("numpy")
    with pytest.raises(CacheFullError, match="3 prompt tokens and 6 new ones exceed max_length = 8"):
        generate_ids(ops, CONFIG, params, [[1, 2, 3]], max_new_tokens=6, max_length=8)
    assert len(list(generate_ids(ops, CONFIG, params, [[1, 2, 3]], max_new_tokens=5, max_length=8))) == 5


def test_wrong_prompts_are_refused_before_anything_is_computed(params):
    ops = make_backend("numpy")
    with pytest.raises(TokenError, match="token id 17 is outside"):
        generate_ids(ops, CONFIG, params, [[17]])
    with pytest.raises(TokenError, match="every prompt needs at least one unmasked token"):
        generate_ids(ops, CONFIG, params, [[1, 2], [3, 4]], mask=np.array([[True, True], [False, False]]))
    with pytest.raises(TokenError, match="an empty list has no type"):
        generate_ids(ops, CONFIG, params, [])


def test_a_step_goes_on_with_the_tokens_it_is_told_not_with_those_it_drew():
    """As a sequence that has ended does, beside others that go on."""
    model = minimoe.random(CONFIG, seed=0, backend="numpy")
    told = np.array([3, 5, 7, 9])
    cache = model.new_cache(1, 8)
    model.forward(told[:1], cache=cache)
    decoding = Decoding(model.ops, model.config, model.params, cache)
    for i in range(1, 4):
        drawn = decoding(told[i : i + 1], np.zeros(1))
        assert drawn == model.forward(told[: i + 1])[-1].argmax()
