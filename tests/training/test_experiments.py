"""The course's experiments: which models are trained, from which start, and what is kept of older curves."""

import json

import numpy as np
import pytest

from minimoe.backends import make_backend
from minimoe.params import named
from minimoe.training import experiments
from minimoe.training.loop import TrainConfig, new_state

TINY = experiments.variants("balance")["off"].replace(num_layers=2, hidden_size=16, head_dim=4, intermediate_size=8)


def test_the_balance_experiment_differs_in_the_loss_and_the_start_only():
    found = experiments.variants("balance")
    assert list(found) == ["off", "concatenated", "per_layer", "flat_off", "flat_concatenated", "flat_per_layer"]
    assert {name: (c.balance_form, c.balance_coefficient) for name, c in found.items() if "off" not in name} == {
        "concatenated": ("concatenated", 0.02), "per_layer": ("per_layer", 0.02),
        "flat_concatenated": ("concatenated", 0.01), "flat_per_layer": ("per_layer", 0.01),
    }  # fmt: skip
    assert found["off"].balance_coefficient == found["flat_off"].balance_coefficient == 0
    same = {c.replace(balance_form="per_layer", balance_coefficient=0.0) for c in found.values()}
    assert len(same) == 1


def test_the_work_of_a_token_is_the_same_in_all_models_of_the_sparsity_experiment():
    found = experiments.variants("sparsity")
    assert {c.num_experts_per_token * c.intermediate_size for c in found.values()} == {experiments.WIDTH}


def test_the_flat_start_has_one_deviation_for_all_matrices():
    params = new_state(make_backend("numpy"), TINY, TrainConfig(steps=1)).params
    for name, w in named(experiments.flat_start(params, 0)):
        if w.ndim == 1:
            assert (w == 1).all()
        elif w.size > 10_000:
            assert w.std() == pytest.approx(0.02, rel=0.05), name
    again = dict(named(experiments.flat_start(params, 0)))
    assert all(np.array_equal(w, again[name]) for name, w in named(experiments.flat_start(params, 0)))


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_keeps_its_curves(flat):
    rng = np.random.default_rng(0)
    streams = {name: rng.integers(3, TINY.vocab_size, 400) for name in ("a", "b")}
    held_out = {name: x[:64].reshape(2, 32).astype(np.int64) for name, x in streams.items()}
    train = TrainConfig(steps=4, batch_size=2, sequence_length=32, warmup=2)
    found = experiments.run_variant(make_backend("numpy"), TINY, train, streams, held_out, flat)
    assert found["measured"] == [4] and set(found["held_out"]) == {"a", "b"}
    share = np.array(found["shares"])
    assert share.shape == (1, 2, 8)
    np.testing.assert_allclose(share.sum(axis=-1), 1, atol=1e-3)
    assert found["balance"][0] >= 1.9


def test_older_curves_are_kept_only_beside_those_of_the_same_command(tmp_path):
    path = tmp_path / "balance.json"
    assert experiments._kept(path, "c") == {}
    path.write_text(json.dumps({"command": "c", "tokens": 1, "variants": {"off": {}}}))
    assert experiments._kept(path, "c") == {"off": {}}
    with pytest.raises(SystemExit, match="made by another command, 'c'"):
        experiments._kept(path, "d")


def test_an_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["balance", "--variants", "of"])
    assert "no variant 'of'; there are off, concatenated" in capsys.readouterr().err
