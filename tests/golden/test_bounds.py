"""Bounds hold for correct implementations that were not used to make them, and are not much wider than these need."""

import re
from collections import defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minimoe.backends import make_backend
from minimoe.golden import bounds, verify
from minimoe.golden.calls import CALLS, GoldenModel, cast, run
from minimoe.golden.noise import Noise
from minimoe.golden.perturbing import noting, replaying
from minimoe.golden.profiles import PROFILES
from minimoe.params import map_leaves, stack_experts
from tests.draws import draw_config, draw_params, draw_tokens
from tests.golden.independent import ORDERS, Independent, ratios

NUMPY = make_backend("numpy")
BFLOAT16 = ml_dtypes.bfloat16
SIXTEEN = {
    "bfloat16": ("operands", BFLOAT16, False),
    "hf_bfloat16": ("results", BFLOAT16, False),
    "mistral_bfloat16": ("results", BFLOAT16, True),
    "float16": ("results", np.float16, False),
}


def implementations(profile):
    """Independent code in every order of sums, for one profile."""
    if profile == "float32":
        return {order: Independent(order) for order in ORDERS}
    return {order: Independent(order, *SIXTEEN[profile]) for order in ("sequential", "pairwise")}


def grid(x):
    """Numbers of eight significant bits, which every profile holds."""
    return np.asarray(x).astype(BFLOAT16).astype(np.float32)


def draw_op(call, rng):
    """Inputs of random shapes and sizes, and settings, for one op."""
    N, D, E, F = (int(rng.integers(1, high)) for high in (12, 80, 7, 40))
    k, K, G, C, B, T = (int(rng.integers(1, high)) for high in (E + 1, 3, 4, 9, 3, 14))

    def f(*shape):
        return grid(rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 2))

    ids = np.argsort(rng.random((N, E)), axis=1)[:, :k]
    routing = {"ids": ids, "weights": grid(rng.random((N, k)))}
    pos = np.tile(np.arange(T), (B, 1)) + int(rng.integers(0, 3000))
    window = None if rng.random() < 0.5 else int(rng.integers(1, 9))
    drawn = {
        "embedding": lambda: ({"tokens": rng.integers(0, E, N), "table": f(E, D)}, {}),
        "rmsnorm": lambda: ({"x": f(N, D), "weight": f(D), "residual": f(N, D)}, {"eps": 1e-5}),
        "linear": lambda: ({"x": f(N, D), "w": f(F, D)}, {}),
        "rope": lambda: ({"x": f(N, K, 2 * C), "positions": rng.integers(0, 999, N)}, {"theta": 1e4}),
        "attention": lambda: (
            {"q": f(B, T, K * G, 2 * C), "k": f(B, T, K, 2 * C), "v": f(B, T, K, 2 * C), "q_pos": pos, "k_pos": pos},
            {"window": window},
        ),
        "gating": lambda: ({"x": f(N, D), "gate": f(E, D), "ids": ids}, {"k": k}),
        "experts": lambda: ({"x": f(N, D), "w1": f(E, F, D), "w2": f(E, D, F), "w3": f(E, F, D)} | routing, {}),
        "cross_entropy": lambda: ({"logits": f(N, D), "targets": rng.integers(-1, D, N)}, {}),
        "balance_loss": lambda: ({"logits": f(3, N, E), "ids": np.stack([ids] * 3)}, {"form": "concatenated"}),
    }
    return drawn[call]()


def exact_run(call, inputs, settings, model=None):
    """The truth, and the experts chosen gate by gate."""
    ids = []
    wide = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in inputs.items()}
    return run(call, noting(NUMPY, ids), wide, settings, model), ids


def found_ratios(call, inputs, settings, profile, model=None):
    """Error over bound by implementation and output; those that route are given the golden choices."""
    truth, ids = exact_run(call, inputs, settings, model)
    limits = bounds.make(call, inputs, settings, model, truth, profile)
    found = {
        name: ratios(out, truth, limits)
        for name, one in implementations(profile).items()
        if (out := one.run(call, inputs, settings, model, ids or None)) is not None
    }
    kind = PROFILES[profile]
    for name in ("numpy", "numba") if kind.compute is not None else ():
        ours = replaying(make_backend(name), iter(ids))
        stored = model and GoldenModel(model.config, map_leaves(model.params, lambda w: w.astype(kind.store)))
        found[name] = ratios(
            run(call, ours, cast(call, inputs, kind.compute, kind.store), settings, stored), truth, limits
        )
    return found


