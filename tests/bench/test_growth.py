"""The four curves: every point is what its label says, and the prediction grows as the architecture does."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from minimoe import cli, plots
from minimoe.backends import make_backend
from minimoe.bench import growth, limits
from minimoe.bench.models import Source
from minimoe.bench.plan import Order
from minimoe.bench.workloads import task
from tests.bench.documents import FixedProbe
from tests.bench.test_work import SMALL
from tests.plots.pictures import artists, assert_whole

CONFIG = SMALL.replace(max_length=4097)


@pytest.fixture
def small_axes(quick, monkeypatch):
    monkeypatch.setattr(growth, "CONFIG", CONFIG)
    monkeypatch.setattr(growth, "AXES", {name: values[:3] for name, values in growth.AXES.items()})


def of(points, axis, what):
    return [point[what] for point in points if point["axis"] == axis]


def test_predictions_grow_as_the_architecture_does(small_axes):
    """The probe is fixed, so predictions are exact: all of these steps are bound by memory."""
    points = growth.run(Order(rounds=1))["points"]
    flat = of(points, "experts", "predicted")  # but for the gate's rows
    row = CONFIG.num_layers * CONFIG.hidden_size * 4 / 10e9
    np.testing.assert_allclose(np.diff(flat), [2 * row, 4 * row])
    one, two, four = of(points, "chosen", "predicted")
    assert four - two == pytest.approx(2 * (two - one)) and two > one
    near, middle, far = of(points, "context", "predicted")
    assert (far - middle) / (middle - near) == pytest.approx((4096 - 2048) / (2048 - 128), rel=0.02)
    touched = of(points, "batch", "touched")
    assert touched == sorted(touched) and touched[0] == 2


def test_a_curve_is_of_one_machine_also_where_its_memory_gets_slower(small_axes, monkeypatch):
    class Slower(FixedProbe):
        reads = itertools.count(1)

        def bandwidth(self):
            return super().bandwidth() / next(self.reads)

    monkeypatch.setattr(growth, "AXES", {"chosen": (1, 2, 4)})
    monkeypatch.setitem(limits.PROBES, "cpu", Slower)
    one, two, four = of(growth.run(Order(rounds=3))["points"], "chosen", "predicted")
    assert four - two == pytest.approx(2 * (two - one)) and two > one


def test_the_filled_cache_costs_what_a_read_one_does():
    config = SMALL.replace(max_length=64)
    params, wanted = Source(config, "float32").params(), task("decode", config, 2, 40)
    filled, read = (kind(make_backend("numpy"), config, params, wanted) for kind in (growth.Filled, growth.Decode))
    assert filled._cache.lengths.tolist() == [40, 40]
    assert (filled._cache.positions[:, :40] == np.arange(40)).all()
    assert filled.work().cache == read.work().cache
    assert all(held[:, :40].any() for layer in filled._cache.layers for held in (layer.k, layer.v))


def test_the_command_draws_and_keeps_them(small_axes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--growth", "curves.png", "--rounds", "1", "--out", "curves.json"]) == 0
    document = json.loads((tmp_path / "curves.json").read_text())
    assert document["command"] == "minimoe bench --growth curves.png --rounds 1"
    assert [(point["axis"], point["value"]) for point in document["points"]] == [
        (axis, value) for axis, values in growth.AXES.items() for value in values
    ]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 600
    assert len(capsys.readouterr().out.splitlines()) >= 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", "tiny"], "leave out --preset"), (["--what", "decode"], "leave out --what"),
        (["--dtype", "float32", "bfloat16"], "one backend and one dtype"), (["--rounds", "0"], "--rounds must be"),
        (["--dtype", "float8"], "dtype must be one of"),
    ],
)  # fmt: skip
def test_what_it_does_not_take(words, told, capsys, tmp_path):
    assert cli.main(["bench", "--growth", str(tmp_path / "curves.png"), *words]) == 2
    assert told in capsys.readouterr().err


def test_the_figure_shows_the_points():
    points = [
        {"axis": axis, "value": value, "seconds": 1e-3 * value, "predicted": 0.8e-3 * value, "touched": value / 2}
        for axis in growth.AXES
        for value in (1, 2, 16)
    ]
    page = plots.cost_growth(points)
    assert_whole(page)
    for axis in growth.AXES:
        measured, predicted = (artists(page, f"{what}-{axis}") for what in ("measured", "predicted"))
        np.testing.assert_allclose(measured[f"measured-{axis}"].get_ydata(), [1, 2, 16])
        np.testing.assert_allclose(predicted[f"predicted-{axis}"].get_ydata(), [0.8, 1.6, 12.8])
    assert [text.get_text() for text in artists(page, "touched-").values()] == ["0.5", "1", "8"]
    with pytest.raises(ValueError, match="none of batch"):
        plots.cost_growth([point for point in points if point["axis"] != "batch"])
