"""What figures show is what was computed elsewhere, nothing is clipped, and colours can be told apart."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from minimoe import colours, plots, texts
from minimoe.model import load
from minimoe.plots import readme
from minimoe.plots.tokens import layout
from minimoe.reading import read
from minimoe.routing_statistics import shares
from minimoe.tokenizer import Tokenizer
from tests.plots.pictures import PIECES, assert_whole, random_ids
from tests.small import TOKENIZER, save

RNG = np.random.default_rng(0)
FIGURES = Path(__file__).parents[1] / "figures"


def panels(page):
    """The axes that show shares: those with one number per cell."""
    return [axes for axes in page.axes if any((t.get_gid() or "").startswith("share-") for t in axes.texts)]


def test_the_shares_drawn_are_those_counted_by_hand():
    G, L, N, E = 4, 3, 400, 8
    ids = [RNG.integers(0, E, (L, N, 2)) for _ in range(G)]
    page = plots.expert_shares(np.stack([shares(one, E) for one in ids]), ["a", "b", "c", "d"], title="t")
    found = panels(page)
    assert len(found) == G
    for one, axes in zip(ids, found, strict=True):
        numbers = {t.get_gid(): t.get_text() for t in axes.texts if t.get_gid()}
        drawn = axes.images[0].get_array()
        for layer in range(L):
            counts = Counter(one[layer].reshape(-1).tolist())
            for e in range(E):
                share = counts[e] / (2 * N)
                assert numbers[f"share-{layer}-{e}"] == f"{100 * share:.0f}"
                assert drawn[layer, e] == pytest.approx(np.log2(share * E))


def test_shares_of_nothing_and_of_everything():
    page = plots.expert_shares(np.array([[[0, 1, 0, 0], [np.nan] * 4]]), ["x"])
    [axes] = panels(page)
    assert {t.get_gid(): t.get_text() for t in axes.texts if t.get_gid()} == {
        "share-0-0": "0", "share-0-1": "100", "share-0-2": "0", "share-0-3": "0",
    }  # fmt: skip
    assert axes.images[0].get_array()[0].tolist() == [-2, 2, -2, -2]
    assert_whole(page, inside=False)


@pytest.mark.parametrize("layers", [None, [1], [0, 1, 2, 3]])
def test_every_token_has_the_colour_of_its_first_choice(layers):
    ids = random_ids(4, len(PIECES), 8)
    ids[:, 2] = -1  # not routed
    page = plots.token_colours(PIECES, ids, layers=layers)
    shown = {c.get_gid(): c for c in page.findobj(PolyCollection)}
    wanted = [0, 1, 3] if layers is None else layers
    assert set(shown) == {f"tokens-{layer}" for layer in wanted}
    for layer in wanted:
        boxes = shown[f"tokens-{layer}"]
        columns = round(boxes.axes.get_xlim()[1])
        cells = layout(PIECES, columns)
        drawn = [to_hex(c) for c in boxes.get_facecolors()]
        assert len(drawn) == len(cells) == len(boxes.get_paths())
        for colour, path, cell in zip(drawn, boxes.get_paths(), cells, strict=True):
            expert = ids[layer, cell.token, 0]
            assert colour == (colours.expert_colour(expert) if expert >= 0 else "#ffffff")
            corners = path.vertices
            assert corners[:, 0].min() == pytest.approx(cell.column, abs=0.1)
            assert corners[:, 0].max() == pytest.approx(cell.column + len(cell.text), abs=0.1)
            assert corners[:, 1].mean() == pytest.approx(cell.line + 0.5, abs=0.2)


def test_the_letters_drawn_are_the_text():
    page = plots.token_colours(PIECES, random_ids(1, len(PIECES), 8))
    [axes] = [axes for axes in page.axes if axes.collections]
    lines = {}
    for text in axes.texts:
        line = round(text.get_position()[1] - 0.5)
        other = lines.get(line, "")
        merged = itertools.zip_longest(text.get_text(), other, fillvalue=" ")
        lines[line] = "".join(b if a == " " else a for a, b in merged)
    drawn = "".join(lines[line].ljust(1) for line in sorted(lines))
    assert drawn.replace(" ", "") == "defadd(a,b):↵returna$x_1$+□↵↵" + "x" * 50 + "!"


def test_dollars_are_letters_not_mathematics():
    for page in (
        plots.token_colours(["$a_1$"], np.zeros((1, 1), int), title="$b_1$"),
        plots.expert_shares(np.full((1, 1, 2), 0.5), ["$c_1$"], title="$d_1$"),
    ):
        dollars = [text for text in page.findobj(Text) if "$" in text.get_text()]
        assert len(dollars) == 2 and not any(text.get_parse_math() for text in dollars)


def test_layout_wraps_without_losing_a_character():
    for columns in (8, 13, 80):
        cells = layout(PIECES, columns)
        assert max(cell.column + len(cell.text) for cell in cells) <= columns
        places = [(cell.line, cell.column + i) for cell in cells for i in range(len(cell.text))]
        assert len(set(places)) == len(places)
        joined = "".join(cell.text for cell in cells)
        assert joined == "".join(PIECES).replace("\n", "↵").replace("世", "□").replace("\t", "    ")


def test_a_token_is_broken_only_if_it_is_longer_than_a_line():
    cells = layout(["aaaa", "bbbb", "c" * 12], 6)
    assert [(c.token, c.line, c.column, len(c.text)) for c in cells] == [
        (0, 0, 0, 4), (1, 1, 0, 4), (2, 1, 4, 2), (2, 2, 0, 6), (2, 3, 0, 4),
    ]  # fmt: skip
    assert [c.line for c in layout(["aaaa", "bbbb", "c" * 12], 6, max_lines=2)] == [0, 1, 1]


def test_the_overview_shows_shares_and_tokens_of_one_text():
    tokenizer = Tokenizer(TOKENIZER)
    tokens = tokenizer.encode(texts.load()["python"], bos=False)[:150]
    ids = random_ids(6, len(tokens), 8)
    share = RNG.dirichlet(np.ones(8), (6, 6))
    page = plots.routing_overview(share, texts.names(), tokenizer.pieces(tokens), ids, text_name="python")
    assert_whole(page, inside=False)
    for g, axes in enumerate(panels(page)):
        np.testing.assert_allclose(axes.images[0].get_array(), np.clip(np.log2(8 * share[g]), -2, 2))
    shown = {c.get_gid(): to_hex(c.get_facecolors()[0]) for c in page.findobj(PolyCollection)}
    assert shown == {f"tokens-{layer}": colours.expert_colour(ids[layer, 0, 0]) for layer in (0, 2, 5)}


@pytest.mark.parametrize(("G", "L", "E"), [(1, 1, 2), (2, 3, 8), (7, 6, 8), (3, 32, 8), (2, 4, 16), (1, 2, 64)])
def test_shares_of_any_size_are_whole(G, L, E):
    names = [f"a rather long name of a text file, number {g}.txt" for g in range(G)]
    assert_whole(plots.expert_shares(RNG.dirichlet(np.ones(E), (G, L)), names, title="Shares"), inside=False)


@pytest.mark.parametrize(("L", "E", "title"), [(1, 8, "A title"), (1, 64, "A title"), (6, 8, "A title"), (6, 24, None)])
def test_tokens_of_any_model_are_whole(L, E, title):
    assert_whole(
        plots.token_colours(PIECES * 4, random_ids(L, 4 * len(PIECES), E), title=title, num_experts=E), inside=False
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ids must have shape"):
        plots.token_colours(["a"], np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="layers must name"):
        plots.token_colours(["a"], np.zeros((2, 1), int), layers=[2])
    with pytest.raises(ValueError, match="shares must have shape"):
        plots.expert_shares(np.ones((2, 3, 4)), ["one"])


def test_a_notebook_shows_a_figure_without_any_backend():
    assert plots.token_colours(PIECES, random_ids(1, len(PIECES), 4))._repr_png_().startswith(b"\x89PNG")


def test_the_users_settings_neither_change_a_figure_nor_are_changed():
    ids = random_ids(2, len(PIECES), 8)
    plain = plots.token_colours(PIECES, ids)._repr_png_()
    with matplotlib.rc_context({"text.color": "red", "font.family": "serif", "font.size": 30, "axes.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        page = plots.token_colours(PIECES, ids)
        assert dict(matplotlib.rcParams) == before
    assert page._repr_png_() == plain


def test_pyplot_is_never_imported():
    code = "import sys, minimoe.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_64_experts_have_64_colours_and_readable_ink():
    every = [colours.expert_colour(e) for e in range(64)]
    assert len(set(every)) == 64
    assert colours.expert_colour(64) == every[0]
    assert all(contrast(colour, colours.ink(colour)) >= 4.5 for colour in every)


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(rgb):
    """CIELAB, from linear RGB (D65)."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_eight_experts_can_be_told_apart_by_everyone(deficiency):
    matrix = np.array(DEFICIENCIES[deficiency])
    seen = [lab(np.clip(matrix @ linear(colours.expert_colour(e)), 0, 1)) for e in range(8)]
    distances = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(range(8), 2)}
    assert min(distances.values()) > 12, min(distances, key=distances.get)  # 2.3 is just noticeable


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command writes, of a small model: {name: PNG}, and that model."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.model.BUNDLED", save(folder / "tiny").parent)
        model = load("tiny")
        readme.main(folder / "figures")
    return {path.stem: path.read_bytes() for path in (folder / "figures").iterdir()}, model


def test_readmes_figure_is_the_routing_of_the_shipped_texts(written):
    pictures, model = written
    page = readme.routing_figure(model)
    for name, axes in zip(texts.names(), panels(page), strict=True):
        [found] = [read(model.ops, model.config, model.params, model.tokenizer, texts.load()[name])]
        for layer in range(3):
            counts = Counter(found.ids[layer].reshape(-1).tolist())
            drawn = [t.get_text() for t in axes.texts if (t.get_gid() or "").startswith(f"share-{layer}-")]
            assert drawn == [f"{100 * counts[e] / found.ids[layer].size:.0f}" for e in range(8)]
    assert pictures["routing"] == readme.small_png(page)


def test_the_command_writes_a_small_picture_of_every_kind(written):
    pictures, _ = written
    assert set(pictures) == {path.stem for path in FIGURES.glob("*.png")}, "run python -m minimoe.plots.readme"
    assert len(pictures) >= 15
    for name, data in pictures.items():
        assert data.startswith(b"\x89PNG") and len(data) <= 150_000, name
    assert all(path.stat().st_size <= 150_000 for path in FIGURES.glob("*.png"))