def assert_hold(draws, least):
    """No ratio reaches 1, and the worst of every output over all draws is at least `least` where there is any error."""
    worst = defaultdict(float)
    for found in draws:
        for name, one in found.items():
            for output, ratio in one.items():
                assert ratio < 1, f"{name}: {output} is {ratio:.2f} bounds off"
                kind = re.sub(r"layers[.][0-9]+[.]", "", output)
                worst[kind] = max(worst[kind], ratio)
    wide = {output: round(ratio, 3) for output, ratio in worst.items() if 0 < ratio < least}
    assert not wide, f"bounds much wider than any implementation needs: {wide}"


OPS = ("embedding", "rmsnorm", "linear", "rope", "attention", "gating", "experts")
LOSSES = ("cross_entropy", "balance_loss")  # of training: float32


@pytest.mark.parametrize(
    ("call", "profile"), [(op, p) for op in OPS for p in ("float32", *SIXTEEN)] + [(op, "float32") for op in LOSSES]
)
def test_bounds_of_ops_hold_for_random_inputs_and_are_not_wide(call, profile):
    # Nearly all are above 0.1. Exceptions: sums of products of eight-bit numbers, which round seldom; float32 angles.
    rng = np.random.default_rng([len(call), *call.encode()])
    assert_hold((found_ratios(call, *draw_op(call, rng), profile) for _ in range(16)), least=0.04)


@pytest.mark.parametrize("profile", ["float32", *SIXTEEN])
def test_bounds_of_random_models_hold_and_are_not_wide(profile):
    def draw(seed):
        rng = np.random.default_rng([seed, 11])
        config = draw_config(rng)
        model = GoldenModel(config, map_leaves(draw_params(config, rng), lambda w: grid(w).astype(np.float64)))
        tokens, _ = draw_tokens(rng, config, T=int(rng.integers(2, 12)))
        return found_ratios("model", {"tokens": tokens}, {}, profile, model)

    assert_hold((draw(seed) for seed in range(4)), least=0.1)


def test_bounds_of_gradients_and_of_a_step_hold_for_our_backends():
    for seed in range(3):
        rng = np.random.default_rng([seed, 12])
        config = draw_config(rng)
        model = GoldenModel(config, map_leaves(draw_params(config, rng), lambda w: grid(w).astype(np.float64)))
        tokens, _ = draw_tokens(rng, config, B=2, T=6)
        settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
        for name, one in found_ratios("training", {"tokens": tokens}, settings, "float32", model).items():
            assert max(one.values()) < 1, name


def long_linear():
    rng = np.random.default_rng(4096)
    inputs = {"x": grid(rng.standard_normal((8, 4096))), "w": grid(rng.standard_normal((64, 4096)))}
    return inputs, exact_run("linear", inputs, {})[0]


def test_a_sum_of_4096_products_is_within_its_bound_in_any_order_and_close_to_it_in_the_worst():
    found = found_ratios("linear", long_linear()[0], {}, "float32")
    ratio = {name: one["y"] for name, one in found.items()}
    assert set(ratio) == {"sequential", "backwards", "pairwise", "strided", "numpy", "numba"}
    assert 0.1 <= max(ratio.values()) < 1


def test_noise_on_results_alone_would_fail_correct_code(monkeypatch):
    inputs, truth = long_linear()
    monkeypatch.setattr(Noise, "product", lambda self, a, b: self.disturbed(a @ b, self.accumulate))
    limits = bounds.make("linear", inputs, {}, None, truth, "float32")
    assert ratios(Independent("sequential").run("linear", inputs, {}), truth, limits)["y"] > 5
    assert ratios(run("linear", NUMPY, inputs, {}), truth, limits)["y"] > 1


def test_disturbed_runs_route_as_the_exact_one_does():
    """Two experts whose logits differ by less than the noise: unforced, half of the runs would choose the other."""
    rng = np.random.default_rng(3)
    x, row = grid(rng.standard_normal((40, 32))), rng.standard_normal(32)
    gate = np.stack([row, row * (1 + 1e-9), -row])
    inputs = {"x": x, "gate": gate}
    truth, _ = exact_run("gating", inputs, {"k": 1})
    runs = list(bounds.disturbed_runs("gating", inputs, {"k": 1}, None, "float32", 8, 0))
    for found in runs:
        np.testing.assert_array_equal(found["ids"], truth["ids"])
    flipped = [(np.argmax(found["logits"], axis=1) != truth["ids"][:, 0]).mean() for found in runs]
    assert 0.2 < np.mean(flipped) < 0.8


