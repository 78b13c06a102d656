"""Symptoms: what wrong outputs look like where no known mistake explains them."""

import numpy as np
import pytest

from minimoe.golden import report
from minimoe.golden.symptoms import find
from minimoe.golden.verify import read_kit

CASE = next(case for case in read_kit(report.VECTORS)[1] if case.id == "linear/wide")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        # Neither a factor of 1 nor the order 0, 1, 2 is worth naming.
        (lambda x, w: (x.astype(np.float16) @ w.astype(np.float16).T).astype(np.float32), "looks-like-16-bits"),
        (lambda x, w: 0.5 * x @ w.T, "scaled-by-0.5"),
        (lambda x, w: (x @ w.T)[::-1], "permuted"),
    ],
)
def test_what_was_done_to_the_outputs_is_named(change, name):
    outputs = {"y": change(CASE.inputs["x"].astype(np.float32), CASE.inputs["w"].astype(np.float32))}
    assert [symptom.name for symptom in find([(CASE, outputs)], "float32")] == [name]
