"""The routing atlas as a page: it needs nothing but itself, shows whatever it is given, and stays small."""

import base64
import hashlib
import html
import json
import os
import re
from contextlib import suppress
from html.parser import HTMLParser

import numpy as np
import pytest

import minimoe
from minimoe import plots, texts
from minimoe.plots.atlas import gather, of_experts, of_tokens, sections
from minimoe.plots.atlas.files import together
from minimoe.plots.atlas.gather import clean_names
from minimoe.plots.atlas.markup import Html
from minimoe.plots.atlas.plates import Plates, rendered
from minimoe.reading import TextError
from minimoe.tokenizer import Tokenizer
from tests import small
from tests.plots.parsed import parsed
from tests.plots.pictures import artists, assert_whole

PYTHON, ENGLISH = texts.load()["python"][:500], texts.load()["english"][:500]
TWO = {"python": PYTHON, "english": ENGLISH}


SMALL = sections.small


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Figures are drawn, but not as pictures: that takes most of a page's time."""
    monkeypatch.setattr(sections, "small", lambda page: (page.draw_without_rendering(), b"\x89PNG")[1])


def random_model(**changes):
    model = minimoe.random(small.SPARSE.replace(**changes), seed=1, backend="numpy")
    model.tokenizer = Tokenizer(small.TOKENIZER)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


# ---- it needs nothing but itself


def test_a_page_refers_to_nothing_outside_itself(model):
    source = str(plots.routing_page(model, TWO))
    page = parsed(source)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in source and "@import" not in source and "http:" not in source and "https:" not in source
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.tags}
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {a["href"][1:] for name, a in page.tags if name == "a"} <= anchors


def test_the_policy_lets_only_this_pages_script_run(model):
    page = parsed(plots.routing_page(model, TWO))
    [policy] = [a["content"] for name, a in page.tags if name == "meta" and "http-equiv" in a]
    [code] = [text for attributes, text in page.scripts if "type" not in attributes]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_every_figure_has_a_text_and_every_table_headings(model):
    page = parsed(plots.routing_page(model, TWO))
    plates = [image for image in page.images if image.get("class") != "strip"]
    assert len(plates) == 8 and all(len(image["alt"]) > 30 for image in page.images)
    assert page.tables and all(len(rows) > 1 and len({len(row) for row in rows}) == 1 for rows in page.tables.values())


def test_the_same_texts_give_the_same_page(model):
    one, two = (str(plots.routing_page(model, TWO)) for _ in range(2))
    assert one == two


def test_a_notebook_shows_the_page_in_a_frame(model, tmp_path):
    page = plots.routing_page(model, {"a": "1 < 2"})
    [frame] = re.findall(r'srcdoc="([^"]*)"', page._repr_html_())
    assert html.unescape(frame) == str(page)
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == str(page)


def test_figures_are_in_the_page_and_small(monkeypatch):
    monkeypatch.setattr(sections, "small", SMALL)
    source = str(plots.routing_page(random_model(num_layers=2, num_experts=4), TWO))
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", source)
    assert len(pictures) == 8 + 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG\r\n") for picture in pictures)
    assert len(source) < 2_500_000


# ---- whatever it is given

