"""What is said about the reading of experts is what was chosen, and what a cache of experts would really do."""

import itertools
import json
from collections import OrderedDict

import numpy as np
import pytest

import minimoe
from minimoe import checkpoint, cli
from minimoe.expert_traffic import Traffic, Watch, lru, weight_bytes
from minimoe.params import named
from tests import small

TOKENS = np.array([1, 5, 300, 9, 77])


def naive_lru(touches, sizes, n):
    """(hits, bytes read) of one cache, by the book."""
    cache, hits, read = OrderedDict(), 0, 0
    for touch in touches:
        if touch in cache:
            hits += 1
            cache.move_to_end(touch)
        else:
            read += sizes[touch]
            cache[touch] = True
            if len(cache) > n:
                cache.popitem(last=False)
    return hits, read


def traffic_of(calls, E):
    """Calls given as expert ids (L, N, k); expert e of layer l weighs 100 l + e + 1 bytes."""
    calls = tuple(np.array(ids) for ids in calls)
    return Traffic(calls, 100 * np.arange(len(calls[0]))[:, None] + np.arange(E) + 1, other_bytes=7)


def one_layer(*experts):
    """One layer, one token a call, one expert each."""
    return [[[[e]]] for e in experts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("models") / "sparse")


@pytest.mark.parametrize(("X", "A"), [(1, 5), (4, 0), (4, 1), (5, 200), (40, 500)])
def test_one_stack_serves_every_size_of_cache_as_a_cache_by_the_book_does(X, A):
    rng = np.random.default_rng(X)
    for _ in range(10):
        sizes = rng.integers(1, 1000, X)
        touches = rng.integers(0, X, A).tolist()
        cached = lru(touches, sizes)
        for n in range(1, X + 1):
            hits, read = naive_lru(touches, sizes, n)
            assert cached.bytes_read[n - 1] == read
            assert cached.hit_rate[n - 1] == hits / A if A else np.isnan(cached.hit_rate[n - 1])


def test_always_the_same_expert_misses_once():
    cached = lru([2] * 10, np.array([10, 20, 30]))
    assert cached.hit_rate.tolist() == [0.9] * 3
    assert cached.bytes_read.tolist() == [30] * 3


@pytest.mark.parametrize("X", [2, 5, 8])
def test_round_robin_hits_nothing_until_all_fit(X):
    cached = lru(list(range(X)) * 6, np.full(X, 10))
    assert cached.hit_rate.tolist() == [0.0] * (X - 1) + [5 / 6]
    assert cached.bytes_read.tolist() == [60 * X] * (X - 1) + [10 * X]


def test_even_and_independent_choices_of_one_expert_hit_n_times_in_E():
    E, A = 8, 20_000
    cached = lru(np.random.default_rng(0).integers(0, E, A).tolist(), np.ones(E, int))
    # a standard error is at most 0.0036
    np.testing.assert_allclose(cached.hit_rate, np.arange(1, E + 1) / E, atol=0.015)


def test_an_expert_that_many_tokens_of_a_call_share_is_read_once():
    calls = [[[[0, 1], [1, 2], [1, 0]]], [[[1, 3]]]]
    traffic = traffic_of(calls, 4)
    assert traffic.choices.tolist() == [[2, 4, 1, 1]]
    assert traffic.touches.tolist() == [[1, 2, 1, 1]]
    assert traffic.bytes.tolist() == [[1, 4, 3, 4]]
    assert traffic.tokens == 4
    assert traffic.bytes_per_token == (1 + 4 + 3 + 4 + 2 * 7) / 4
    assert traffic.share_touched == 1.0


def test_what_was_not_routed_is_not_counted():
    traffic = traffic_of([[[[-1, -1], [3, 0]], [[-1, -1], [3, 1]]]], 4)
    assert traffic.tokens == 1
    assert traffic.choices.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert traffic.touches.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert traffic.share_touched == 0.5
    assert (traffic.by_chance().ids[0][:, 0] == -1).all() and (traffic.by_chance().ids[0][:, 1] >= 0).all()


