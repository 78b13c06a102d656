"""Golden outputs of a small model in the bundled one's format: right backends pass, wrong ones do not."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from minimoe import checkpoint, golden_tiny, texts
from minimoe.backends import make_backend
from minimoe.model import BUNDLED, Model
from minimoe.tokenizer import Tokenizer
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("golden") / "model")
    golden_tiny.make(folder)
    return folder


def test_the_truth_is_the_float64_model_on_the_shipped_texts(folder):
    golden = checkpoint.load_tensors(folder / golden_tiny.FILE)
    config, params = checkpoint.load_params(folder, np.float64)
    model = Model(config, params, make_backend("numpy"), Tokenizer(small.TOKENIZER))
    for i, text in enumerate(texts.load().values()):
        tokens = model.tokenizer.encode(text)[:64]
        np.testing.assert_array_equal(golden["tokens"][i], tokens)
        trace = model.trace(tokens)
        np.testing.assert_allclose(golden["logits"][i], trace["logits"][0, 7::8], rtol=0, atol=1e-13)
        np.testing.assert_array_equal(golden["ids"][:, 64 * i : 64 * i + 64], trace.routing.ids)
    assert golden["logits"].dtype == np.float64


@pytest.mark.parametrize("dtype", [None, np.float32, np.float64])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_every_backend_is_within_the_bound(folder, backend, dtype):
    config, params = checkpoint.load_params(folder, dtype)
    compared = golden_tiny.compare(make_backend(backend), config, params, folder)
    assert compared.ratio <= 1
    assert compared.choices == 3 * 6 * 64
    assert compared.same_choices >= 0.97 * compared.choices
    if dtype is None:
        assert compared.error > 1e-4  # bfloat16 is not exact: no error would mean that nothing was compared


@pytest.mark.parametrize("mistake", ["a scale one percent off", "the second expert twice"])
def test_a_wrong_backend_is_beyond_the_bound(folder, mistake):
    ops = make_backend("numpy")
    config, params = checkpoint.load_params(folder)

    def forward(x, w1, w2, w3, ids, weights, *rest):
        if mistake == "a scale one percent off":
            weights = 1.01 * weights
        else:
            ids = np.repeat(ids[:, 1:], 2, axis=1)
        return ops.experts.forward(x, w1, w2, w3, ids, weights, *rest)

    wrong = dataclasses.replace(ops, experts=SimpleNamespace(forward=forward, backward=ops.experts.backward))
    params = golden_tiny._as(params, np.float32)
    assert golden_tiny.compare(wrong, config, params, folder).ratio > 2


def test_the_bound_is_twice_the_references_own_error(folder):
    golden = checkpoint.load_tensors(folder / golden_tiny.FILE)
    config, params = checkpoint.load_params(folder)
    compared = golden_tiny.compare(make_backend("numpy"), config, params, folder)
    assert compared.error == pytest.approx(golden["errors"][1])
    assert compared.bound == pytest.approx(2 * golden["errors"][1] + 8 * 2**-24 * np.sqrt(64))


def test_golden_outputs_of_other_weights_or_none_are_refused(folder, tmp_path):
    ops = make_backend("numpy")
    other = small.save(tmp_path / "other", small.SPARSE.replace(norm_eps=1e-4), dtype=np.float32)
    config, params = checkpoint.load_params(other)
    with pytest.raises(golden_tiny.GoldenError, match="there is no such file"):
        golden_tiny.compare(ops, config, params, other)
    (other / golden_tiny.FILE).write_bytes((folder / golden_tiny.FILE).read_bytes())
    with pytest.raises(golden_tiny.GoldenError, match="made for other weights"):
        golden_tiny.compare(ops, config, params, other)


@pytest.mark.skipif(not (BUNDLED / "tiny" / "config.json").exists(), reason="the bundled model is not trained yet")
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_bundled_model_is_within_its_bound(backend):
    config, params = checkpoint.load_params(BUNDLED / "tiny")
    assert golden_tiny.compare(make_backend(backend), config, params).ratio <= 1