ODD = {
    "one layer": ({"num_layers": 1}, "The model has one layer: there is no path to follow."),
    "k = 1": ({"num_experts_per_token": 1}, "Each token has one expert only: there are no pairs."),
    "k = E": ({"num_experts": 4, "num_experts_per_token": 4}, "Every token uses all 4 experts, so there is no margin"),
    "E = k = 1": ({"num_experts": 1, "num_experts_per_token": 1}, "Every token uses all 1 experts"),
    "16 experts": ({"num_experts": 16}, "beside 16 and 2 they would mislead"),
    "64 experts": ({"num_experts": 64, "num_experts_per_token": 6}, "(16 of 64 experts)"),
    "more experts than colours": ({"num_experts": 65}, "Colours repeat after 64 experts"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_have_pages_that_say_what_is_missing(name):
    changes, told = ODD[name]
    model = random_model(**changes)
    page = parsed(plots.routing_page(model, TWO, name=name))
    assert told in page.text
    E = model.config.num_experts
    shares = page.tables["python: percent of each layer’s assignments"]
    assert shares[0] == ["layer", *map(str, range(E))] and len(shares) == 1 + model.config.num_layers
    np.testing.assert_allclose([sum(map(float, row[1:])) for row in shares[1:]], 100, atol=0.05 * E)
    assert "nan" not in page.text.lower().split()


def test_a_dense_model_a_mute_one_and_no_text_are_refused(model):
    dense, mute = random_model(num_experts=1, num_experts_per_token=1, dense=True), random_model()
    mute.tokenizer = None
    for wrong, given, message in (
        (dense, TWO, "dense model has no router"), (mute, TWO, "no tokenizer"), (model, {}, "no text was given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            plots.routing_page(wrong, given)
    with pytest.raises(TextError, match="empty: no tokens"):
        plots.routing_page(model, {"a": "b", "empty": ""})
    with pytest.raises(ValueError, match="window must be between 2 and the model's 512 tokens, not 513"):
        plots.routing_page(model, TWO, window=513)


def test_one_text_and_one_token_say_what_cannot_be_told(model):
    page = parsed(plots.routing_page(model, {"x": "{"}))
    assert "One text was read: what the first choice tells about the text needs at least two." in page.text
    assert "No token occurs 10 times or more." in page.text
    rows = page.tables["model: same first choice, percent of pairs of neighbours"]
    assert rows[1] == ["x", "–", "–", "–"]
    assert len(page.texts[0]) == 1
    assert "1 token, all" in page.text and "nan" not in page.text


def test_logits_that_are_no_numbers_are_said_so():
    model = random_model()
    model.params.layers[2].feed_forward.gate[3] = np.nan
    page = parsed(plots.routing_page(model, {"a": ENGLISH}))
    assert "The logits hold NaN or Inf: margins and entropies mean nothing." in page.text


HOSTILE = "</script><script>alert(2)</script>\"'&<!--\u202eabc\x00\r\n\u4e16\U0001f600<img src=x onerror=alert(3)>"


def test_hostile_names_and_texts_are_shown_and_not_run(model):
    names = ["<script>alert(1)</script>", "a\"b'c&d", "line\nend\u202e\udcff", "$x_1$"]
    source = str(plots.routing_page(model, dict.fromkeys(names, HOSTILE), name="</title><script>alert(0)</script>"))
    source.encode()  # no half characters
    page = parsed(source)
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None]
    assert "alert(" not in "".join(text for _, text in page.scripts)
    assert not any(character in source for character in "\u202e\x00\r")
    assert [image["src"].split(",")[0] for image in page.images] == ["data:image/png;base64"] * len(page.images)
    rows = [row[0] for row in page.tables["The texts"][1:]]
    assert rows == ["<script>alert(1)</script>", "a\"b'c&d", "line\\nend\\u202e\\udcff", "$x_1$"]
    json.loads(page.scripts[0][1])
    shown = "".join(piece for _, piece, _ in page.texts[0])
    assert shown.startswith("</script><script>alert(2)</script>\"'&<!--<0xE2><0x80><0xAE>abc<0x00><0x0D>↵")


def test_names_that_look_alike_are_numbered():
    assert clean_names(["a\u202e", "a\\u202e", "b", "a\\u202e (2)"]) == [
        "a\\u202e", "a\\u202e (2)", "b", "a\\u202e (2) (2)"]  # fmt: skip


def test_a_page_does_not_grow_with_its_texts(model):
    short, long = (str(plots.routing_page(model, {"a": ENGLISH * n, "b": PYTHON * n}, window=512)) for n in (4, 16))
    assert len(long) < 1.1 * len(short)
    assert "the first 360 of" in long and "Of longer texts the first 360 tokens are shown in colour" in long
    assert "Texts longer than 512 tokens are read in windows of that length which overlap by half." in long


def test_deep_models_and_many_texts_show_less_of_each_and_say_so(monkeypatch):
    for module in (of_experts, of_tokens):
        monkeypatch.setattr(module, "plate", lambda plates, name: Html(name))
    many = {f"text {i}": f"number {i} of {i + 1}\n" * 40 for i in range(30)}
    page = parsed(source := plots.routing_page(random_model(num_layers=30), many))
    assert "Panels and excerpts are of the first 24 of 30 texts; joint numbers are of all." in page.text
    assert len(page.texts) == 24 and all(len(text) == 66 for text in page.texts.values())  # 240,000 / (30 · 5 · 24)
    assert len(page.tables["The texts"]) == 31
    assert "The first, the middle and the last layer; --csv writes all of them." in page.text
    assert len(str(source)) < 2_500_000


def test_progress_is_told_for_every_window_and_pass(model):
    seen = []
    gather(model, {"a": ENGLISH}, window=64, switch_off=True, progress=seen.append)
    windows = len(range(0, len(model.tokenizer.encode(ENGLISH)) - 32, 32))
    assert sum(seen) == windows + 3 * 8 + 1


# ---- figures and files


def test_every_figure_has_a_name_and_every_format_its_kind(model):
    plates = Plates(gather(model, {"a/b <i>": ENGLISH, "c": PYTHON}))
    drawn = dict(plates.drawn())
    assert list(drawn) == ["domains", "shares", "repeats", "router", "pairs", "paths", "token_types", "information",
                           "tokens_1_a_b_i", "tokens_2_c"]  # fmt: skip
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert rendered(drawn["router"], kind).startswith(begins)
    with pytest.raises(ValueError, match="figures are png, svg, pdf, not 'gif'"):
        rendered(drawn["router"], "gif")


def test_information_stands_where_it_was_measured():
    rng = np.random.default_rng(0)
    bits = {
        "token": (np.array([2.5, 1.5]), rng.random((5, 2)) / 9),
        "domain": (np.array([0.1, 0.7]), rng.random((5, 2))),
    }
    page = plots.choice_information(bits, 8)
    assert_whole(page)
    for i, (seen, shuffled) in enumerate(bits.values()):
        np.testing.assert_allclose(artists(page, f"bits-{i}-seen")[f"bits-{i}-seen"].get_ydata(), seen)
        [path] = artists(page, f"bits-{i}-band")[f"bits-{i}-band"].get_paths()
        for layer in range(2):
            heights = path.vertices[np.isclose(path.vertices[:, 0], layer), 1]
            assert (heights.min(), heights.max()) == pytest.approx((shuffled[:, layer].min(), shuffled[:, layer].max()))
    assert_whole(plots.choice_information({"token": (np.zeros(1), np.zeros((2, 1)))}, 1))
    with pytest.raises(ValueError, match="no information was measured"):
        plots.choice_information({}, 8)


def test_files_written_together_are_all_there_or_none(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.bin"
    one.write_text("old")
    with suppress(KeyboardInterrupt), together() as outputs:
        outputs.text(one).write("new")
        outputs.write(two, b"new")
        raise KeyboardInterrupt
    assert one.read_text() == "old" and os.listdir(tmp_path) == ["one.txt"]
    (tmp_path / "link").symlink_to("one.txt")
    with together() as outputs:
        outputs.text(tmp_path / "link").write("a\udcff\n")
        outputs.write(two, b"new")
        assert one.read_text() == "old"
    assert one.read_text() == "a\\udcff\n" and two.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "one.txt", "two.bin"]
    with together() as outputs:
        outputs.write("/dev/null", "gone")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_the_parser_of_these_tests_sees_what_is_not_closed():
    assert issubclass(type(parsed("<p></p>")), HTMLParser)
    with pytest.raises(AssertionError, match="is closed by"):
        parsed("<p><b></p>")