def test_caches_of_layers_see_their_own_layer_and_one_cache_sees_all():
    rng = np.random.default_rng(3)
    calls = [np.argsort(rng.random((3, N, 6)), axis=-1)[..., :2] for N in (5, 1, 1, 1, 2, 1, 1, 1, 1)]
    traffic = traffic_of(calls, 6)
    by_layer = [[e for ids in calls for e in sorted(set(ids[i].ravel().tolist()))] for i in range(3)]
    layers = traffic.layer_caches()
    for i, n in itertools.product(range(3), range(1, 7)):
        hits, read = naive_lru(by_layer[i], traffic.expert_bytes[i], n)
        assert layers.hit_rate[i, n - 1] == pytest.approx(hits / len(by_layer[i]))
        assert layers.bytes_read[i, n - 1] == read
    joined = [6 * i + e for ids in calls for i in range(3) for e in sorted(set(ids[i].ravel().tolist()))]
    one = traffic.one_cache()
    for n in range(1, 19):
        hits, read = naive_lru(joined, traffic.expert_bytes.reshape(-1), n)
        assert one.hit_rate[n - 1] == pytest.approx(hits / len(joined))
        assert one.bytes_read[n - 1] == read


def test_all_layers_together_count_every_touch_alike():
    traffic = traffic_of([[[[0, 1], [2, 3]], [[0, 1], [0, 1]]]] * 2, 4)  # 4 touches a call in one layer, 2 in the other
    caches = traffic.layer_caches()
    assert caches.touches.tolist() == [8, 4]
    assert caches.hits.tolist() == [[0, 0, 0, 4], [0, 2, 2, 2]]
    np.testing.assert_allclose(caches.together.hit_rate, np.array([0, 2, 2, 6]) / 12)
    assert caches.together.bytes_read.tolist() == caches.bytes_read.sum(axis=0).tolist()


def test_where_everything_fits_each_expert_touched_is_read_once():
    rng = np.random.default_rng(5)
    traffic = traffic_of([np.argsort(rng.random((2, 1, 5)), axis=-1)[..., :2] for _ in range(30)], 5)
    touched = (traffic.touches > 0) * traffic.expert_bytes
    assert traffic.layer_caches().bytes_read[:, -1].tolist() == touched.sum(axis=1).tolist()
    assert traffic.one_cache().bytes_read[-1] == touched.sum()


def test_chance_chooses_k_different_experts_evenly_for_as_many_tokens():
    traffic = traffic_of([np.tile([0, 1, 2], (2, 3000, 1))], 8)
    drawn = traffic.by_chance(seed=1)
    assert drawn.ids[0].shape == (2, 3000, 3)
    assert all(len(set(row)) == 3 for row in drawn.ids[0].reshape(-1, 3).tolist())
    np.testing.assert_allclose(drawn.choices / 9000, 1 / 8, atol=0.02)  # a standard error is 0.0029
    assert (traffic.by_chance(seed=1).ids[0] == drawn.ids[0]).all()
    assert (traffic.by_chance(seed=2).ids[0] != drawn.ids[0]).any()


def test_chance_is_what_choosing_one_expert_evenly_gives():
    E, calls = 4, 400
    rate = traffic_of(one_layer(*[0] * calls), E).chance(draws=30)
    # n of E once the cache is full: what is not yet full costs about n·ln(E/(E - n)) of the calls
    np.testing.assert_allclose(rate, np.arange(1, E + 1) / E, atol=0.03)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_watched_model_generates_the_same_and_notes_every_choice(folder, backend):
    model = minimoe.load(folder, backend=backend)
    watch = Watch(model)
    new = watch.model.generate_ids(TOKENS, max_new_tokens=6)
    np.testing.assert_array_equal(new, model.generate_ids(TOKENS, max_new_tokens=6))
    seen = np.concatenate(watch.traffic.ids, axis=1)
    routed = model.trace(np.concatenate([TOKENS, new[:-1]])).routing.ids
    np.testing.assert_array_equal(seen, routed)
    assert [ids.shape[1] for ids in watch.traffic.ids] == [5, 1, 1, 1, 1, 1]
    assert not watch.model.ops.graphs  # a device that replays a graph would call no Python