def test_routing_is_forced_through_chunks_layers_and_training():
    rng = np.random.default_rng(5)
    config = draw_config(rng, num_experts=4, num_experts_per_token=2, num_layers=2)
    params = stack_experts(draw_params(config, rng))
    for layer in params.layers:  # all experts equally good: every choice is a near-tie
        layer.feed_forward.gate = layer.feed_forward.gate[:1] * (1 + 1e-9 * rng.standard_normal((4, 1)))
    model = GoldenModel(config, params)
    inputs = {"tokens": rng.integers(0, config.vocab_size, (2, 6))}
    for call, settings, least in (
        ("model", {}, "logits"), ("model.chunks", {"chunks": [3, 1, 2], "max_length": 8}, "logits"),
    ):  # fmt: skip
        truth, _ = exact_run(call, inputs, settings, model)
        relative, _ = bounds.make(call, inputs, settings, model, truth, "float32")[least]
        assert relative < 1e-4


def test_bounds_are_the_same_for_the_same_seed_and_similar_for_another():
    inputs, truth = long_linear()
    first, again, other = (bounds.make("linear", inputs, {}, None, truth, "float32", seed=s)["y"] for s in (0, 0, 1))
    assert first == again != other
    assert other[0] == pytest.approx(first[0], rel=0.2)


def test_every_output_that_is_stored_in_floats_has_room_for_its_own_rounding():
    inputs = {"tokens": np.array([1, 0]), "table": grid(np.random.default_rng(0).standard_normal((3, 5)))}
    truth, _ = exact_run("embedding", inputs, {})
    units = {
        "float64": 2.0**-53,
        "float32": 2.0**-24,
        "bfloat16": 2.0**-24,
        "hf_bfloat16": 2.0**-8,
        "float16": 2.0**-11,
    }
    for profile, unit in units.items():
        relative, absolute = bounds.make("embedding", inputs, {}, None, truth, profile)["x"]
        assert relative == 2 * unit
        assert absolute == (2.0**-24 if profile == "float16" else 0)


def test_exact_outputs_have_no_bound():
    inputs = {"x": grid(np.ones((2, 3))), "gate": grid(np.eye(3))}
    truth, _ = exact_run("gating", inputs, {"k": 2})
    assert set(bounds.make("gating", inputs, {"k": 2}, None, truth, "float32")) == {"logits", "weights"}
    sampled = {"ids": np.array([1])}
    drawn = {"logits": np.ones((1, 3)), "uniform": np.zeros(1)}
    assert bounds.make("sampling", drawn, {"temperature": 0.0, "top_p": 1.0}, None, sampled, "float32") == {}


def test_a_truth_of_nothing_but_zeros_has_an_absolute_bound():
    errors = np.array([1e-9, 3e-9, 2e-9])
    relative, absolute = bounds.bound(errors, np.zeros(4), PROFILES["float32"])
    assert absolute == pytest.approx(2 * (2e-9 + 3 * 1e-9))
    assert relative == 2 * 2.0**-24
    assert bounds.bound(0 * errors, np.zeros(4), PROFILES["float32"])[1] == 0  # computed without a rounding: exact
    assert bounds.bound(errors, np.full(4, 2.0**-16), PROFILES["float16"])[1] == 2.0**-24


def test_what_the_truth_leaves_open_is_not_measured():
    assert bounds.largest_error(np.array([1.0, 9.0, -np.inf]), np.array([1.5, np.nan, -np.inf])) == 0.5


def test_float16_keeps_an_error_that_underflow_makes():
    """Gate weights of 2e-8 are a third of float16's smallest number: rounding them away is no mistake."""
    x = np.array([[1.0, 0.0]], np.float32)
    inputs = {"x": x, "gate": np.array([[17.5, 0], [0, 0]], np.float32)}
    truth, ids = exact_run("gating", inputs, {"k": 2})
    limits = bounds.make("gating", inputs, {"k": 2}, None, truth, "float16")
    assert limits["weights"][1] == 2.0**-24
    tiny = {"y": np.array(truth["weights"][:, 1:])}
    assert 0 < tiny["y"].max() < 2.0**-24
    found = Independent("sequential", "results", np.float16).run("gating", inputs, {"k": 2}, None, ids)
    assert ratios(found, truth, limits)["weights"] < 1


