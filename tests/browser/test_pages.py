"""The HTML that goes into saved notebooks and web pages, opened by itself: it is whole, harmless, and can be read.

What hosts it here is a bare page; GitHub and nbviewer show the same HTML, less what they strip.
"""

from __future__ import annotations

import numpy as np
import pytest

import minimoe
from minimoe.golden.check import Checked
from minimoe.plots import token_html
from minimoe.plots.html import visible
from minimoe.repetition import repeat_table
from minimoe.shapes import Routing
from minimoe.stepper import Stepper, stepper
from tests.browser.browsing import HOSTILE, READABLE, chromium, harmless, needs, opened, overflow, unfold

pytestmark = needs("playwright")

TEXT = "def f(x):\n    return <x>"
EXPERTS, LAYERS = 8, 2


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def steps():
    return Stepper(minimoe.load("tiny", backend="numpy"), TEXT)


@pytest.fixture(scope="module")
def hostile_steps():
    # A tokenizer cuts such text into pieces too small to harm; another one might not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepper, "text_pieces", lambda *_: list(HOSTILE))
        return Stepper(minimoe.load("tiny", backend="numpy"), list(range(len(HOSTILE))))


def routing(N):
    logits = np.random.default_rng(0).normal(size=(LAYERS, N, EXPERTS)).astype(np.float32)
    ids = np.argsort(-logits, axis=-1)[..., :2]
    weights = np.full((LAYERS, N, 2), 0.5, np.float32)
    return Routing(ids, weights, logits)


def coloured(pieces, title=None):
    return str(token_html(pieces, routing(len(pieces)), title=title))


def test_the_watch_sees_what_leaves_a_page_and_what_breaks_in_it(browser, tmp_path):
    bad = '<img src="https://example.invalid/"><b style="color:#999;background:#aaa">grey</b><script>nothing()</script>'
    with opened(browser, tmp_path, bad) as watched:
        assert watched.left == ["https://example.invalid/"]
        assert any("nothing is not defined" in error for error in watched.errors)
        ratio, text = watched.least_contrast()
        assert ratio == pytest.approx(1.23, abs=0.01) and text == "grey"  # by WCAG's formula: 0.4521 over 0.3685


# ---- the stepper without a kernel


def test_every_step_of_the_static_page_unfolds_at_a_click(browser, tmp_path, steps):
    with opened(browser, tmp_path, steps.static()) as watched:
        folds = watched.page.locator("body > details")
        shown = [i for i, step in enumerate(steps) if step.layer in (None, 0)]
        assert folds.count() == len(shown)
        for n, i in enumerate(shown):
            fold, heading = folds.nth(n), folds.nth(n).get_by_role("heading")
            assert heading.is_visible() == (n == 0)
            if n > 0:
                fold.locator("> summary").click()
            assert heading.inner_text() == f"{i + 1} of {len(steps)}: {steps[i].name}"
            assert heading.is_visible()
            for name in steps[i].writes:
                assert fold.get_by_alt_text(f"heat map of {name}", exact=True).last.is_visible()
        broken = watched.page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).length")
        assert broken == 0 and not watched.errors and not watched.left


def test_numbers_and_code_unfold_at_a_click(browser, tmp_path, steps):
    i = next(i for i, step in enumerate(steps) if step.name == "layers.0.attention.qkv")
    with opened(browser, tmp_path, steps.html(i)) as watched:
        numbers = watched.page.locator("details", has=watched.page.get_by_text("numbers", exact=True))
        number = f"{steps.trace['layers.0.attention_norm'][0, 0]:.4g}"
        assert not numbers.first.locator("pre").is_visible()
        numbers.first.locator("summary").click()
        assert number in numbers.first.locator("pre").inner_text()
        code = watched.page.locator("details", has_text="code of linear.forward in 3 dialects")
        assert not code.locator("pre").first.is_visible()
        code.locator("summary").click()
        assert code.locator("b").all_inner_texts() == ["array code", "Numba loops", "CUDA"]
        assert all(pre.is_visible() for pre in code.locator("pre").all())
        assert "def forward" in code.locator("pre").nth(1).inner_text()


@pytest.mark.parametrize("width", [1280, 600])
def test_no_step_is_wider_than_the_page(browser, tmp_path, steps, width):
    with opened(browser, tmp_path, steps.static(), width=width) as watched:
        unfold(watched)
        assert overflow(watched) <= 0