def test_forced_and_disabled_experts_are_noted_as_they_were_used(folder):
    watch = Watch(minimoe.load(folder, backend="numpy"))
    watch.model.forward(TOKENS, disabled_experts=[(layer, 3) for layer in range(3)])
    assert (watch.traffic.choices[:, 3] == 0).all()
    assert watch.traffic.choices.sum() == 3 * 5 * 2


def test_padding_is_not_noted(folder):
    watch = Watch(minimoe.load(folder, backend="numpy"))
    watch.model.forward(np.stack([TOKENS, TOKENS]), mask=np.array([[True] * 5, [False] * 4 + [True]]))
    assert watch.traffic.tokens == 6
    assert watch.traffic.choices.sum() == 3 * 6 * 2


def test_a_dense_model_has_one_expert_which_every_call_touches(tmp_path):
    watch = Watch(minimoe.load(small.save(tmp_path / "dense", small.DENSE), backend="numpy"))
    watch.model.generate_ids(TOKENS, max_new_tokens=4)
    traffic = watch.traffic
    assert traffic.touches.tolist() == [[4]] * 3
    assert traffic.choices.tolist() == [[8]] * 3
    assert traffic.layer_caches().hit_rate.tolist() == [[0.75]] * 3
    assert traffic.chance().tolist() == [0.75]


def test_nothing_generated_is_nothing_read(folder):
    traffic = Watch(minimoe.load(folder, backend="numpy")).traffic
    assert traffic.touches.sum() == traffic.choices.sum() == traffic.tokens == 0
    assert traffic.layer_caches().bytes_read.sum() == 0
    assert np.isnan(traffic.bytes_per_token) and np.isnan(traffic.one_cache().hit_rate).all()


def test_a_call_that_was_interrupted_does_not_count(folder):
    watch = Watch(minimoe.load(folder, backend="numpy"))
    layers = watch.model.params.layers
    held = layers[1].feed_forward.gate
    layers[1].feed_forward.gate = held[:, :-1]  # fails in the second of three layers
    with pytest.raises((ValueError, TypeError)):
        watch.model.forward(TOKENS)
    layers[1].feed_forward.gate = held
    watch.model.forward(TOKENS)
    (ids,) = watch.traffic.ids
    np.testing.assert_array_equal(ids, watch.model.trace(TOKENS).routing.ids)


@pytest.mark.parametrize("dtype", [None, "float32", "int8"])
def test_bytes_are_those_of_the_arrays(folder, dtype):
    model = minimoe.load(folder, backend="numpy", dtype=dtype)
    experts, others = weight_bytes(model.params)
    sizes = {name: int(array.nbytes) for name, array in named(model.params)}
    for i, e in itertools.product(range(3), range(8)):
        prefix = f"layers.{i}.feed_forward.experts.{e}."
        assert experts[i, e] == sum(size for name, size in sizes.items() if name.startswith(prefix))
    assert experts.sum() + others + sizes["tok_embeddings"] == sum(sizes.values())


def test_a_tied_head_is_read_whole():
    config = small.SPARSE.replace(tie_embeddings=True)
    params = minimoe.random(config, backend="numpy").params
    others = weight_bytes(params)[1]
    sizes = {name: array.nbytes for name, array in named(params)}
    assert others == sum(size for name, size in sizes.items() if ".experts." not in name)


def test_bytes_of_a_mapped_checkpoint_add_up_to_its_tensors(folder):
    experts, others = weight_bytes(minimoe.load(folder, backend="numpy").params)
    headers = checkpoint.headers(folder)
    table = next(info.nbytes for info in headers.tensors if "embed_tokens" in info.name)
    assert experts.sum() + others + table == headers.nbytes


# ---- minimoe generate --stats


def generate(capsys, folder, *flags, backend="numpy"):
    """Run the command on a folder; return its status, stdout and stderr."""
    arguments = ["generate", "def add", "--model", str(folder), "--max-new-tokens", "6", "--backend", backend, *flags]
    return cli.main(arguments), *capsys.readouterr()


