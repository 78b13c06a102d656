"""transformers gets our weights and our tokens: it gives the same answers, in our process and in one of its own."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from minimoe.backends import make_backend  # noqa: E402
from minimoe.bench import peers, theirs  # noqa: E402
from minimoe.bench.models import Source  # noqa: E402
from minimoe.bench.plan import Order  # noqa: E402
from minimoe.bench.run import ALLOWED, run  # noqa: E402
from minimoe.bench.workloads import WORKLOADS, distance, task  # noqa: E402
from tests import small  # noqa: E402

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _settings():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("config", [small.SPARSE, small.DENSE, small.SPARSE.replace(tie_embeddings=True)])
@pytest.mark.parametrize("what", WORKLOADS)
def test_they_answer_as_we_do(what, config):
    wanted, source = task(what, config, 2, 9), Source(config, "float32")
    ours = WORKLOADS[what](make_backend("numba"), config, source.params(), wanted).answer()
    model = theirs.Theirs(source, 1)
    chosen = model.prepare(wanted)
    assert chosen == "dense" if config.dense else chosen in theirs.IMPLEMENTATIONS
    assert model.run() > 0 and model.peak() > 0
    answer = model.answer()
    assert answer.shape == ours.shape and distance(ours, answer) <= 1e-5
    model.prepare(wanted)  # once more: training must have left the weights as they were
    assert distance(ours, model.answer()) <= 1e-5


def test_in_bfloat16_they_are_as_close_as_its_rounding_allows():
    wanted, source = task("prefill", small.SPARSE, 4, 9), Source(small.SPARSE, "bfloat16")
    ours = WORKLOADS["prefill"](make_backend("numba"), small.SPARSE, source.params(), wanted).answer()
    model = theirs.Theirs(source, 1)
    model.prepare(wanted)
    assert 1e-5 < distance(ours, model.answer()) <= ALLOWED["bfloat16"]


def test_other_weights_give_another_answer():
    """So the comparison can fail."""
    wanted, source = task("prefill", small.SPARSE, 2, 9), Source(small.SPARSE, "float32")
    weights = source.params()
    weights.layers[1].feed_forward.w1[0][:] *= 1.1
    weights.layers[1].feed_forward.w1[3][:] *= 1.1
    weights.layers[1].attention.wo[:] *= 1.1
    ours = WORKLOADS["prefill"](make_backend("numpy"), small.SPARSE, weights, wanted).answer()
    model = theirs.Theirs(source, 1)
    model.prepare(wanted)
    assert distance(ours, model.answer()) > ALLOWED["float32"]


def test_copying_the_weights_of_every_token_is_for_few_tokens_only(monkeypatch):
    model = theirs.Theirs(Source(small.SPARSE, "float32"), 1)
    tried = []
    take = model._model.set_experts_implementation
    monkeypatch.setattr(model._model, "set_experts_implementation", lambda name: tried.append(name) or take(name))
    model.prepare(task("prefill", small.SPARSE, 2, 9))
    assert "batched_mm" not in tried
    model.prepare(task("decode", small.SPARSE, 2, 9))
    assert "batched_mm" in tried


@pytest.mark.slow
def test_a_run_beside_them_alternates_and_gives_ratios(quick, tmp_path):
    small.save(tmp_path / "model", dtype=np.float32)
    order = Order(
        preset=None, folder=str(tmp_path / "model"), contexts=(9,), what=("decode", "train"), rounds=1, threads=1,
        peers=("transformers",),
    )  # fmt: skip
    document = run(order)
    assert set(document["peer_versions"]) == {"torch", "transformers"}
    for entry in document["results"]:
        peer = entry["peer"]
        assert peer["right"] and peer["distance"] < 1e-5 and peer["peak_bytes"] > 50e6
        assert peer["ratio"]["median"] == pytest.approx(peer["seconds"]["median"] / entry["seconds"]["median"], rel=0.9)


def test_what_fails_there_is_said_here():
    peer = peers.Peer(Source(small.SPARSE, "float32"), 1)
    try:
        with pytest.raises(ValueError, match="transformers: AttributeError"):
            peer.ask("sing")
        assert peer.ask("rate", "float32", 64) > 0
    finally:
        peer.close()
    assert not peer._process.is_alive()
