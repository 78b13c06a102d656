"""Pictures of training, of the cache and of speed show the numbers they were given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from minimoe import plots
from minimoe.colours import expert_colour
from minimoe.plots.roofline import _LINE, _free_box, attainable
from tests.plots.pictures import artists, written

RNG = np.random.default_rng(0)


def test_training_draws_every_logged_step_and_the_running_mean():
    steps = np.arange(10, 5010, 10)
    run = {"step": steps, "balance": 2 + RNG.random(500), "least_share": RNG.random(500)}
    page = plots.balance_over_training({"a": run})
    for kind in ("balance", "least_share"):
        lines = artists(page, f"{kind}-a")
        np.testing.assert_array_equal(lines[f"{kind}-a"].get_xdata(), steps)
        np.testing.assert_array_equal(lines[f"{kind}-a"].get_ydata(), run[kind])
        mean = [run[kind][max(i - 5, 0) : i + 6].mean() for i in range(500)]
        np.testing.assert_allclose(lines[f"{kind}-a-mean"].get_ydata(), mean)
    assert not artists(page, "loss-")


def test_areas_are_the_shares_stacked():
    shares = RNG.dirichlet(np.ones(4), (20, 2))
    page = plots.shares_over_training(np.arange(20), shares, layers=[1])
    below = np.zeros(20)
    for e in range(4):
        area = artists(page, "area-1-")[f"area-1-{e}"]
        assert to_hex(area.get_facecolor()[0]) == expert_colour(e)
        vertices = area.get_paths()[0].vertices
        for step in range(20):
            column = vertices[vertices[:, 0] == step, 1]
            assert column.min() == pytest.approx(below[step])
            assert column.max() == pytest.approx(below[step] + 100 * shares[step, 1, e])
        below += 100 * shares[:, 1, e]


def test_the_ring_shows_slots_positions_the_window_and_what_is_written_next():
    page = plots.cache_ring(np.array([8, 9, 10, 11, 4, 5, 6, 7]), 12, window=6)
    slots, numbers = artists(page, "slot-"), artists(page, "position-")
    assert {int(gid[9:]): int(t.get_text()) for gid, t in numbers.items()} == {
        0: 8, 1: 9, 2: 10, 3: 11, 4: 4, 5: 5, 6: 6, 7: 7,
    }  # fmt: skip
    hatched = {int(gid[5:]) for gid, wedge in slots.items() if wedge.get_hatch()}
    assert hatched == {4, 5, 6}  # position 12 sees 7 .. 12
    assert (slots["slot-0"].theta1, slots["slot-0"].theta2) == (45, 90)  # from the top, clockwise
    words = written(page)
    assert "position 12" in words and "→ slot 12 mod 8 = 4" in words and "which left the window" in words


def test_an_empty_ring_is_white():
    page = plots.cache_ring(np.full(4, -1), 0)
    assert {to_hex(w.get_facecolor()) for w in artists(page, "slot-").values()} == {"#ffffff"}
    assert not artists(page, "position-")


def test_the_roofline_draws_points_roofs_and_the_share_of_the_roof():
    intensity, speed = np.array([0.5, 20.0, 20.0]), np.array([10e9, 175e9, 50e9])
    page = plots.roofline(
        intensity, speed, ["norm", "qkv", "qkv"], ["a", "a", "b"],
        bandwidth={"a": 40e9, "b": 10e9}, peak={"a": 350e9, "b": 100e9},
    )  # fmt: skip
    points = artists(page, "point-")
    for n in range(3):
        assert points[f"point-{n}"].get_xdata()[0] == intensity[n] and points[f"point-{n}"].get_ydata()[0] == speed[n]
    assert {gid: t.get_text() for gid, t in artists(page, "of-roof-").items()} == {
        "of-roof-0": "50%", "of-roof-1": "50%", "of-roof-2": "50%",
    }  # fmt: skip
    roof = artists(page, "roof-a")["roof-a"]
    np.testing.assert_allclose(roof.get_ydata(), np.minimum(350e9, 40e9 * roof.get_xdata()))
    assert 350 / 40 in roof.get_xdata()


def test_a_roof_that_backends_share_has_the_colour_of_none():
    def colours(peak_of_b):
        page = plots.roofline(
            [1.0, 1.0], [1e9, 2e9], ["norm", "norm"], ["a", "b"],
            bandwidth={"a": 40e9, "b": 40e9}, peak={"a": 350e9, "b": peak_of_b},
        )  # fmt: skip
        points = [point.get_color() for point in artists(page, "point-").values()]
        return [roof.get_color() for roof in artists(page, "roof-").values()], points

    roofs, points = colours(300e9)
    assert roofs == points
    roofs, points = colours(350e9)
    assert len(set(roofs)) == 1 and not set(roofs) & set(points)


def test_what_is_attainable():
    np.testing.assert_allclose(attainable(np.array([1.0, 10.0, 1000.0]), 30e9, 350e9), [30e9, 300e9, 350e9])


@pytest.mark.parametrize("others", [[], [(2.4, 2)], [(2.4, 2), (1.6, 2)], [(2.4, 2), (1.6, 2), (1.9, 1.8), (2.2, 1.8)]])
def test_the_numbers_of_a_heap_hide_no_other_point(others):
    heap, half = np.array([[2.0, 2.0], [2.0, 2.05]]), 0.07
    marks = [np.stack([np.array(place) - half, np.array(place) + half]) for place in [*heap, *others]]
    box = _free_box(heap, 0.6, np.array([[0.0, 0.0], [4.0, 4.0]]), marks)
    assert all((box[0] >= mark[1]).any() or (mark[0] >= box[1]).any() for mark in marks)
    np.testing.assert_allclose(box[1] - box[0], (0.6, _LINE))
    if not others:
        assert box[0, 0] > heap[:, 0].max()


def test_the_numbers_of_a_heap_stay_within_the_frame():
    box = _free_box(np.array([[3.8, 3.9]]), 0.6, np.array([[0.0, 0.0], [4.0, 4.0]]), [])
    assert (box >= 0).all() and (box <= 4).all()
