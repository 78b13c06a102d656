"""The bundled model is a valid Hugging Face folder: transformers reads it and computes the same."""

import numpy as np
import pytest

import minimoe
from minimoe import texts
from minimoe.model import BUNDLED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers


def test_transformers_loads_the_bundled_model_and_agrees():
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED / "tiny", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ours = minimoe.load("tiny", dtype="float32", backend="numba")
    for name, text in texts.load().items():
        tokens = np.array([ours.tokenizer.encode(text)[:200]])
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        error = np.abs(ours.forward(tokens) - expected).max() / np.abs(expected).max()
        assert error < 2e-5, (name, error)
