"""The table of names holds for a live transformers model: hooks at its places yield our intermediates."""

import re

import numpy as np
import pytest

from minimoe import checkpoint, mixtral, params, trace
from minimoe.backends import make_backend
from minimoe.config import ModelConfig
from minimoe.golden import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers
CONFIG = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    num_experts=3, num_experts_per_token=2, bos_id=None, eos_id=None,
)  # fmt: skip
TOKENS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def ours():
    return params.random(CONFIG, 0)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "model"
    checkpoint.save(folder, CONFIG, ours)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def test_parameters_in_memory_are_where_the_table_says(ours, theirs):
    state = theirs.state_dict()
    sparse = [p for p in names.PARAMETERS if not p.only]
    arrays = dict(params.named(ours))
    for row in sparse:
        for layer in ["0", "1"]:
            place = (row.memory or row.hugging_face).replace(".N.", f".{layer}.").replace("M", "2")
            name, _, index = place.partition("[")
            found = eval(f"x[{index}", {"x": state[name], "F": CONFIG.intermediate_size}) if index else state[name]
            expected = arrays[row.ours.replace(".N.", f".{layer}.").replace(".M.", ".2.")]
            np.testing.assert_array_equal(found.numpy(), expected, err_msg=row.ours)


def test_hooks_at_the_places_of_the_table_yield_our_intermediates(ours, theirs):
    kept = {}

    def keep(name):
        def hook(module, args, output):
            kept[f"input of `{name}`"] = args[0] if args else None
            parts = output if isinstance(output, tuple) else (output,)
            kept[f"output of `{name}`"] = parts[0]
            kept.update({f"output[{i}] of `{name}`": part for i, part in enumerate(parts)})

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in theirs.named_modules() if name]
    with torch.no_grad():
        theirs(torch.from_numpy(TOKENS))
    for handle in handles:
        handle.remove()
    truth = trace.record(make_backend("numpy"), CONFIG, ours, mixtral.check_inputs(TOKENS, CONFIG.vocab_size))
    compared = 0
    for row in names.INTERMEDIATES:
        if place := re.match(r"(input|output)(\[\d\])? of `[^`]+`", row.hugging_face):
            for layer in ("0", "1"):
                found = kept[place[0].replace(".N.", f".{layer}.").replace(".N`", f".{layer}`")].numpy()
                expected = truth[row.ours.replace(".N.", f".{layer}.")]
                np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-6, err_msg=row.ours)
                compared += 1
    assert compared == 2 * 17


def test_the_specification_lists_the_deviations_of_transformers():
    from minimoe.golden import specification
    from minimoe.golden.examples.transformers_adapter import DEVIATIONS

    text = specification.README.read_text(encoding="utf-8")
    listed = re.findall(r"`([^`]+)`", text[text.index("## Known deviations") :])
    assert {case for deviation in DEVIATIONS for case in deviation.cases} <= set(listed)
