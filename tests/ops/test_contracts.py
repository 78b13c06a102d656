"""The dialects keep their contracts, and the check of shapes that runs beside all tests catches what it should."""

import inspect

import numpy as np
import pytest

from minimoe.ops.experts import reference as experts
from minimoe.ops.linear import reference as linear
from minimoe.ops.rmsnorm import reference as rmsnorm
from tests.conftest import DIALECTS, ROOMS, launchers, module_of


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("room", ROOMS)
def test_a_dialect_repeats_the_signatures_of_its_contract(room, dialect):
    module = module_of(room, dialect)
    if module is None:
        pytest.skip("not written")
    for name, promise in launchers(room).items():
        if dialect == "cupy_gpu" and name not in vars(module):
            continue  # the switchboard runs the reference over CuPy
        wanted, found = inspect.signature(promise), inspect.signature(getattr(module, name))
        assert list(found.parameters.values()) == list(wanted.parameters.values())[1:]  # without self
        assert found.return_annotation == wanted.return_annotation


def test_twelve_rooms_have_a_contract_and_a_reference():
    assert len(ROOMS) == 12
    assert all(launchers(room) and module_of(room, "reference") for room in ROOMS)


def test_a_wrong_size_is_caught():
    with pytest.raises(TypeError, match="argument weight"):
        rmsnorm.forward(np.zeros((2, 3)), np.zeros(4), 1e-5)


def test_a_wrong_dtype_is_caught():
    with pytest.raises(TypeError, match="argument x"):
        rmsnorm.forward(np.zeros((2, 3), int), np.zeros(3), 1e-5)


def test_a_wrong_array_in_a_list_is_caught():
    with pytest.raises(TypeError, match="argument weights"):
        linear.forward(np.zeros((2, 3)), [np.zeros((4, 3)), np.zeros((4, 2))])


def test_a_wrong_stacked_array_is_caught():
    x, w1, w2 = np.zeros((1, 3)), np.zeros((2, 5, 3)), np.zeros((2, 3, 5))
    ids, weights = np.zeros((1, 1), int), np.ones((1, 1))
    experts.forward(x, w1, w2, w1, ids, weights)
    with pytest.raises(TypeError, match="argument w2"):
        experts.forward(x, w1, w1, w1, ids, weights)