@pytest.mark.parametrize(("width", "beside"), [(1280, True), (600, False)])
def test_what_is_read_and_written_stands_side_by_side_where_there_is_room(browser, tmp_path, steps, width, beside):
    i = next(i for i, step in enumerate(steps) if step.name == "layers.0.gating")
    with opened(browser, tmp_path, steps.html(i), width=width) as watched:
        heads = [watched.page.get_by_text(name, exact=True) for name in ("reads", "weights", "writes")]
        reads, weights, writes = (head.bounding_box() for head in heads)
        assert (reads["x"] < weights["x"] < writes["x"]) == beside
        assert (reads["y"] < weights["y"] < writes["y"]) != beside


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_stepper_can_be_read_on_light_and_dark_pages(browser, tmp_path, steps, scheme):
    with opened(browser, tmp_path, steps.static(), scheme) as watched:
        unfold(watched)
        assert watched.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        ratio, text = watched.least_contrast()
        assert ratio >= READABLE, text


# ---- a text coloured by expert


def test_every_token_tells_its_experts_when_hovered_over(browser, tmp_path):
    pieces = ["def", " f", "(", "x", "):", "\n", "    ", "return"]
    with opened(browser, tmp_path, coloured(pieces)) as watched:
        told = watched.page.locator("span[title]")
        assert told.count() == len(pieces) * LAYERS
        chosen = routing(len(pieces))
        for at, title in enumerate(told.evaluate_all("spans => spans.map(s => s.title)")):
            layer, n = divmod(at, len(pieces))
            first, second = chosen.ids[layer, n]
            assert title.startswith(f"token {n} ") and f"layer {layer} " in title
            assert f"expert {first} weight 0.500" in title and f"expert {second} weight 0.500" in title
        assert told.first.inner_text() == f"def{chosen.ids[0, 0, 0]}"
        assert not watched.errors and not watched.left


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_coloured_text_can_be_read_on_light_and_dark_pages(browser, tmp_path, scheme):
    chosen = routing(64)
    chosen.ids[0, 0] = -1  # padding has a box of its own
    source = str(token_html(["word"] * 64, chosen, title="a title"))
    with opened(browser, tmp_path, source, scheme) as watched:
        assert set(chosen.ids[:, :, 0].flat) == {-1, *range(EXPERTS)}
        ratio, text = watched.least_contrast()
        assert ratio >= READABLE, text


@pytest.mark.parametrize("pieces", [["unbroken" * 60], ["a "] * 600, ["\n"] * 30])
def test_a_coloured_text_is_no_wider_than_the_page(browser, tmp_path, pieces):
    with opened(browser, tmp_path, coloured(pieces)) as watched:
        assert overflow(watched) <= 0


# ---- texts that would like to be code


def test_hostile_tokens_are_shown_as_they_are(browser, tmp_path):
    with opened(browser, tmp_path, coloured(HOSTILE, title=HOSTILE[0])) as watched:
        shown = watched.page.locator("pre").first.locator("span")
        chosen = routing(len(HOSTILE)).ids[0, :, 0]
        assert shown.all_text_contents() == [f"{visible(p)}{e}" for p, e in zip(HOSTILE, chosen, strict=True)]
        assert HOSTILE[0] in watched.page.locator("p").first.text_content()
        harmless(watched)


def test_hostile_text_passes_through_the_stepper_as_text(browser, tmp_path, hostile_steps):
    with opened(browser, tmp_path, hostile_steps.static()) as watched:
        unfold(watched)
        shown = watched.page.locator("[title^='token ']").all_text_contents()
        assert shown[: len(HOSTILE)] == list(HOSTILE)
        numbers = watched.page.get_by_alt_text("heat map of layers.0.gating.ids", exact=True).first.locator(
            "+ details pre"
        )
        assert all(
            line.startswith(piece) for line, piece in zip(numbers.inner_text().splitlines(), HOSTILE, strict=True)
        )
        harmless(watched)


def test_hostile_names_pass_through_tables_as_text(browser, tmp_path):
    ids = {name: np.zeros((LAYERS, 8, 2), np.int64) for name in HOSTILE}
    table = repeat_table(ids, EXPERTS, title=HOSTILE[1])
    verdicts = "".join(Checked(name)._repr_html_() for name in HOSTILE)
    with opened(browser, tmp_path, table._repr_html_() + verdicts) as watched:
        assert watched.page.locator("tbody th").all_text_contents() == list(HOSTILE)
        harmless(watched)
