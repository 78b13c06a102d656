"""Our names and theirs: every tensor of ours has a row, and what the rows say of files is what is written."""

import re

import numpy as np
import pytest

from minimoe import checkpoint, params, trace
from minimoe.checkpoint.header import read_header
from minimoe.config import ModelConfig
from minimoe.golden import names

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=12, intermediate_size=5, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    num_experts=3, num_experts_per_token=1,
)  # fmt: skip
DENSE = CONFIG.replace(num_experts=1, num_experts_per_token=1, dense=True)
GROK = CONFIG.replace(
    tie_embeddings=True, activation="gelu_tanh", renormalise=False, attention_scale=0.5, attention_cap=2.0,
    embedding_multiplier=3.0, output_multiplier=0.5, post_norms=True,
)  # fmt: skip


def marked(name):
    return re.sub(r"experts\.\d+\.", "experts.M.", re.sub(r"layers\.\d+\.", "layers.N.", name))


@pytest.mark.parametrize("config", [CONFIG, DENSE, GROK])
def test_every_parameter_has_a_row_and_hugging_faces_names_are_those_written(config, tmp_path):
    checkpoint.save(tmp_path / "model", config, params.random(config, 0))
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        written = {marked(name) for name in read_header(file, "model.safetensors", "here")}
    ours = {marked(name) for name in params.shapes(config)}
    table = {p.ours: p.grok if config.post_norms else p.hugging_face for p in names.PARAMETERS}
    assert {table[name] for name in ours} == written


def test_the_rows_of_parameters_are_those_of_sparse_and_dense_models_and_no_others():
    ours = {marked(name) for config in (CONFIG, DENSE, GROK) for name in params.shapes(config)}
    assert [p.ours for p in names.PARAMETERS if p.ours not in ours] == []


@pytest.mark.parametrize("config", [CONFIG, DENSE, GROK])
def test_every_parameter_has_the_letters_of_its_shape(config):
    c = config
    sizes = {
        "V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size, "E": c.num_experts,
        "H·C": c.num_heads * c.head_dim, "K·C": c.num_kv_heads * c.head_dim,
    }  # fmt: skip
    table = {p.ours: p.letters for p in names.PARAMETERS}
    for name, shape in params.shapes(config).items():
        assert tuple(sizes[letter] for letter in table[marked(name)].split()) == shape, name


def test_the_intermediates_are_those_of_a_trace_in_its_order():
    in_layer_0 = [marked(name) for name in trace.names(GROK.replace(num_layers=1))]
    assert [i.ours for i in names.INTERMEDIATES] == in_layer_0


def test_every_intermediate_has_the_letters_of_its_shape():
    from minimoe import mixtral
    from minimoe.backends import make_backend

    tokens, c = np.arange(6).reshape(2, 3), GROK
    arrays = trace.record(make_backend("numpy"), c, params.random(c, 0), mixtral.check_inputs(tokens, 16))
    sizes = {
        "B": 2, "T": 3, "S": 3, "N": 6, "D": 12, "H": 2, "K": 1, "C": 4, "F": 5, "E": 3, "k": 1, "V": 16,
        "H·C": 8, "K·C": 4,
    }  # fmt: skip
    for name, array in arrays.items():
        assert tuple(sizes[letter] for letter in names.letters(name).split()) == array.shape, name


def test_letters_know_the_names_inside_a_block_and_refuse_others():
    assert names.letters("out") == "N D"
    assert names.letters("gating.ids") == names.letters("layers.7.gating.ids") == "N k"
    with pytest.raises(KeyError, match=r"no intermediate 'layers\.0\.gate'"):
        names.letters("layers.0.gate")


def test_the_note_on_interleaved_pairs_is_the_inverse_of_mistrals_order():
    C, H = 4, 2
    half_split = np.arange(H * C).reshape(H, C)
    interleaved = np.stack([half_split[:, : C // 2], half_split[:, C // 2 :]], axis=-1).reshape(H, C)
    assert "x.reshape(H, C/2, 2).swapaxes(1, 2).reshape(H, C)" in names.NOTES
    np.testing.assert_array_equal(interleaved.reshape(H, C // 2, 2).swapaxes(1, 2).reshape(H, C), half_split)
