"""The numbers of the routing atlas: what stands on the page is what a few naive lines count."""

import json
import re
from collections import Counter
from itertools import pairwise
from math import comb, exp, log2

import numpy as np
import pytest

import minimoe
from minimoe import texts
from minimoe.colours import expert_colour
from minimoe.plots.atlas import gather, sections
from minimoe.plots.atlas.numbers import favoured_tokens
from minimoe.plots.atlas.page import page_of
from minimoe.plots.atlas.plates import Plates
from minimoe.token_types import TYPES, token_types
from minimoe.tokenizer import Tokenizer
from tests import small
from tests.plots.parsed import numbers, parsed, pixels

E, L, K = 8, 3, 2
TEXTS = {"a": texts.load()["python"][:700], "b": texts.load()["english"][:500]}


def entropy(counts):
    total = sum(counts.values())
    return -sum(n / total * log2(n / total) for n in counts.values())


def information(a, b):
    return entropy(Counter(a)) + entropy(Counter(b)) - entropy(Counter(zip(a, b, strict=True)))


def mean_loss(model, text, disabled=()):
    ids = np.array(model.tokenizer.encode(text))
    logits = model.forward(ids, disabled_experts=disabled).astype(np.float64)[:-1]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(ids.size - 1), ids[1:]])


@pytest.fixture(scope="module")
def model():
    model = minimoe.random(small.SPARSE, seed=3, backend="numpy")
    model.tokenizer = Tokenizer(small.TOKENIZER)
    return model


@pytest.fixture(scope="module")
def routings(model):
    """The routing of each text, from the model itself; both are shorter than the window of 512."""
    found = {}
    for name, text in TEXTS.items():
        r = model.trace(text, only="layers.0.gating.ids").routing
        found[name] = minimoe.shapes.Routing(r.ids[:, 1:], r.weights[:, 1:], r.logits[:, 1:])
    return found


@pytest.fixture(scope="module")
def atlas(model):
    return gather(model, TEXTS, name="m", window=512)


