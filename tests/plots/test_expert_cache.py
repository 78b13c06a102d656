"""The picture of caches of experts shows what was counted, whole, for any model."""

import numpy as np
import pytest

from minimoe import plots
from minimoe.expert_traffic import Traffic
from tests.plots.pictures import artists, assert_whole, random_ids


def traffic_of(L, E, k=2, calls=30):
    ids = tuple(random_ids(L, 7 if i == 0 else 1, E, k, seed=i) for i in range(calls))
    return Traffic(ids, np.full((L, E), 1000), 50)


def test_curves_are_the_hit_rates():
    traffic = traffic_of(3, 6)
    drawn = {gid: line for gid, line in artists(plots.expert_cache(traffic, seed=4), "").items() if gid}
    caches = traffic.layer_caches()
    expected = {f"layer-{i}": caches.hit_rate[i] for i in range(3)}
    expected |= {"all": caches.together.hit_rate, "chance": traffic.chance(seed=4)}
    expected["one-cache"] = traffic.one_cache().hit_rate[[2, 5, 8, 11, 14, 17]]
    assert drawn.keys() == expected.keys()
    for gid, rate in expected.items():
        x, y = drawn[gid].get_data()
        np.testing.assert_array_equal(x, np.arange(1, 7))
        np.testing.assert_allclose(y, 100 * rate)


@pytest.mark.parametrize(("L", "E", "k"), [(1, 1, 1), (2, 2, 1), (6, 8, 2), (32, 8, 2), (2, 64, 8)])
def test_it_is_whole(L, E, k):
    assert_whole(plots.expert_cache(traffic_of(L, E, k)))


def test_nothing_touched_is_refused():
    with pytest.raises(ValueError, match="no expert was touched"):
        plots.expert_cache(Traffic((), np.full((2, 4), 10), 0))
