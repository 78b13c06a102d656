"""The table of repetitions: its numbers, its intervals, and its three forms."""

import csv
import io
import re

import numpy as np
import pytest

from minimoe import repetition
from minimoe.repetition import mixtral_repeats, repeat_table
from minimoe.routing_statistics import repeats

RNG = np.random.default_rng(0)


def random_ids(L, N, E, k=2):
    return np.argsort(RNG.random((L, N, E)), axis=-1)[..., :k]


def test_the_table_holds_what_repeats_counts():
    ids = {"a": random_ids(3, 300, 8), "b": random_ids(3, 100, 8)}
    table = repeat_table(ids, 8)
    for name, one in ids.items():
        for kind, rate in zip(("first", "any"), repeats(one), strict=True):
            np.testing.assert_array_equal(table.rows[name][kind].rate, rate)
            assert (table.rows[name][kind].low <= rate).all() and (rate <= table.rows[name][kind].high).all()
    assert table.chance["first"] == 1 / 8 and table.chance["any"] == pytest.approx(1 - 15 / 28)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """200 texts of 1920 even and independent tokens: the rate is 1/4, and 95% intervals should miss it in about 5%."""
    texts = {str(i): RNG.integers(0, 4, (1, 1920, 1)) for i in range(200)}
    rows = repeat_table(texts, 4, resamples=400).rows.values()
    missed = np.mean([not row["first"].low[0] <= 0.25 <= row["first"].high[0] for row in rows])
    assert 0.01 < missed < 0.12


def test_intervals_are_as_wide_as_the_binomial_where_tokens_are_independent_and_wider_where_they_are_not():
    free = RNG.integers(0, 4, (1, 6400, 1))
    runs = np.repeat([0, 1] * 50, 64)[None, :, None] * RNG.integers(0, 4, (1, 6400, 1))  # half the units are constant
    for ids, factor in ((free, (0.7, 1.3)), (runs, (2.5, 20))):
        row = repeat_table({"x": ids}, 4).rows["x"]["first"]
        binomial = 2 * 1.96 * np.sqrt(row.rate[0] * (1 - row.rate[0]) / 6399)
        assert factor[0] < (row.high[0] - row.low[0]) / binomial < factor[1]


def test_units_stay_inside_documents():
    documents = np.array([5] * 7 + [2] * 3 + [5] * 4)
    assert repetition._units(documents, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]


def test_one_token_and_one_unit_have_no_interval():
    table = repeat_table({"one": random_ids(2, 1, 4), "short": random_ids(2, 20, 4)}, 4)
    assert np.isnan(table.rows["one"]["first"].rate).all() and np.isnan(table.rows["one"]["first"].low).all()
    assert np.isfinite(table.rows["short"]["first"].rate).all() and np.isnan(table.rows["short"]["first"].low).all()
    assert "–" in str(table)


def test_a_seed_fixes_the_intervals():
    ids = {"a": random_ids(1, 500, 8)}
    one, same, other = (repeat_table(ids, 8, seed=s).rows["a"]["first"].low[0] for s in (1, 1, 2))
    assert one == same != other


def test_the_csv_has_a_line_per_domain_kind_and_layer():
    ids = {'a "quoted", name': random_ids(2, 200, 8)}
    table = repeat_table(ids, 8, title="tiny")
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(lines) == 4
    assert [(line["domain"], line["kind"], line["layer"]) for line in lines[:2]] == [
        ('a "quoted", name', "first", "0"), ('a "quoted", name', "first", "1"),
    ]  # fmt: skip
    for line in lines:
        one = table.rows['a "quoted", name'][line["kind"]]
        i = int(line["layer"])
        assert line["percent"] == f"{100 * one.rate[i]:.2f}" and line["low"] == f"{100 * one.low[i]:.2f}"
    assert {line["chance"] for line in lines} == {"12.50", "46.43"}


def test_text_and_html_show_the_same_numbers():
    table = repeat_table({"<b>": random_ids(3, 300, 8), "c": random_ids(3, 300, 8)}, 8).of([0, 2])
    source = table._repr_html_()
    assert "&lt;b&gt;" in source and "<b>" not in source and "<script" not in source
    cells = re.findall(r"<td[^>]*>(.*?)</td>", source)
    assert len(cells) == 8 and all(cell in str(table) for cell in cells)
    assert cells[0].startswith(f"{100 * table.rows['<b>']['first'].rate[0]:.1f} [")
    assert "64 tokens" in source and "12.5" in source


def test_the_papers_figures():
    table = mixtral_repeats()
    assert table.layers == (0, 15, 31) and len(table.rows) == 8
    np.testing.assert_allclose(100 * table.rows["DM Mathematics"]["any"].rate, [44.9, 67.0, 44.5])
    np.testing.assert_allclose(100 * table.rows["Wikipedia"]["first"].rate, [14.4, 23.6, 25.3])
    assert "[" not in str(table) and "arXiv 2401.04088" in str(table)
    assert len(table.to_csv().splitlines()) == 1 + 8 * 2 * 3


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="no domain"):
        repeat_table({}, 8)
    with pytest.raises(ValueError, match="a dense model has no router"):
        repeat_table({"a": None}, 8)
    with pytest.raises(ValueError, match="one model"):
        repeat_table({"a": random_ids(1, 9, 4), "b": random_ids(2, 9, 4)}, 4)
    with pytest.raises(ValueError, match="layers must name"):
        mixtral_repeats().of([1])
