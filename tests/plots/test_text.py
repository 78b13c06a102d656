"""Pictures of a text's tokens show what the routing holds."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from minimoe import plots
from minimoe.colours import expert_colour, ink
from minimoe.plots.html import visible
from minimoe.shapes import Routing
from tests.plots.pictures import PIECES, artists, random_routing, written


def test_the_grid_shows_every_expert_with_its_weight_as_opacity():
    routing = random_routing(3, 30, 8)
    routing.ids[1, 4] = -1  # not routed: no box
    page = plots.token_grid(["x"] * 30, routing, layers=[2, 1])
    boxes = [c for c in page.findobj(PolyCollection) if (c.get_gid() or "").startswith("grid-")]
    colours = np.concatenate([c.get_facecolors() for c in boxes])
    expected = [
        (expert_colour(routing.ids[layer, n, slot]), routing.weights[layer, n, slot])
        for n in range(30)
        for layer in (2, 1)
        for slot in range(2)
        if routing.ids[layer, n, slot] >= 0
    ]
    assert len(colours) == len(expected) == 30 * 4 - 2
    for drawn, (colour, weight) in zip(colours, expected, strict=True):
        assert to_hex(drawn[:3]) == colour
        assert drawn[3] == pytest.approx(weight)


def test_a_long_text_is_cut_and_the_caption_says_so():
    page = plots.token_grid(["x"] * 100, random_routing(2, 100, 8), max_tokens=40)
    assert sum(len(c.get_paths()) for c in page.findobj(PolyCollection)) == 40 * 2 * 2
    assert "The first 40 of 100 tokens." in " ".join(written(page))


class Spans(HTMLParser):
    """Reads back the tokens of each layer."""

    def __init__(self):
        super().__init__()
        self.layers, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "pre":
            self.layers.append([])
        if tag == "span" and self.layers and dict(attrs).get("title"):
            self.layers[-1].append({**dict(attrs), "text": "", "sub": ""})
        self.tag = tag

    def handle_endtag(self, tag):
        self.tag = None if tag in ("span", "pre") else "span"

    def handle_data(self, data):
        if self.layers and self.tag in ("span", "sub"):
            self.layers[-1][-1]["text" if self.tag == "span" else "sub"] += data


def test_html_shows_every_token_on_its_experts_colour_with_its_numbers():
    routing = random_routing(4, len(PIECES), 8)
    parser = Spans()
    parser.feed(plots.token_html(PIECES, routing)._repr_html_())
    assert len(parser.layers) == 3
    for layer, spans in zip((0, 1, 3), parser.layers, strict=True):
        assert len(spans) == len(PIECES)
        for n, span in enumerate(spans):
            first, second = routing.ids[layer, n]
            colour = expert_colour(first)
            assert f"background:{colour};color:{ink(colour)}" in span["style"]
            assert span["sub"] == str(first)
            for slot, expert in enumerate((first, second)):
                told = f"expert {expert} weight {routing.weights[layer, n, slot]:.3f} (logit "
                assert told + f"{routing.logits[layer, n, expert]:.2f})" in span["title"]
            assert span["title"].endswith(f"margin {routing.margins[layer, n]:.3f}")


def test_html_is_escaped_needs_no_script_and_keeps_every_line():
    pieces = ["<script>alert(1)</script>", "&amp;", '" onmouseover="x', "\x1b[2J", "a\n", "  ", "\n\n    ", "\u202e"]
    source = str(plots.token_html(pieces, random_routing(1, len(pieces), 4), title="<b>"))
    assert "<script" not in source and "&lt;script&gt;" in source and "&lt;b&gt;" in source
    assert "\x1b" not in source and "\u202e" not in source
    tags = set(re.findall(r"<(\w+)", source))
    assert tags <= {"div", "p", "b", "span", "pre", "sub"}
    parser = Spans()
    parser.feed(source)
    assert {name for span in parser.layers[0] for name in span} == {"title", "style", "text", "sub"}
    text = re.sub(r"<[^>]+>", "", source.split("<pre", 1)[1])
    assert text.count("↵") == 3 and text.count("\n") == 3 and text.count("·") == 6


def test_html_of_tokens_that_were_not_routed():
    routing = Routing(np.array([[[-1, -1], [2, 0]]]))
    source = str(plots.token_html(["a", "b"], routing))
    assert "not routed" in source and "weight" not in source and source.count("<sub") == 1


def test_white_space_is_visible():
    assert visible(" word") == " word"
    assert visible("\n        ") == "↵\n········"


def test_the_gate_shows_logits_weights_and_their_sum():
    routing = random_routing(1, 1, 8)
    logits, ids, weights = routing.logits[0, 0], routing.ids[0, 0], routing.weights[0, 0]
    slots = np.random.default_rng(0).normal(size=(2, 24))
    page = plots.gate_steps(logits, ids, weights, slots)
    bars, numbers = artists(page, "logit-"), artists(page, "logit-text-")
    widths = np.array([bars[f"logit-{e}"].get_width() for e in range(8)])
    np.testing.assert_allclose(widths / widths.max(), np.abs(logits) / np.abs(logits).max())
    zero = bars[f"logit-{logits.argmax()}"].get_x()
    assert all((bars[f"logit-{e}"].get_x() >= zero - 1e-9) == (logits[e] >= 0) for e in range(8))
    assert [numbers[f"logit-text-{e}"].get_text() for e in range(8)] == [f"{x:.2f}".replace("-", "−") for x in logits]
    assert [e for e in range(8) if bars[f"logit-{e}"].get_alpha() == 1.0] == sorted(ids)
    drawn = artists(page, "weight-")
    exps = np.exp(np.sort(logits)[::-1][:2])
    assert [drawn[f"weight-text-{i}"].get_text() for i in range(2)] == [f"{w:.3f}" for w in exps / exps.sum()]
    lengths = [drawn[f"weight-{i}"].get_width() for i in range(2)]
    assert lengths[0] / lengths[1] == pytest.approx(exps[0] / exps[1])
    total = artists(page, "strip-")["strip-2"].get_array()
    np.testing.assert_allclose(total[0], weights[0] * slots[0] + weights[1] * slots[1])


def test_attention_shows_probabilities_and_hides_what_the_window_hides():
    T, W = 12, 4
    scores = np.random.default_rng(0).normal(size=(3, T, T))
    seen = np.array([[0 <= t - s < W for s in range(T)] for t in range(T)])
    exps = np.exp(scores) * seen
    probs = exps / exps.sum(axis=-1, keepdims=True)
    page = plots.attention_maps(probs, window=W, num_kv_heads=3)
    for h in range(3):
        image = artists(page, f"head-{h}")[f"head-{h}"].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(image), ~seen)
        np.testing.assert_allclose(image[seen], probs[h][seen])


def test_attention_names_rows_and_columns():
    pieces = ["a", "b", "c"]
    axes = artists(plots.attention_maps(np.tri(3)[None].repeat(2, 0) / [[1], [2], [3]], pieces), "head-")
    first, second = (axes[f"head-{h}"].axes for h in range(2))
    for panel in (first, second):
        assert [text.get_text() for text in panel.get_xticklabels()] == pieces
    assert [text.get_text() for text in first.get_yticklabels()] == pieces
    assert not second.get_yticklabels()


def test_attention_to_a_rolled_cache_goes_by_positions():
    """Slots 0..3 hold positions 4, 5, 2, 3; slot 4 is empty. Position 6 with a window of 3 sees 4 and 5 only."""
    page = plots.attention_maps(
        np.array([[[0.25, 0.75, 0, 0, 0]]]), window=3, q_pos=np.array([6]), k_pos=np.array([4, 5, 2, 3, -1])
    )
    image = artists(page, "head-0")["head-0"].get_array()
    assert np.ma.getmaskarray(image).tolist() == [[False, False, True, True, True]]


def test_probabilities_outside_the_window_are_refused():
    with pytest.raises(ValueError, match="is window = 1 right"):
        plots.attention_maps(np.tri(3)[None] / np.arange(1, 4)[None, :, None], window=1)
