"""The stepper in JupyterLab, with a live kernel: buttons, slider and switches do what they say."""

from __future__ import annotations

import pytest

import minimoe
from minimoe.stepper import Stepper
from tests.browser.browsing import READABLE, chromium, needs
from tests.browser.lab import run_all, server, write

pytestmark = needs("playwright", "jupyterlab", "ipywidgets", "ipykernel")

TEXT = "def f(x):\n    return <x>"
CELL = f"""
import minimoe
from minimoe.stepper import Stepper

Stepper(minimoe.load("tiny", backend="numpy"), {TEXT!r})
"""


@pytest.fixture(scope="module")
def steps():
    return Stepper(minimoe.load("tiny", backend="numpy"), TEXT)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with server(folder) as address, chromium() as browser:
        write(folder / "notebooks" / "steps.ipynb", CELL)
        yield run_all(browser, address.format("steps.ipynb"))


class Shown:
    """The stepper as it stands in the page."""

    def __init__(self, page, steps):
        self.page, self.steps = page, steps
        self.output = page.locator(".jp-OutputArea-output").first
        self.back, self.next = (self.output.get_by_role("button", name=name) for name in ("Back", "Next"))
        self.numbers, self.code = (self.output.locator("button", has_text=name) for name in ("numbers", "code"))
        self.readout, self.handle = self.output.locator(".widget-readout"), self.output.locator(".noUi-handle")
        self.heading = self.output.get_by_role("heading")

    def wait_for(self, number):
        """Wait until the step with this number, from 1, is there, and hold it against the one of our own kernel."""
        text = f"{number} of {len(self.steps)}: {self.steps[number - 1].name}"
        self.output.get_by_role("heading", name=text, exact=True).wait_for()
        assert self.readout.inner_text() == str(number)
        shown = self.output.locator(".widget-html-content, .widget-html").last.inner_text()
        for part in self.steps[number - 1].equation.split(";  "):
            assert " ".join(part.split()) in " ".join(shown.split())

    def go(self, number):
        self.readout.fill(str(number))
        self.readout.press("Enter")
        self.wait_for(number)


@pytest.fixture
def shown(lab, steps):
    shown = Shown(lab.page, steps)
    for switch in (shown.numbers, shown.code):
        if "mod-active" in switch.get_attribute("class"):
            switch.click()
    shown.go(1)
    return shown


def test_the_output_is_the_widget_and_not_the_static_page_or_text(lab, shown):
    assert shown.output.locator(".jupyter-widgets").first.is_visible()
    assert lab.page.locator(".jp-OutputArea-output").count() == 1  # no warning, no error, nothing printed
    assert "Stepper of" not in shown.output.inner_text() and "further steps" not in shown.output.inner_text()
    assert "Error displaying widget" not in shown.output.inner_text()


def test_next_shows_the_next_step_and_back_returns(shown):
    for number in (2, 3, 4):
        shown.next.click()
        shown.wait_for(number)
    image = shown.output.get_by_alt_text("heat map of layers.0.attention.q", exact=True)
    assert image.is_visible() and image.evaluate("image => image.naturalWidth") > 1
    for number in (3, 2, 1):
        shown.back.click()
        shown.wait_for(number)


def test_back_is_inert_at_the_first_step_and_next_at_the_last(shown, steps):
    assert shown.back.is_disabled() and shown.next.is_enabled()
    shown.go(len(steps))
    assert shown.next.is_disabled() and shown.back.is_enabled()
    shown.next.click(force=True)
    shown.back.click()  # handled after the click on Next, had that done anything
    shown.wait_for(len(steps) - 1)


def test_the_slider_jumps_to_where_it_is_dragged(shown, steps):
    track, handle = shown.output.locator(".noUi-base").bounding_box(), shown.handle.bounding_box()
    middle = handle["y"] + handle["height"] / 2
    mouse = shown.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, middle)
    mouse.down()
    mouse.move(track["x"] + track["width"] / 2, middle, steps=5)
    mouse.up()
    half = (1 + len(steps)) / 2
    shown.output.get_by_role("heading", name=f" of {len(steps)}: layers.").wait_for()
    number = int(shown.readout.inner_text())
    assert abs(number - half) <= 1
    shown.wait_for(number)
    shown.handle.press("ArrowRight")
    shown.wait_for(number + 1)


def test_the_map_marks_where_the_step_stands(shown, steps):
    shown.go(1 + next(i for i, step in enumerate(steps) if step.name == "layers.3.gating"))
    marked = shown.output.locator("svg text[font-weight=bold]")
    assert marked.all_text_contents() == ["layer 3", "gate"]
    fills = marked.evaluate_all("texts => texts.map(t => getComputedStyle(t.previousElementSibling).fill)")
    assert fills == ["rgb(230, 159, 0)"] * 2


def test_numbers_unfold_on_demand_and_are_those_of_the_trace(shown, steps):
    shown.go(1 + next(i for i, step in enumerate(steps) if step.name == "layers.0.ffn_norm"))
    fold = shown.output.locator("details", has_text="numbers").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    line = fold.locator("pre").inner_text().splitlines()[0]
    truth = steps.trace["layers.0.attention.out"].reshape(-1, steps.trace.config.hidden_size)[0]
    assert line.startswith("<s>") and float(line.split("|")[1].split()[0]) == pytest.approx(truth[0], rel=1e-3)


def test_the_code_of_three_dialects_stays_unfolded_from_step_to_step(shown, steps):
    gate = 1 + next(i for i, step in enumerate(steps) if step.name == "layers.0.gating")
    shown.go(gate - 1)
    shown.code.click()
    shown.output.locator("details[open]", has_text="code of rmsnorm.forward").wait_for()
    shown.next.click()
    shown.wait_for(gate)
    code = shown.output.locator("details", has_text="code of gating.forward")
    assert code.locator("b").all_inner_texts() == ["array code", "Numba loops", "CUDA"]
    texts = code.locator("pre")
    assert all(texts.nth(i).is_visible() for i in range(3))
    assert "def forward" in texts.nth(0).inner_text() and "def choose(" in texts.nth(1).inner_text()
    shown.numbers.click()
    shown.output.locator("details:not([open])").first.wait_for(state="detached")
    assert shown.output.locator("details[open]").count() == 1 + shown.output.locator("img").count()


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_steps_fit_and_can_be_read_in_both_themes(lab, shown, steps, theme):
    change = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
    lab.page.evaluate(change, f"JupyterLab {theme}")
    lab.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=f"JupyterLab {theme}")
    shown.numbers.click()
    for name in ("tok_embeddings", "layers.0.attention", "layers.0.gating", "layers.0.experts", "logits"):
        shown.go(1 + next(i for i, step in enumerate(steps) if step.name == name))
        assert shown.output.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
        ratio, text = lab.least_contrast(".widget-html, .widget-html *")
        assert ratio >= READABLE, text
    lab.page.evaluate(change, "JupyterLab Light")


def test_nothing_went_wrong_and_nothing_was_fetched_from_elsewhere(lab, shown):
    shown.next.click()
    shown.wait_for(2)
    assert lab.errors == []
    assert lab.left == []
