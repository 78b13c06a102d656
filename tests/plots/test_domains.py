"""Pictures of domains show what was counted."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.colors import to_hex

from minimoe import plots, published, repetition
from minimoe.ablation import Ablation
from minimoe.colours import expert_colour
from minimoe.routing_statistics import shares
from minimoe.token_types import TYPES
from tests.plots.pictures import artists, random_ids, written


def test_bars_are_the_shares_counted_by_hand():
    ids = [random_ids(4, 300, 8, seed=g) for g in range(3)]
    page = plots.domain_shares(np.stack([shares(one, 8) for one in ids]), ["a", "b", "c"])
    bars = artists(page, "share-")
    assert len(bars) == 3 * 3 * 8
    for g, one in enumerate(ids):
        for layer in (0, 1, 3):
            counts = Counter(one[layer].reshape(-1).tolist())
            for e in range(8):
                bar = bars[f"share-{g}-{layer}-{e}"]
                assert bar.get_height() == pytest.approx(100 * counts[e] / 600)
                assert to_hex(bar.get_facecolor()) == expert_colour(e)


def test_a_domain_that_routed_nothing_has_no_bars():
    share = np.full((2, 1, 4), 0.25)
    share[1] = np.nan
    page = plots.domain_shares(share, ["a", "b"])
    assert len(artists(page, "share-")) == 4 and "nothing was routed" in written(page)


def test_repeats_stand_where_they_were_counted_beside_the_papers_figures():
    ids = {"a": random_ids(4, 500, 8), "b": np.repeat(random_ids(4, 250, 8, seed=1), 2, axis=1)}
    page = plots.repeated_assignments(repetition.repeat_table(ids, 8))
    for row, one in enumerate(ids.values()):
        for i, layer in enumerate((0, 1, 3)):
            first = 100 * np.mean([a[0] == b[0] for a, b in zip(one[layer], one[layer][1:], strict=False)])
            common = 100 * np.mean([bool(set(a) & set(b)) for a, b in zip(one[layer], one[layer][1:], strict=False)])
            for kind, value in (("first", first), ("any", common)):
                marks = artists(page, f"repeats-0-{kind}-rate-")[f"repeats-0-{kind}-rate-{i}"]
                assert marks.get_xdata()[row] == pytest.approx(value)
                line = artists(page, f"repeats-0-{kind}-interval-")[f"repeats-0-{kind}-interval-{i}"]
                (low, _), (high, _) = line.get_segments()[row]
                assert low <= value <= high
    for kind, at in (("first", 0), ("any", 1)):
        for i in range(3):
            marks = artists(page, f"repeats-1-{kind}-rate-")[f"repeats-1-{kind}-rate-{i}"]
            paper = [both[at][i] for both in published.MIXTRAL_REPEATS.values()]
            np.testing.assert_allclose(marks.get_xdata(), paper)
    chance = {kind: artists(page, f"repeats-0-{kind}-chance").popitem()[1].get_xdata()[0] for kind in ("first", "any")}
    assert chance["first"] == 12.5 and round(chance["any"], 1) == 46.4


def test_token_types_are_compared_with_each_experts_share():
    """Expert 0 takes all digits and half of the rest of 800 tokens: 250 of the 500 rest, 300 digits."""
    digit, word = TYPES.index("digit"), TYPES.index("word start")
    types = np.array([digit] * 300 + [word] * 500)
    ids = np.array([0] * 300 + [0, 1] * 250)[None, :, None]
    page = plots.token_type_specialisation(ids, types, 2, layers=[0])
    numbers = {gid: text.get_text() for gid, text in artists(page, "type-").items()}
    assert numbers == {"type-0-0": "50", "type-0-1": "50", "type-1-0": "100", "type-1-1": "0"}
    [values] = [axes.images[0].get_array() for axes in page.axes if artists(axes, "type-")]
    expert0 = 550 / 800
    expected = np.log2([[0.5 / expert0, 0.5 / (1 - expert0)], [1 / expert0, 1e-9]]).clip(-2, 2)
    np.testing.assert_allclose(values, expected)


def test_costs_are_written_in_hundredths_and_bold_where_they_are_sure():
    costs = np.array([[[0.104, -0.031], [np.nan, 0.0004]]])
    errors = np.array([[[0.01, 0.05], [np.nan, 0.1]]])
    page = plots.switched_off(Ablation(("a",), np.array([1.5]), costs, errors, np.full((1, 2, 2), 0.5)))
    texts = artists(page, "cost-")
    assert {gid: t.get_text() for gid, t in texts.items()} == {"cost-0-0": "10", "cost-0-1": "−3", "cost-1-1": "0"}
    assert [texts[gid].get_weight() for gid in ("cost-0-0", "cost-0-1", "cost-1-1")] == ["bold", "normal", "normal"]
    [image] = [axes.images[0].get_array() for axes in page.axes if artists(axes, "cost-")]
    np.testing.assert_allclose(np.ma.filled(image, np.nan)[0], costs[0, 0], atol=0.002)
    assert "a (1.50)" in written(page)
