"""One step of decoding as a graph: how much it launches."""

import numpy as np
import pytest

import minimoe
from minimoe.config import ModelConfig
from minimoe.generate import Decoding
from tests.cuda_on_cpu.stand_in import STAND_IN

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    num_experts=4, max_length=128, bos_id=None, eos_id=None,
)  # fmt: skip


def operations(model, temperature, slots):
    """How many operations the graph of one step holds: kernels, and what array code stands for kernels."""
    cache = model.new_cache(1, slots)
    model.forward(np.arange(3), cache=cache)
    decoding = Decoding(model.ops, model.config, model.params, cache, temperature)
    for _ in range(2):  # as it stands, then captured
        decoding(np.zeros(1, np.int64), np.zeros(1))
    return len(decoding._replay._graph._operations)


# Of a layer: two norms, q k v at once, rotations and cache at once, attention, its output, the gate, the experts in
# two. In bfloat16 attention is two launches, since a probability is rounded after its sum is known; where keys are
# dealt to several blocks, here from 65 slots on, one more joins what these found.
# Around: embedding, angles, three for positions, norm, head, argmax, and two to go on.
PER_LAYER, AROUND = {("float32", 32): 9, ("bfloat16", 32): 10, ("float32", 128): 10, ("bfloat16", 128): 11}, 10


@pytest.mark.parametrize(("dtype", "slots"), PER_LAYER)
def test_a_layer_of_a_step_is_few_launches(cupy, dtype, slots):
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    found = []
    for layers in (1, 2):
        model = minimoe.random(CONFIG.replace(num_layers=layers), seed=0, backend="cuda", dtype=dtype)
        found.append(operations(model, 0.0, slots))
    assert found[1] - found[0] == PER_LAYER[dtype, slots]
    assert 2 * found[0] - found[1] == AROUND