def test_stats_are_those_of_the_library_and_the_text_is_unchanged(folder, capsys):
    plain = generate(capsys, folder)
    status, out, err = generate(capsys, folder, "--json", "--stats")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["text"] + "\n" == plain[1]
    watch = Watch(minimoe.load(folder, backend="numpy"))
    watch.model.generate("def add", max_new_tokens=6)
    traffic, stats = watch.traffic, found["stats"]
    assert stats["touches"] == traffic.touches.tolist()
    assert stats["bytes"] == traffic.bytes.tolist()
    assert stats["choices"] == traffic.choices.tolist()
    assert stats["calls"] == 6 and stats["tokens"] == found["prompt_tokens"] + 5
    np.testing.assert_allclose(stats["lru_per_layer"]["hit_rate"], traffic.layer_caches().hit_rate)
    np.testing.assert_allclose(stats["lru_per_layer"]["chance"]["hit_rate"], traffic.chance())
    np.testing.assert_allclose(stats["lru_over_layers"]["hit_rate"], traffic.one_cache().hit_rate)
    assert stats["mapped_bytes"] == (folder / "model.safetensors").stat().st_size
    assert "stats" not in json.loads(generate(capsys, folder, "--json")[1])


def test_the_table_has_a_row_per_layer_and_the_json_figures(folder, capsys):
    stats = json.loads(generate(capsys, folder, "--json", "--stats")[1])["stats"]
    lines = generate(capsys, folder, "--stats")[1].splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines}
    for i in range(3):
        touched = sum(count > 0 for count in stats["touches"][i])
        read = f"{sum(stats['bytes'][i]) / 1e6:,.1f}"
        rates = [f"{100 * rate:.1f}" for rate in stats["lru_per_layer"]["hit_rate"][i]]
        assert rows[str(i)] == [str(i), str(touched), str(sum(stats["touches"][i])), read, *rates]
    one = stats["lru_over_layers"]["hit_rate"]
    assert rows["one cache"][2:] == [f"{100 * one[3 * n - 1]:.1f}" for n in range(1, 9)]
    touched = sum(count > 0 for layer in stats["touches"] for count in layer)
    assert any(line.startswith(f"experts touched: {touched} of 24") for line in lines)
    assert (stats["memory"] is None) == (not any(line.startswith("memory, at most: ") for line in lines))


@pytest.mark.parametrize("flags", [["--max-new-tokens", "0"], ["--max-new-tokens", "1"]])
def test_stats_of_next_to_nothing_are_said_too(folder, capsys, flags):
    status, out, _ = generate(capsys, folder, "--stats", *flags)
    assert status == 0 and "experts touched: " in out
    status, out, _ = generate(capsys, folder, "--stats", "--json", *flags)
    assert status == 0 and json.loads(out)["stats"]["calls"] == int(flags[1])


def test_stats_of_a_dense_model_and_of_many_experts_are_said_too(tmp_path, capsys):
    dense = small.save(tmp_path / "dense", small.DENSE)
    assert "experts touched: 3 of 3 (100.0 %), in 18 reads" in generate(capsys, dense, "--stats")[1]
    many = small.save(tmp_path / "many", small.SPARSE.replace(num_experts=48))
    head = next(line for line in generate(capsys, many, "--stats")[1].splitlines() if line.startswith("layer"))
    assert head.split("MB")[1].split() == ["n", "=", "1", "2", "4", "8", "16", "32", "48"]


def test_a_figure_is_drawn_or_refused_before_anything_is_generated(folder, capsys, tmp_path):
    status, out, err = generate(capsys, folder, "--figure", str(tmp_path / "cache.png"))
    assert status == 0 and "touched" not in out and err == f"wrote {tmp_path / 'cache.png'}\n"
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = generate(capsys, folder, "--figure", str(tmp_path / "cache.txt"))
    assert (status, out) == (2, "") and "the name must end in .png" in err
