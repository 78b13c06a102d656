"""Disturbed arithmetic has the errors it says: their size, their distribution, and where there are none."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from minimoe.backends import make_backend
from minimoe.golden.calls import GoldenModel, run
from minimoe.golden.noise import Noise, Noisy
from minimoe.golden.perturbing import magnified, perturbed
from minimoe.golden.profiles import PROFILES
from tests.draws import draw_config, draw_params, draw_tokens

U = 2.0**-24


def assert_uniform(r):
    """All of [-1, 1] with equal weight: by its deciles, to five standard errors."""
    assert np.abs(r).max() <= 1
    share = np.histogram(r, bins=10, range=(-1, 1))[0] / r.size
    np.testing.assert_allclose(share, 0.1, atol=5 * 0.3 / np.sqrt(r.size))


OPERATIONS = {
    "sum": lambda x: x + 1, "difference": lambda x: 1 - x, "product": lambda x: x * 3, "quotient": lambda x: 3 / x,
    "root": np.sqrt, "square": lambda x: x**2, "matrix product": lambda x: x @ np.eye(1),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_off_by_uniform_noise_of_one_unit_roundoff(name):
    x = np.full((20000, 1), 5.0)
    noisy = np.asarray(OPERATIONS[name](Noise(U).array(x, U)))
    assert_uniform((noisy / OPERATIONS[name](x) - 1) / U)


@pytest.mark.parametrize("function", [np.exp, np.log, np.sin, np.cos])
def test_library_functions_are_off_by_one_unit_in_the_last_place(function):
    x = np.full(20000, 2.0)
    assert_uniform((np.asarray(function(Noise(U).array(x, U))) / function(x) - 1) / (2 * U))


def test_selecting_moving_comparing_and_negating_are_exact():
    x = np.random.default_rng(0).standard_normal((6, 8))
    noisy = Noise(0.1).array(x, 0.1)
    ids = np.argsort(x, axis=1)
    pairs = [
        (-noisy, -x), (abs(noisy), abs(x)), (noisy.max(axis=1), x.max(axis=1)), (noisy.T[2:4], x.T[2:4]),
        (np.take_along_axis(noisy, ids, 1), np.take_along_axis(x, ids, 1)), (noisy > 0, x > 0),
        (np.where(x > 0, noisy, 0), np.where(x > 0, x, 0)), (np.concatenate([noisy, noisy]), np.concatenate([x, x])),
        (noisy.argsort(axis=1), ids), (noisy.astype(np.float32), x), (np.split(noisy, 2)[1], x[3:]),
    ]  # fmt: skip
    for found, expected in pairs:
        np.testing.assert_array_equal(np.asarray(found), expected)
    assert isinstance(pairs[4][0], Noisy)  # what is selected goes on being disturbed


def test_a_matrix_product_errs_in_every_product_and_every_partial_sum():
    x, w = np.array([[3.0, -1.0, 2.0, 5.0]]), np.array([[1.0], [4.0], [-7.0], [2.0]])
    products = (x[0] * w[:, 0]).tolist()
    partial = np.cumsum(products)
    variance = (np.sum(np.square(products)) + np.sum(partial[1:] ** 2)) / 3  # the first sum is a product: exact
    noise = Noise(U)
    errors = np.array([(noise.product(x, w) - x @ w)[0, 0] / U for _ in range(20000)])
    assert abs(errors.mean()) < 5 * np.sqrt(variance / errors.size)
    assert errors.var() == pytest.approx(variance, rel=0.05)


def test_a_sum_errs_in_every_partial_sum_but_where_nothing_is_added():
    noise, x = Noise(U), np.array([0.0, 4.0, 0.0, 0.0, 5.0, 0.0, -2.0])
    errors = np.array([float(noise.array(x, U).sum()) - 7 for _ in range(20000)]) / U
    assert errors.var() == pytest.approx((9**2 + 7**2) / 3, rel=0.05)
    assert noise.array(np.array([0.0, 1.0, 0.0]), U).sum() == 1.0
    mean = np.array([float(noise.array(x, U).mean()) - 1 for _ in range(20000)]) / U
    assert mean.var() == pytest.approx((9**2 + 7**2) / 3 / 49 + 1 / 3, rel=0.05)  # and one more for the division


@pytest.mark.parametrize("size", [17, 100, 700])
@pytest.mark.parametrize("kind", ["mixed signs", "one sign", "half zeros"])
def test_summed_noise_of_long_products_agrees_with_a_draw_for_every_one(size, kind):
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((6, size)), rng.standard_normal((size, 8))
    if kind == "one sign":
        a, b = abs(a), abs(b)
    if kind == "half zeros":
        a = np.where(rng.random(a.shape) < 0.5, 0, a)
    noise = Noise(U)
    every, summed = (np.stack([f(a, b) for _ in range(400)]) for f in (noise.every_error, noise.summed_errors))
    assert summed.std(axis=0).mean() == pytest.approx(every.std(axis=0).mean(), rel=0.05)
    # entry by entry, but for the sampling error of a standard deviation (1/√800) and the walk's shape within a block
    np.testing.assert_allclose(summed.std(axis=0), every.std(axis=0), rtol=0.35)
    assert np.abs(summed).max(axis=(1, 2)).mean() == pytest.approx(np.abs(every).max(axis=(1, 2)).mean(), rel=0.07)


def test_a_product_with_a_large_matrix_is_the_same_in_pieces(monkeypatch):
    monkeypatch.setattr("minimoe.golden.noise.PIECE", 100)
    a, b = np.random.default_rng(0).standard_normal((3, 20)), np.random.default_rng(1).standard_normal((20, 33))
    np.testing.assert_allclose(Noise(U).product(a, b), a @ b, atol=100 * U)


@pytest.mark.parametrize(("kind", "round_off"), [(ml_dtypes.bfloat16, 2.0**-8), (np.float16, 2.0**-11)])
def test_rounding_is_exact_for_numbers_of_the_format_and_noise_for_others(kind, round_off):
    x = np.random.default_rng(0).standard_normal(20000) * 10
    held = x.astype(kind).astype(np.float64)
    noise = Noise(U, round_off)
    assert np.abs(held / x - 1).max() <= round_off  # the unit roundoff is what the format says
    assert np.abs(held / x - 1).max() > 0.9 * round_off
    np.testing.assert_array_equal(noise.rounded(held), held)
    np.testing.assert_array_equal(noise.rounded(held * (1 + 4 * U)), held)  # noise of the 24th bit is rounded away
    np.testing.assert_array_equal(noise.rounded(np.array([0.0, -np.inf, 1.0])), [0.0, -np.inf, 1.0])
    inexact = x[held != x]
    assert_uniform((noise.rounded(inexact) / inexact - 1)[: inexact.size] / round_off)


def test_float16_underflow_is_an_absolute_error():
    noise = Noise(U, 2.0**-11, 2.0**-24)
    x = np.full(20000, 3.3 * 2.0**-24)
    found = noise.rounded(x)
    assert_uniform((found - x) / 2.0**-25)
    assert noise.rounded(np.full(20000, 0.2 * 2.0**-24)).min() == 0.0  # no rounding changes a sign
    steps = np.arange(1, 1000) * 2.0**-24
    np.testing.assert_array_equal(noise.rounded(steps), steps)
    just_normal = np.full(1000, 1.0003 * 2.0**-14)
    assert np.abs(noise.rounded(just_normal) / just_normal - 1).max() <= 2.0**-11


def test_of_two_units_the_finer_one_counts():
    noise = Noise(U, 2.0**-8)
    coarse, fine = noise.array(np.full(9, 1.3), 2.0**-8), noise.array(np.full(9, 1.7), U)
    assert (coarse * coarse).unit == 2.0**-8
    assert (coarse * fine).unit == (fine + coarse).unit == coarse.fine().unit == U
    mixed, square = np.asarray(coarse * fine), np.asarray(coarse * coarse)
    assert np.abs(mixed / (1.3 * 1.7) - 1).max() <= U < np.abs(square / 1.69 - 1).max()


def test_what_an_op_allocates_is_disturbed_too():
    """SwiGLU reads its halves from arrays that the reference allocates: noise must not end there."""
    ops = make_backend("numpy")
    x, w = np.full((1, 1), 2.0), np.full((1, 1, 1), 1.0)
    ids, weights = np.zeros((1, 1), int), np.ones((1, 1))
    exact = ops.experts.explain(x, w, w, w, ids, weights)["hidden"]
    noisy = perturbed(ops, PROFILES["float32"], 0)
    errors = np.ravel([noisy.experts.explain(x, w, w, w, ids, weights)["hidden"] / exact - 1 for _ in range(3000)]) / U
    # two products; z·sigmoid(z): exp, 1 + e, quotient, product; their product: nine errors of variance about 1/3 each
    assert 1.5 < errors.var() < 4


def roundings(profile, op, output, *args):
    """How many independent 16-bit roundings a scalar result has seen: its variance over that of one."""
    noisy, unit = perturbed(make_backend("numpy"), PROFILES[profile], 1), PROFILES[profile].round_off
    errors = np.array([np.ravel(output(op(noisy)(*args)))[0] for _ in range(1500)])
    return (errors / np.ravel(output(op(make_backend("numpy"))(*args)))[0] - 1).var() / (unit**2 / 3)


@pytest.mark.parametrize("profile", ["bfloat16", "hf_bfloat16", "mistral_bfloat16", "float16"])
def test_16_bit_profiles_round_as_often_as_they_say(profile):
    x, one = np.full((1, 2), 1.1), np.ones((1, 2))
    where, seat = np.zeros((1, 1), int), np.full((1, 1, 1, 2), 1.1)
    # how often results are rounded where a profile rounds results, and operands where it rounds those
    cases = {
        "linear": (1, 2, lambda o: o.linear.forward, lambda y: y[0], (x, [one * 1.3])),
        "norm: normalised, then scaled": (2, 0, lambda o: o.rmsnorm.forward, lambda y: y[0], (x, one[0] * 1.3, 1e-5)),
        "scores: the product, then scaled": (
            2, 2, lambda o: o.attention.explain, lambda y: y["scores"], (seat, seat, where, where, None),
        ),
    }  # fmt: skip
    for name, (results, operands, op, output, args) in cases.items():
        found = roundings(profile, op, output, *args)
        # an operand's two numbers have errors of their own, which makes half of the variance
        expected = operands / 2 if profile == "bfloat16" else results
        assert found == pytest.approx(expected, rel=0.2, abs=0.01), name


def test_mistral_rotates_without_rounding_on_the_way():
    x, positions = np.full((1, 1, 2), 1.1), np.array([1])
    args = (positions, 2, 1e4, np.float64)
    profiles = ("hf_bfloat16", "mistral_bfloat16")
    hf, mistral = (roundings(p, lambda o: o.rope.table, lambda tables: tables[0], *args) for p in profiles)
    assert hf == pytest.approx(1, rel=0.2)
    assert mistral < 1e-6
    cos, _ = make_backend("numpy").rope.table(*args)
    hf, mistral = (roundings(p, lambda o: o.rope.forward, lambda y: y, x, cos, cos / 3) for p in profiles)
    assert mistral == pytest.approx(1, rel=0.2)
    assert hf > 1.5


def test_float64_noise_is_made_larger_than_float64_itself_can_hold():
    x, residual = np.full((1, 20000), 1.1), np.full((1, 20000), 0.7)
    noisy = perturbed(make_backend("numpy"), PROFILES["float64"], 0)
    h = noisy.rmsnorm.forward(x, x[0], 1e-5, residual)[1]
    assert_uniform((h / (x + residual) - 1) / (2.0**-53 * magnified(PROFILES["float64"])))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("seed", range(3))
def test_without_noise_every_profile_computes_what_the_reference_does(name, seed):
    rng = np.random.default_rng([seed, 7])
    config = draw_config(rng)
    model = GoldenModel(config, draw_params(config, rng))
    tokens, mask = draw_tokens(rng, config, side="left" if seed == 1 else "none")
    inputs = {"tokens": tokens} | ({} if mask is None else {"mask": mask})
    ops = make_backend("numpy")
    unit = PROFILES[name].round_off and 2.0**-45
    silent = dataclasses.replace(PROFILES[name], accumulate=2.0**-70, round_off=unit, tiny=0.0)
    exact, found = (run("model", o, inputs, {}, model) for o in (ops, perturbed(ops, silent, 0)))
    assert list(found) == list(exact)
    for key, truth in exact.items():
        scale = np.abs(truth[np.isfinite(truth)]).max(initial=1)
        np.testing.assert_allclose(found[key], truth, atol=1e-9 * scale, rtol=0, err_msg=key)


def test_one_seed_makes_the_same_errors_again():
    ops, x, w = make_backend("numpy"), np.full((2, 9), 1.1), np.full((3, 9), 0.7)
    first, again, other = (perturbed(ops, PROFILES["float32"], s).linear.forward(x, [w])[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_what_an_op_writes_in_place_is_written():
    noisy = perturbed(make_backend("numpy"), PROFILES["float32"], 0)
    w, g, m, v = np.ones(3), np.full(3, 0.5), np.zeros(3), np.zeros(3)
    noisy.adamw.forward(w, g, m, v, step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    np.testing.assert_allclose(m, 0.05, rtol=1e-5)
    np.testing.assert_allclose(w, 0.9, rtol=1e-5)
    assert type(w) is np.ndarray
    assert (m != 0.05).all()