def test_float64_bounds_are_those_of_float32_in_its_own_unit():
    inputs, truth = long_linear()
    wide, narrow = (bounds.make("linear", inputs, {}, None, truth, p)["y"][0] for p in ("float64", "float32"))
    assert wide * 2.0**29 == pytest.approx(narrow, rel=0.2)
    inputs = {"x": grid(np.ones((1, 1, 8))), "positions": np.array([30000])}
    truth, _ = exact_run("rope", inputs, {"theta": 1e6})
    assert bounds.make("rope", inputs, {"theta": 1e6}, None, truth, "float64")["y"][0] > 1000 * 2.0**-53  # angles
    assert bounds.make("rope", inputs, {"theta": 1e6}, None, truth, "float32")["y"][0] < 10 * 2.0**-24  # are float64


def test_what_a_profile_cannot_compute_is_refused():
    with pytest.raises(ValueError, match="the profile float16 cannot compute this"):
        bounds.bound(np.array([1.0, np.inf]), np.ones(1), PROFILES["float16"])


def test_the_rule_is_what_its_docstring_says():
    u = 2.0**-24
    x = np.exp(np.random.default_rng(0).uniform(0, 8, 200_000))
    rounding = x.astype(np.float32).astype(np.float64) / x - 1
    assert np.sqrt((rounding**2).mean()) == pytest.approx(u / 2.4, rel=0.03)
    assert np.sqrt((Noise(u).draw((200_000,)) ** 2).mean()) == pytest.approx(1 / np.sqrt(3), rel=0.01)
    beyond = []
    for seed in range(8):
        inputs, settings = draw_op("attention", np.random.default_rng([seed, 2]))
        truth, _ = exact_run("attention", inputs, settings)
        limit = (
            bounds.make("attention", inputs, settings, None, truth, "float32")["out"][0] * np.abs(truth["out"]).max()
        )
        for found in bounds.disturbed_runs("attention", inputs, settings, None, "float32", 60, seed + 100):
            beyond.append(bounds.largest_error(found["out"], truth["out"]) > limit / bounds.SAFETY)
    assert np.mean(beyond) < 0.02


def test_a_large_model_is_not_widened_as_a_whole(monkeypatch):
    rng = np.random.default_rng(6)
    config = draw_config(rng, num_experts=3, num_experts_per_token=2, sliding_window=None)
    params = map_leaves(draw_params(config, rng, stacked=False), lambda w: w.astype(BFLOAT16))
    exact = GoldenModel(config, map_leaves(params, lambda w: w.astype(np.float64)))
    inputs = {"tokens": rng.integers(0, config.vocab_size, (1, 5))}
    truth, _ = exact_run("model", inputs, {}, exact)
    for profile in ("float32", "bfloat16", "hf_bfloat16"):
        whole = bounds.make("model", inputs, {}, exact, truth, profile)
        with monkeypatch.context() as patch:
            patch.setattr(bounds, "SMALL", 0)
            pieces = bounds.make("model", inputs, {}, GoldenModel(config, params), truth, profile)
        for name, (relative, _) in whole.items():
            assert pieces[name][0] == pytest.approx(relative, rel=0.7), name


KIT = Path(bounds.__file__).parent / "vectors"


@pytest.mark.parametrize("profile", ["float32", *SIXTEEN])
def test_independent_implementations_are_within_the_bounds_of_the_kit(profile):
    _, cases = verify.read_kit(KIT)
    seen = []
    for case in cases:
        if profile not in case.profiles or case.call not in CALLS or case.model is not None:
            continue  # models are held against the random ones above, and against the kit by the backends' tests
        limits = {o.name: o.bounds[profile] for o in case.outputs if o.kind == "float"}
        ids = [case.truth["ids"]] if case.call == "gating" else None
        for one in implementations(profile).values():
            if limits and (out := one.run(case.call, case.inputs, case.settings, None, ids)) is not None:
                seen += [(ratio, case.id, name) for name, ratio in ratios(out, case.truth, limits).items()]
    assert max(seen)[0] < 1, max(seen)
    assert np.median([ratio for ratio, _, _ in seen if ratio]) > 0.05
