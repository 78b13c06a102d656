"""The routing atlas, one HTML page with a script of its own: it needs no network, can be read, and can be used."""

from __future__ import annotations

import io

import numpy as np
import pytest

import minimoe
from minimoe import texts
from minimoe.plots.atlas import gather, sections
from minimoe.plots.atlas.page import page_of
from minimoe.plots.atlas.plates import Plates
from tests.browser.browsing import HOSTILE, PATIENCE, READABLE, chromium, harmless, needs, opened, overflow, unfold

pytestmark = needs("playwright")

NAMED = {"python": texts.load()["python"][:400], HOSTILE[1]: " ".join(HOSTILE)}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def atlas():
    atlas = gather(minimoe.load("tiny", backend="numpy"), NAMED, name=HOSTILE[0])
    # A tokenizer cuts such text into pieces too small to harm; another one might not.
    atlas.shown[1].pieces[: len(HOSTILE)] = HOSTILE
    return atlas


def coarse(page):
    data = io.BytesIO()
    page.savefig(data, format="png", dpi=30)
    return data.getvalue()


@pytest.fixture(scope="module")
def source(atlas):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "small", coarse)  # a fine one takes a second each
        return str(page_of(Plates(atlas)))


@pytest.fixture
def watched(browser, tmp_path, source):
    with opened(browser, tmp_path, source) as watched:
        yield watched


def test_the_page_is_whole_and_asks_nothing_of_the_network(watched):
    images = watched.page.locator("img")
    assert images.count() >= 10
    assert images.evaluate_all("all => all.filter(i => !(i.complete && i.naturalWidth)).length") == 0
    for link in watched.page.locator("nav a").all():
        assert watched.page.locator(link.get_attribute("href")).count() == 1
    assert watched.errors == []
    assert watched.left == []


@pytest.mark.parametrize("width", [1280, 600])
def test_it_is_no_wider_than_the_window(browser, tmp_path, source, width):
    with opened(browser, tmp_path, source, width=width) as watched:
        unfold(watched)
        assert overflow(watched) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_in_dark(browser, tmp_path, source, scheme):
    with opened(browser, tmp_path, source, scheme) as watched:
        unfold(watched)
        ratio, text = watched.least_contrast("body *")
        assert ratio >= READABLE, text


def test_hostile_names_and_texts_stay_text(watched):
    page = watched.page
    assert page.locator("h1").text_content() == HOSTILE[0] and HOSTILE[0] in page.title()
    assert page.locator("[data-text][aria-pressed]").all_text_contents() == list(NAMED)
    page.locator("[data-text][aria-pressed]").nth(1).click()
    spans, told = page.locator("figure.text:visible .tokens > span"), page.locator("#told code")
    for n, piece in enumerate(HOSTILE):
        spans.nth(n).hover()
        assert spans.nth(n).text_content().startswith(piece)
        assert told.text_content() == piece
    harmless(watched)


def test_the_slider_colours_the_tokens_by_another_layer(watched, atlas):
    spans = watched.page.locator("figure.text:visible .tokens > span")
    for layer in (0, 5, 2):
        watched.page.locator("#layer").fill(str(layer))
        ids = atlas.shown[0].ids[layer, : spans.count(), 0]
        assert watched.page.locator("#layer-shown").inner_text() == str(layer)
        assert [int(n) for n in spans.locator("sub").all_text_contents()] == ids.tolist()
        colours = spans.evaluate_all("all => all.map(span => getComputedStyle(span).backgroundColor)")
        assert [colours[n] for n in range(len(ids))] == [colours[list(ids).index(e)] for e in ids]
        assert len(set(colours)) == len(np.unique(ids))


def test_a_token_tells_where_it_goes_when_pointed_at_or_reached_by_key(watched, atlas):
    spans, told = watched.page.locator("figure.text:visible .tokens > span"), watched.page.locator("#told")
    spans.nth(7).hover()
    ids, weights = atlas.shown[0].routing.ids[0, 7], atlas.shown[0].routing.weights[0, 7]
    assert told.inner_text().startswith("token 7 ") and "in layer 0" in told.inner_text()
    assert [int(n) for n in told.locator(".chip").all_inner_texts()[: len(ids)]] == ids.tolist()
    assert f"{np.rint(100 * weights[0]):.0f} %" in told.inner_text()
    watched.page.locator("figure.text:visible .tokens").press("ArrowRight")
    assert told.inner_text().startswith("token 8 ")
    watched.page.locator("figure.text:visible .tokens").press("ArrowUp")
    assert "in layer 1" in told.inner_text()


def test_an_experts_button_picks_out_its_tokens(watched, atlas):
    ids = atlas.shown[0].ids[0, :, 0]
    expert = int(ids[0])
    watched.page.locator(f"[data-expert='{expert}']").click()
    shown = watched.page.locator("figure.text:visible .tokens")
    assert shown.locator("> span.on").count() == np.count_nonzero(ids[: shown.locator("> span").count()] == expert)
    opacity = "e => +getComputedStyle(e).opacity"
    picked, other = (shown.locator(f"> span{kind}").first.evaluate(opacity) for kind in (".on", ":not(.on)"))
    assert other < picked == 1


def test_without_its_script_the_page_shows_layer_0(browser, tmp_path, source):
    path = tmp_path / "page.html"
    path.write_text(source, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(path.as_uri())
    assert page.locator("figure.text .tokens").first.is_visible()
    assert not page.locator(".controls").first.is_visible()
    assert "Layer 0 is shown" in page.locator("noscript").first.inner_text()
    context.close()
