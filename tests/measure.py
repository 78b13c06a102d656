"""How far results are from the truth, and whether a gradient is the slope of its function."""

import importlib
import importlib.util

import numba
import numpy as np


def dialects(room):
    """The host dialects of a room that are written: each op's tests run on all of them."""
    names = [f"minimoe.ops.{room}.{dialect}" for dialect in ("reference", "numba_cpu")]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def with_one_thread(call):
    """The result of a call for which Numba has one thread."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        return call()
    finally:
        numba.set_num_threads(threads)


def relative_error(result, truth):
    """max |result - truth| / max |truth|; where the truth is all zero (or infinite where the result is), exact."""
    result, truth = np.asarray(result).astype(np.float64), np.asarray(truth).astype(np.float64)
    assert result.shape == truth.shape
    finite = np.isfinite(truth)
    if not np.array_equal(result[~finite], truth[~finite], equal_nan=True):
        return np.inf
    result, truth = result[finite], truth[finite]
    if not truth.size:
        return 0.0
    error, size = np.abs(result - truth).max(), np.abs(truth).max()
    if size == 0:
        return 0.0 if error == 0 else np.inf
    return float(error / size)


def assert_close(result, truth, tolerance=1e-12):
    """Both are arrays or numbers, or sequences of them in the same order."""
    if isinstance(truth, tuple | list):
        assert len(result) == len(truth)
        for one, other in zip(result, truth, strict=True):
            assert_close(one, other, tolerance)
        return
    error = relative_error(result, truth)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.2e}"


def assert_slopes(loss, inputs, gradients, seed=0, step=1e-3, tolerance=1e-8):
    """Hold gradients (float64) against central differences of `loss(*inputs)`, along three random directions each.

    Differences over one and two steps are combined so that the step's square drops out of the error (Richardson).
    The expected size of a slope along a direction of independent normal numbers is the norm of the gradient.
    """
    rng = np.random.default_rng(seed)
    assert len(inputs) == len(gradients)
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        assert gradient.shape == x.shape
        scale = max(np.linalg.norm(gradient), 1e-3)
        for _ in range(3):
            direction = rng.normal(size=x.shape)
            near, far = (
                loss(*inputs[:i], x + h * direction, *inputs[i + 1 :])
                - loss(*inputs[:i], x - h * direction, *inputs[i + 1 :])
                for h in (step, 2 * step)
            )
            slope = (8 * near - far) / (12 * step)
            error = abs(slope - (gradient * direction).sum()) / scale
            assert error <= tolerance, f"input {i}: slope off by {error:.2e} of the gradient's norm"


def as_dtype(value, dtype):
    """A copy with every float array in another type; sequences are searched."""
    if isinstance(value, tuple | list):
        return type(value)(as_dtype(item, dtype) for item in value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and value.dtype != np.bool_:
        return value.astype(dtype)
    return value


def assert_as_good_as_reference(draws, call, reference, dialect, n, dtype=np.float32):
    """The float32 error of a dialect is at most twice that of the reference, plus 8 u √n, pooled over all draws.

    `draws` yields inputs; `call(module, *inputs)` returns arrays. The truth is the reference in float64 on the same
    inputs, n the length of the longest reduction. Integers must be equal.
    """
    worst, reference_worst = {}, {}
    for inputs in draws:
        inputs = as_dtype(inputs, dtype)
        truth = call(reference, *as_dtype(inputs, np.float64))
        expected, found = call(reference, *inputs), call(dialect, *inputs)
        assert len(truth) == len(expected) == len(found)
        for i, (t, e, f) in enumerate(zip(truth, expected, found, strict=True)):
            if np.asarray(e).dtype.kind in "iu":
                np.testing.assert_array_equal(f, e)
                continue
            assert np.asarray(f).dtype == np.asarray(e).dtype
            reference_worst[i] = max(reference_worst.get(i, 0.0), relative_error(e, t))
            worst[i] = max(worst.get(i, 0.0), relative_error(f, t))
    for i, error in worst.items():
        allowed = 2 * reference_worst[i] + 8 * np.finfo(dtype).eps / 2 * np.sqrt(n)
        assert error <= allowed, f"output {i}: {error:.2e} > {allowed:.2e} (reference: {reference_worst[i]:.2e})"
