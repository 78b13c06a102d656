import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.config import ModelConfig
from minimoe.params import from_named, leaves, map_leaves, named, random, shapes, stack_experts

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=6, intermediate_size=5, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    num_experts=3, num_experts_per_token=2,
)  # fmt: skip
DENSE = CONFIG.replace(dense=True, num_experts=1, num_experts_per_token=1)
TIED = CONFIG.replace(tie_embeddings=True)
POST_NORMS = CONFIG.replace(post_norms=True)


@pytest.fixture(params=[CONFIG, DENSE, TIED, POST_NORMS], ids=["sparse", "dense", "tied", "post-norms"])
def config(request):
    return request.param


def test_names_and_shapes_are_mistrals_in_the_order_of_the_forward():
    assert list(shapes(CONFIG.replace(num_layers=1, num_experts=2)).items()) == [
        ("tok_embeddings", (11, 6)),
        ("layers.0.attention_norm", (6,)),
        ("layers.0.attention.wq", (16, 6)),
        ("layers.0.attention.wk", (8, 6)),
        ("layers.0.attention.wv", (8, 6)),
        ("layers.0.attention.wo", (6, 16)),
        ("layers.0.ffn_norm", (6,)),
        ("layers.0.feed_forward.gate", (2, 6)),
        ("layers.0.feed_forward.experts.0.w1", (5, 6)),
        ("layers.0.feed_forward.experts.0.w2", (6, 5)),
        ("layers.0.feed_forward.experts.0.w3", (5, 6)),
        ("layers.0.feed_forward.experts.1.w1", (5, 6)),
        ("layers.0.feed_forward.experts.1.w2", (6, 5)),
        ("layers.0.feed_forward.experts.1.w3", (5, 6)),
        ("norm", (6,)),
        ("output", (11, 6)),
    ]


def test_post_norms_stand_after_what_they_norm():
    names = [name for name in shapes(POST_NORMS) if name.startswith("layers.0.")]
    assert [name for name in names if "norm" in name] == [
        f"layers.0.{name}" for name in ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")
    ]
    assert names[4:7] == ["layers.0.attention.wo", "layers.0.attention_post_norm", "layers.0.ffn_norm"]
    assert names[-2:] == ["layers.0.feed_forward.experts.2.w3", "layers.0.ffn_post_norm"]
    found = [name for name, _ in leaves(random(POST_NORMS, 0)) if name.startswith("layers.0.")]
    assert found[4:7] == names[4:7] and found[-2:] == ["layers.0.feed_forward.experts.w3", "layers.0.ffn_post_norm"]


def test_a_dense_model_has_neither_gate_nor_experts():
    inner = [name.removeprefix("layers.1.feed_forward.") for name in shapes(DENSE) if name.startswith("layers.1.feed")]
    assert inner == ["w1", "w2", "w3"]


def test_tied_embeddings_have_no_output():
    assert "output" not in shapes(TIED)
    params = random(TIED, 0)
    assert params.output is None and params.head is params.tok_embeddings
    untied = random(CONFIG, 0)
    assert untied.head is untied.output is not None


def test_every_parameter_is_named_once_and_has_its_shape(config):
    for params in (random(config, 0), stack_experts(random(config, 0))):
        found = list(named(params))
        assert {name: array.shape for name, array in found} == shapes(config)
        assert len(found) == len(shapes(config))
        assert {name for name, _ in found} == set(shapes(config))
        assert sum(leaf.size if isinstance(leaf, np.ndarray) else sum(w.size for w in leaf)
                   for _, leaf in leaves(params)) == config.num_parameters()  # fmt: skip


def test_names_lead_back_to_the_same_arrays(config):
    params = random(config, 0)
    arrays = dict(named(params))
    again = dict(named(from_named(config, arrays)))
    assert list(again) == list(arrays)
    assert all(again[name] is arrays[name] for name in arrays)


def test_a_missing_name_is_an_error(config):
    arrays = dict(named(random(config, 0)))
    for name in arrays:
        with pytest.raises(KeyError, match=name.replace(".", r"\.")):
            from_named(config, {other: a for other, a in arrays.items() if other != name})


def test_stacked_experts_hold_the_same_values(config):
    params = random(config, 0)
    stacked = stack_experts(params)
    for before, after in zip(params.layers, stacked.layers, strict=True):
        assert after.feed_forward.w1.shape == (config.num_experts, 5, 6)
        assert after.feed_forward.w1.flags.c_contiguous
        assert after.feed_forward.gate is before.feed_forward.gate
    for (name, one), (other, two) in zip(named(params), named(stacked), strict=True):
        assert name == other
        np.testing.assert_array_equal(one, two)
    assert stack_experts(stacked).layers[0].feed_forward.w1 is stacked.layers[0].feed_forward.w1


def test_leaves_give_the_experts_of_a_layer_as_one():
    names = [name for name, _ in leaves(stack_experts(random(CONFIG, 0)))]
    assert [name for name in names if "experts" in name] == [
        f"layers.{i}.feed_forward.experts.{w}" for i in range(2) for w in ("w1", "w2", "w3")
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("stacked", [False, True])
def test_map_leaves_changes_every_array_once(config, stacked):
    params = stack_experts(random(config, 0)) if stacked else random(config, 0)
    changed = map_leaves(params, lambda w: w + 1)
    for (name, one), (other, two) in zip(named(params), named(changed), strict=True):
        assert name == other
        np.testing.assert_array_equal(one + 1, two)
    assert isinstance(changed.layers[0].feed_forward.w1, list) == (not stacked)
    assert (changed.output is None) == config.tie_embeddings


def test_the_same_seed_draws_the_same_weights_and_another_others(config):
    one, same, other = (dict(named(random(config, seed))) for seed in (3, 3, 4))
    for name, array in one.items():
        np.testing.assert_array_equal(array, same[name])
        assert array.dtype == np.float32
        assert ("norm" in name) == np.array_equal(array, other[name])
        assert ("norm" in name) == bool((array == 1).all())


def test_every_tensor_has_a_stream_of_its_own():
    """Another depth or another number of experts leaves a tensor's direction as it was."""
    one, deeper = dict(named(random(CONFIG, 0))), dict(named(random(CONFIG.replace(num_layers=3, num_experts=4), 0)))
    for name, array in one.items():
        if name.endswith("gate"):
            continue
        scale = (2 / 3) ** 0.5 if name.endswith((".wo", ".w2")) else 1
        np.testing.assert_allclose(deeper[name], array * scale, rtol=1e-6)
    draws = [array.reshape(-1)[:6].tobytes() for name, array in one.items() if "norm" not in name]
    assert len(set(draws)) == len(draws)


def test_scales_keep_the_streams_variance_of_order_one():
    config = CONFIG.replace(hidden_size=64, intermediate_size=96, vocab_size=300, num_layers=4)
    expected = {"tok_embeddings": 1, "output": 64**-0.5, "wq": 64**-0.5, "gate": 64**-0.5, "w1": 64**-0.5,
                "wo": (16 * 8) ** -0.5, "w2": (96 * 8) ** -0.5}  # fmt: skip
    arrays = dict(named(random(config, 0)))
    for name, array in arrays.items():
        kind = name.rpartition(".")[2]
        if kind in expected:
            assert array.std() == pytest.approx(expected[kind], rel=0.15), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_other_types_hold_the_same_draws_rounded(dtype):
    for (_, array), (_, single) in zip(named(random(CONFIG, 0, dtype)), named(random(CONFIG, 0)), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, single.astype(dtype))
    assert random(CONFIG, 0, dtype).dtype == dtype