@pytest.fixture(scope="module")
def page(atlas):
    """The page, with coarse figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "small", lambda page: b"\x89PNG")
        return parsed(page_of(Plates(atlas)))


def test_texts_and_model_are_told(page, model):
    rows = {row[0]: row[1:] for row in page.tables["The texts"]}
    for name, text in TEXTS.items():
        tokens = len(model.tokenizer.encode(text)) - 1
        loss = mean_loss(model, text)
        assert rows[name][:3] == [f"{len(text.encode()):,}", f"{tokens:,}", "1"]
        assert float(rows[name][3]) == pytest.approx(loss, abs=6e-4)
        assert float(rows[name][4]) == pytest.approx(loss * tokens / np.log(2) / len(text.encode()), abs=6e-4)
    told = dict(row for row in page.tables["The model"][1:])
    assert (told["layers"], told["experts per layer"], told["experts per token"]) == ("3", "8", "2")
    assert told["parameters"] == f"{small.SPARSE.num_parameters():,}"


def test_shares_are_counted_assignments(page, routings):
    for name, routing in routings.items():
        shown = numbers(page.tables[f"{name}: percent of each layer’s assignments"])
        for layer in range(L):
            counts = Counter(routing.ids[layer].reshape(-1).tolist())
            exact = [100 * counts[e] / routing.ids[layer].size for e in range(E)]
            np.testing.assert_allclose(shown[layer], exact, atol=0.0501)


def test_neighbours_are_counted_pair_by_pair(page, routings):
    for kind, same in (
        ("same first choice", lambda a, b: a[0] == b[0]),
        ("any choice in common", lambda a, b: bool({*a} & {*b})),
    ):
        rows = page.tables[f"m: {kind}, percent of pairs of neighbours"]
        for row, routing in zip(numbers(rows), routings.values(), strict=True):
            for layer in range(L):
                ids = routing.ids[layer].tolist()
                rate = np.mean([same(a, b) for a, b in pairwise(ids)])
                assert row[layer] == pytest.approx(100 * rate, abs=0.0501)
    chance = 100 - 100 * comb(6, 2) / comb(8, 2)
    assert f"Even and independent choices give 12.5 percent for the first choice and {chance:.1f}" in page.text


def test_the_papers_figures_stand_beside_eight_experts_two_a_token(page):
    rows = {row[0]: row[1:] for row in page.tables["Mixtral 8x7B: same first choice, percent of pairs of neighbours"]}
    assert rows["Github"] == ["14.9", "28.1", "19.7"] and rows["DM Mathematics"] == ["14.1", "28.4", "19.7"]


def test_router_certainty_is_that_of_the_logits(page, routings):
    shown = numbers(page.tables["Routers, over all tokens"])
    logits = np.concatenate([r.logits for r in routings.values()], axis=1).astype(np.float64)
    for layer in range(L):
        margins, entropies, first = [], [], []
        for row in logits[layer].tolist():
            best = sorted(row, reverse=True)
            margins.append(best[1] - best[2])
            total = sum(map(exp, row))
            entropies.append(-sum(exp(x) / total * log2(exp(x) / total) for x in row))
            first.append(1 / (1 + exp(best[1] - best[0])))
        near = 100 * np.mean(np.array(margins) < 0.01)
        told = shown[layer]
        np.testing.assert_allclose(told[:3], [np.median(margins), near, np.mean(entropies)], atol=0.051)
        assert told[0] == pytest.approx(np.median(margins), abs=0.0051)
        assert told[2] == pytest.approx(np.mean(entropies), abs=0.0051)
        assert told[4] == pytest.approx(np.mean(first), abs=0.0051)


def test_information_is_counted_from_pairs_of_labels(page, model, routings):
    head, *_ = table = page.tables["Bits about the first choice"]
    assert [cell.replace("measured", "").strip() for cell in head[1::2]] == [
        "token", "kind of token", "domain", "domain, token known"]  # fmt: skip
    shown = numbers(table)
    tokens = [t for text in TEXTS.values() for t in model.tokenizer.encode(text)[1:]]
    domains = [name for name, r in routings.items() for _ in range(r.ids.shape[1])]
    kinds = np.concatenate([token_types(model.tokenizer.pieces(model.tokenizer.encode(t)[1:])) for t in TEXTS.values()])
    for layer in range(L):
        first = [e for r in routings.values() for e in r.ids[layer, :, 0].tolist()]
        about_token = information(first, tokens)
        both = information(first, list(zip(tokens, domains, strict=True)))
        exact = [about_token, information(first, kinds.tolist()), information(first, domains), both - about_token]
        np.testing.assert_allclose(shown[layer, ::2], exact, atol=6e-4)
        assert (shown[layer, 1::2] >= 0).all()


def test_favourites_are_the_most_frequent_experts_of_frequent_tokens(page, model, routings):
    shown = numbers(page.tables["Occurrences that go to their token’s favourite expert, percent"])
    tokens = [t for text in TEXTS.values() for t in model.tokenizer.encode(text)[1:]]
    often = [t for t, n in Counter(tokens).items() if n >= 10]
    for layer in range(L):
        first = [e for r in routings.values() for e in r.ids[layer, :, 0].tolist()]
        each = [Counter(e for e, t in zip(first, tokens, strict=True) if t == token) for token in often]
        share = sum(max(c.values()) for c in each) / sum(sum(c.values()) for c in each)
        assert shown[layer, 0] == pytest.approx(100 * share, abs=0.0501)
        assert 100 / E < shown[layer, 1] < 100


def test_favoured_tokens_are_those_furthest_above_their_share(atlas):
    pieces = [piece for text in atlas.texts for piece in text.pieces]
    tokens, first = atlas.tokens.tolist(), atlas.ids[1, :, 0].tolist()
    both, of_token, of_expert = Counter(zip(tokens, first, strict=True)), Counter(tokens), Counter(first)
    lists = favoured_tokens(atlas, 1)
    for e in range(E):
        excess, known = [], set()
        for token in of_token:
            count, expected = both[token, e], of_token[token] * of_expert[e] / len(tokens)
            if count >= 5 and count > expected:
                excess.append((count - expected) / expected**0.5)
                known.add((pieces[tokens.index(token)], count, round(expected, 9)))
        found = [(count - expected) / expected**0.5 for _, count, expected in lists[e]]
        assert found == pytest.approx(sorted(excess, reverse=True)[:8])
        assert {(piece, count, round(expected, 9)) for piece, count, expected in lists[e]} <= known
    assert sum(map(len, lists)) > 20


def test_kinds_of_tokens_are_counted(page, model, routings):
    kinds = np.concatenate([token_types(model.tokenizer.pieces(model.tokenizer.encode(t)[1:])) for t in TEXTS.values()])
    ids = np.concatenate([r.ids for r in routings.values()], axis=1)
    table = page.tables["Layer 1: percent of each kind’s assignments"]
    assert [row[0] for row in table[1:]] == [TYPES[y] for y in sorted(set(kinds.tolist()))]
    for row, values in zip(table[1:], numbers(table), strict=True):
        counts = Counter(ids[1, kinds == TYPES.index(row[0])].reshape(-1).tolist())
        np.testing.assert_allclose(values, [100 * counts[e] / sum(counts.values()) for e in range(E)], atol=0.501)


def test_notable_pairs_and_steps_are_counts(page, routings):
    ids = np.concatenate([r.ids for r in routings.values()], axis=1)
    rows = page.tables["Pairs furthest from independence, percent of all tokens"][1:]
    assert rows
    for layer, experts, seen, _ in rows:
        pair = set(map(int, experts.split()))
        share = np.mean([set(token) == pair for token in ids[int(layer)].tolist()])
        assert float(seen) == pytest.approx(100 * share, abs=0.0501)
    rows = page.tables["Steps that stand out most"][1:]
    assert rows
    for layers, experts, seen, expected in rows:
        (i, j), (a, b) = (tuple(map(int, cell.split(" → "))) for cell in (layers, experts))
        from_a, to_b = ids[i, :, 0] == a, ids[j, :, 0] == b
        assert j == i + 1 and int(seen) == (from_a & to_b).sum() > float(expected)
        assert float(expected) == pytest.approx(from_a.sum() * to_b.sum() / ids.shape[1], abs=0.501)


def test_tokens_stand_on_the_colour_of_their_first_choice(page, atlas, routings):
    for g, (name, routing) in enumerate(routings.items()):
        spans = page.texts[g]
        assert len(spans) == min(360, routing.ids.shape[1])
        first = routing.ids[0, : len(spans), 0].tolist()
        assert [(c, e) for c, _, e in spans] == [(f"e{e}", str(e)) for e in first]
        shown = "".join(piece for _, piece, _ in spans).replace("·", " ").replace("↵", "").replace("\n", "")
        assert TEXTS[name].replace("\n", "").startswith(shown) and len(shown) > 300


def test_the_scripts_numbers_are_the_routing(page, routings):
    [data] = [json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "routes"]
    assert data["k"] == K
    for one, routing in zip(data["texts"], routings.values(), strict=True):
        n = len(one["margins"][0])
        for layer in range(L):
            assert one["ids"][layer] == routing.ids[layer, :n].reshape(-1).tolist()
            np.testing.assert_allclose(one["weights"][layer], 100 * routing.weights[layer, :n].reshape(-1), atol=0.501)
            best = -np.sort(-routing.logits[layer, :n], axis=1)
            np.testing.assert_allclose(one["margins"][layer], 100 * (best[:, 1] - best[:, 2]), atol=0.501)


def test_strips_have_a_pixel_per_token_and_layer(page, routings):
    strips = [image for image in page.images if image.get("class") == "strip"]
    for image, routing in zip(strips, routings.values(), strict=True):
        n = min(360, routing.ids.shape[1])
        found = pixels(image)
        assert found.shape == (L, n, 3) and image["alt"]
        for row in range(L):  # the first layer is below
            colours = ["#" + "".join(f"{part:02x}" for part in pixel) for pixel in found[row].tolist()]
            assert colours == [expert_colour(e) for e in routing.ids[L - 1 - row, :n, 0].tolist()]


def test_long_texts_are_watched_window_by_window(model):
    """Every token's routing is that of the window which saw more before it."""
    text = texts.load()["json"][:600]
    tokens = np.array(model.tokenizer.encode(text))
    [one] = gather(model, {"j": text}, window=64).texts
    np.testing.assert_array_equal(one.routing.ids, one.reading.ids)
    for at in (1, 31, 63, 64, 95, 96, 150, tokens.size - 1):
        start = max(at // 32 - 1, 0) * 32
        start = min(start, (len(range(0, max(tokens.size - 32, 1), 32)) - 1) * 32)
        exact = model.trace(tokens[start : start + 64], only="layers.0.gating.ids").routing
        for name in ("weights", "logits"):
            seen, truth = getattr(one.routing, name)[:, at - 1], getattr(exact, name)[:, at - start]
            np.testing.assert_allclose(seen, truth, rtol=1e-4, atol=1e-5)


def test_costs_are_the_rise_of_the_loss(model):
    text = TEXTS["a"][:200]
    atlas = gather(model, {"a": text}, window=512, switch_off=True)
    assert atlas.costs.costs.shape == (1, L, E)
    for layer, e in ((0, 0), (1, 5), (2, 7)):
        assert atlas.costs.costs[0, layer, e] == pytest.approx(
            mean_loss(model, text, [(layer, e)]) - mean_loss(model, text), abs=1e-6
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "small", lambda page: b"\x89PNG")
        rows = parsed(page_of(Plates(atlas))).tables["The experts that are missed most"]
    name, layer, e, rise, _ = rows[1]
    largest = np.unravel_index(np.argmax(atlas.costs.costs), (1, L, E))
    assert (name, int(layer), int(e)) == ("a", *largest[1:])
    assert float(rise.split(" ±")[0]) == pytest.approx(atlas.costs.costs.max(), abs=6e-4)


def test_the_findings_at_the_top_are_counts_too(page, model, routings):
    ids = np.concatenate([r.ids for r in routings.values()], axis=1)
    counts = [Counter(layer.reshape(-1).tolist()) for layer in ids]
    layer, e = max(((i, e) for i in range(L) for e in range(E)), key=lambda at: counts[at[0]][at[1]])
    share = 100 * counts[layer][e] / ids[layer].size
    assert f"{share:.1f} % of layer {layer}’s work goes to expert {e}even use: 12.5 %" in page.text
    pairs = [(a[0], b[0]) for r in routings.values() for a, b in pairwise(r.ids[-1].tolist())]
    told = re.search(r"([\d.]+) % of neighbouring tokens share their first choice in layer 2", page.text)
    assert float(told[1]) == pytest.approx(100 * np.mean([a == b for a, b in pairs]), abs=0.0501)
    bits = numbers(page.tables["Bits about the first choice"])[:, 4]
    assert f"{bits.max():.2f} bits is what the first choice of layer {bits.argmax()} tells about the text" in page.text
