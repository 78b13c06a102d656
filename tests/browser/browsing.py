"""What the browser tests share: the browser, pages that are watched while they are open, and contrast as it is seen."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
PATIENCE = 60_000  # milliseconds; a loaded machine is slow, and nothing here is timed
READABLE = 4.5  # contrast that WCAG 2.2 asks of text
# Texts that run or fetch something where they are taken for HTML.
HOSTILE = (
    "</script><script>window.broken=1</script>",
    '<img src=x onerror="window.broken=1">',
    '"><svg onload=window.broken=1>',
    "' onmouseover='window.broken=1",
    '" onmouseover="window.broken=1',
    "</code></pre></details><iframe src=https://example.invalid/>",
    "&lt;b&gt;&amp;",
)


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """The marks of a module whose tests drive a browser and import these packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    said = [f"{' and '.join(missing)} not installed: pip install -e '.[browser]'"] if missing else []
    if CHROMIUM is None:
        said.append("Chromium not installed: apt-get install chromium")
    return [pytest.mark.browser, pytest.mark.skipif(bool(said), reason="; ".join(said))]


@contextmanager
def chromium() -> Iterator[Any]:
    """The installed Chromium, without a window. Open for a module at a time: its event loop is in the way of others."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Watched:
    """A page with what it asked of the network and what went wrong in it.

    Attributes
    ----------
    page : playwright's
    home : beginnings of the addresses that it may ask for
    requests : all that it asked for
    errors : exceptions of scripts, and what was logged as an error
    """

    def __init__(self, context: Any, *home: str) -> None:
        self.home = (*home, "data:", "blob:")
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    @property
    def left(self) -> list[str]:
        """Requests that went anywhere but home."""
        return [url for url in self.requests if not url.startswith(self.home)]

    def least_contrast(self, selector: str = "body, body *") -> tuple[float, str]:
        """The contrast of the text that is read worst, and that text; colours as they come out over one another."""
        found = self.page.evaluate(_CONTRAST, selector)
        assert found, f"no text in {selector}"
        return min((ratio, text) for ratio, text in found)


@contextmanager
def opened(browser: Any, folder: Path, fragment: str, scheme: str = "light", width: int = 1280) -> Iterator[Watched]:
    """Open HTML in a page that follows the reader's colour scheme, as notebooks and the pages of courses do."""
    whole = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>page</title>'
    path = folder / "page.html"
    path.write_text(fragment if fragment.lower().startswith("<!doctype") else whole + fragment, encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.route("**/*", lambda route: route.continue_() if route.request.url == path.as_uri() else route.abort())
    watched = Watched(context, path.as_uri())
    watched.page.goto(path.as_uri())
    yield watched
    context.close()


def unfold(watched: Watched) -> None:
    """Open everything that is folded."""
    watched.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def harmless(watched: Watched) -> None:
    """Nothing of a text has become an element or run, also when the mouse passes over it."""
    for element in watched.page.locator("[title]").all()[:20]:
        if element.is_visible():
            element.hover()
    assert watched.page.evaluate("window.broken") is None
    assert watched.page.locator("iframe, svg[onload], [onmouseover], [onerror]").count() == 0
    assert watched.errors == []
    assert watched.left == []


def overflow(watched: Watched) -> int:
    """By how many pixels the page is wider than the window."""
    return int(watched.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


# Every element that shows text of its own: its colour over the backgrounds and through the opacities of what it is in.
# What an SVG text stands on is the rectangle drawn before it.
_CONTRAST = """
selector => {
    const probe = document.createElement('div')
    probe.style.cssText = 'background-color: Canvas'
    document.body.append(probe)
    const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    const parts = colour => {
        paint.clearRect(0, 0, 1, 1)
        paint.fillStyle = colour
        paint.fillRect(0, 0, 1, 1)
        const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data
        return [r, g, b, a / 255]
    }
    const canvas = parts(getComputedStyle(probe).backgroundColor)
    probe.remove()
    const over = (top, bottom, opacity) => {
        const a = top[3] * opacity
        return [0, 1, 2].map(i => top[i] * a + bottom[i] * (1 - a)).concat(1)
    }
    const luminance = colour => {
        const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const found = []
    for (const element of document.querySelectorAll(selector)) {
        const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('')
        if (!text || !element.checkVisibility({visibilityProperty: true}) || !element.getClientRects().length) continue
        const chain = []
        for (let e = element; e; e = e.parentElement) chain.unshift(getComputedStyle(e))
        let ground = canvas, opacity = 1
        for (const style of chain) {
            opacity *= +style.opacity
            ground = over(parts(style.backgroundColor), ground, opacity)
        }
        const svg = element instanceof SVGTextElement, box = svg && element.previousElementSibling
        if (box && box.tagName === 'rect' && getComputedStyle(box).fill !== 'none')
            ground = over(parts(getComputedStyle(box).fill), ground, opacity)
        const style = getComputedStyle(element), ink = over(parts(svg ? style.fill : style.color), ground, opacity)
        const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b)
        found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)])
    }
    return found
}
"""
