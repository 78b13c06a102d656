"""The tests here skip themselves where torch or transformers are missing; other files hold no doctests."""

import pytest

collect_ignore_glob = ["[!t]*.py"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def errors():
    """Collects the errors of all cases; `pytest -s` prints the largest."""
    found = []
    yield found
    print(f"\nlargest relative error of {len(found)} comparisons: {max(found, default=0):.1e}")
