"""Pictures of routers show what was counted."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex

from minimoe import plots
from minimoe.colours import expert_colour
from minimoe.plots.paths import stands_out
from minimoe.shapes import Routing
from tests.plots.pictures import artists, random_ids, random_routing, written


def test_histograms_of_margins_and_entropies_count_every_token():
    routing = random_routing(3, 200, 8)
    routing.ids[1, :50] = -1  # not routed
    page = plots.router_distributions(routing, bins=20)
    for layer in range(3):
        logits = routing.logits[layer][routing.ids[layer, :, 0] >= 0]
        ordered = np.sort(logits, axis=-1)
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        values = {"margin": ordered[:, -2] - ordered[:, -3], "entropy": -(p * np.log2(p)).sum(axis=-1)}
        for kind, found in values.items():
            stairs = artists(page, f"{kind}-{layer}")[f"{kind}-{layer}"]
            heights, edges, base = stairs.get_data()
            counts, _ = np.histogram(found.clip(edges[0], edges[-1]), edges)
            drawn = base - heights
            np.testing.assert_allclose(drawn / drawn.max(), counts / counts.max(), atol=1e-12)
            median = artists(page, f"{kind}-median-")[f"{kind}-median-{layer}"]
            assert median.get_xdata()[0] == pytest.approx(np.median(found))


def test_pairs_below_the_diagonal_are_counted_by_hand():
    E, N = 5, 400
    ids = random_ids(1, N, E, seed=3)
    page = plots.expert_pairs(ids, E)
    numbers = {gid: text.get_text() for gid, text in artists(page, "pair-").items()}
    assert len(numbers) == E * (E - 1)
    for a, b in itertools.combinations(range(E), 2):
        seen = 100 * sum({a, b} == set(pair) for pair in ids[0].tolist()) / N
        assert numbers[f"pair-{b}-{a}"] == (f"{seen:.1f}" if seen < 9.95 else f"{seen:.0f}")
    above = [float(numbers[f"pair-{a}-{b}"]) for a, b in itertools.combinations(range(E), 2)]
    assert sum(above) == pytest.approx(100, abs=3)  # one pair a token; numbers are rounded


def test_bands_are_as_wide_as_the_tokens_that_go_that_way():
    ids = random_ids(3, 500, 4, seed=5)
    page = plots.token_paths(ids, 4)
    first = ids[..., 0]
    for layer, e in itertools.product(range(3), range(4)):
        bar = artists(page, "bar-")[f"bar-{layer}-{e}"]
        assert bar.get_height() == pytest.approx(0.75 * (first[layer] == e).mean())
        assert to_hex(bar.get_facecolor()) == expert_colour(e)
    for step in range(2):
        bands = artists(page, "paths-")[f"paths-{step}"].get_paths()
        widths = sorted(path.vertices[7, 1] - path.vertices[0, 1] for path in bands)
        ends = sorted(path.vertices[4, 1] - path.vertices[3, 1] for path in bands)
        counts = [
            ((first[step] == a) & (first[step + 1] == b)).mean() for a, b in itertools.product(range(4), range(4))
        ]
        np.testing.assert_allclose(widths, 0.75 * np.sort(counts))
        np.testing.assert_allclose(ends, widths)


def test_bands_leave_and_arrive_one_below_the_other_inside_their_experts_bars():
    ids = random_ids(2, 500, 4, seed=6)
    page = plots.token_paths(ids, 4)
    bars = {gid: bar.get_y() for gid, bar in artists(page, "bar-").items()}
    first, unit = ids[..., 0], 0.75 / 500
    leave, arrive = ({e: bars[f"bar-{layer}-{e}"] for e in range(4)} for layer in range(2))
    expected = []
    for a, b in itertools.product(range(4), range(4)):
        width = unit * ((first[0] == a) & (first[1] == b)).sum()
        expected.append((leave[a], arrive[b], width))
        leave[a], arrive[b] = leave[a] + width, arrive[b] + width
    bands = [path.vertices for path in artists(page, "paths-")["paths-0"].get_paths()]
    drawn = [(v[0, 1], v[3, 1], v[7, 1] - v[0, 1]) for v in bands]
    np.testing.assert_allclose(sorted(drawn), sorted(expected), atol=1e-12)


def test_a_band_is_coloured_only_if_it_is_wider_than_independence_gives_and_no_accident():
    counts, expected = np.array([[100, 30, 4, 20]]), np.array([[50.0, 25.0, 0.1, 40.0]])
    assert stands_out(counts, expected, 1.5).tolist() == [[True, False, False, False]]
    ids = np.array([[0] * 50 + [1] * 50, [0] * 50 + [1] * 50])[..., None]
    bands = artists(plots.token_paths(ids, 2), "paths-")["paths-0"]
    assert [to_hex(colour) for colour in bands.get_facecolors()] == [expert_colour(0), expert_colour(1)]
    assert all(colour[3] < 0.3 for colour in artists(plots.token_paths(random_ids(2, 400, 4), 4), "paths-")[
        "paths-0"
    ].get_facecolors())  # fmt: skip


def test_differences_are_counted_per_layer_and_by_margin():
    a = random_routing(3, 400, 8)
    ids = a.ids.copy()
    ids[1, a.margins[1] < 0.1, 1] = np.argsort(-a.logits[1], axis=-1)[a.margins[1] < 0.1, 2]  # the next best instead
    ids[2] = ids[2][:, ::-1]  # only the order changes: no difference
    page = plots.routing_differences(a, Routing(ids), bins=5)
    bars = artists(page, "differs-")
    differing = 100 * (a.margins[1] < 0.1).mean()
    assert [bars[f"differs-{i}"].get_height() for i in range(3)] == pytest.approx([0, differing, 0])
    shares, edges, _ = artists(page, "by-margin")["by-margin"].get_data()
    margins, different = a.margins.reshape(-1), np.zeros((3, 400), bool)
    different[1] = a.margins[1] < 0.1
    for i in range(5):
        low = -np.inf if i == 0 else edges[i]
        inside = (margins >= low) & (margins < edges[i + 1]) | (margins == edges[-1]) & (i == 4)
        assert inside.sum() == 240
        assert shares[i] == pytest.approx(100 * different.reshape(-1)[inside].mean())
    assert f"{int(different.sum())} of 1,200 choices" in " ".join(written(page))
    assert len(artists(page, "differing")["differing"].get_xdata()) == different.sum()
