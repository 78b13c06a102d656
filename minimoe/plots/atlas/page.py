"""The routing atlas as one HTML page that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from minimoe.model import Model
from minimoe.plots.atlas import about, of_experts, of_tokens
from minimoe.plots.atlas.files import together
from minimoe.plots.atlas.gather import gather
from minimoe.plots.atlas.markup import Html, expert_styles, joined, tag
from minimoe.plots.atlas.plates import Plates
from minimoe.plots.atlas.text import legend, routes, strips

_SECTIONS = (
    of_tokens.coloured, of_tokens.favourites, of_experts.shared, of_tokens.kinds, of_tokens.information,
    of_experts.neighbours, of_experts.certainty, of_experts.pairs, of_experts.paths, of_experts.worth, about.limits,
)  # fmt: skip


class RoutingPage:
    """A page; `str` gives its source, `save` writes it, and a notebook shows it in a frame."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __str__(self) -> str:
        return self._source

    def __repr__(self) -> str:
        return f"RoutingPage of {len(self._source):,} characters: .save('page.html') writes it"

    def save(self, path: str | Path) -> None:
        """Write the page: its file is whole or as it was before."""
        with together() as outputs:
            outputs.write(path, self._source)

    def _repr_html_(self) -> str:
        frame = 'style="width:100%;height:80vh;border:1px solid #ccc" title="routing atlas"'
        return f'<iframe {frame} sandbox="allow-scripts" srcdoc="{html.escape(self._source, quote=True)}"></iframe>'


def routing_page(
    model: Model,
    texts: Mapping[str, str],
    *,
    name: str = "model",
    window: int | None = None,
    seed: int = 0,
    switch_off: bool = False,
    progress: Callable[[int], object] | None = None,
) -> RoutingPage:
    """Let a model read texts, and tell on one page how its routers decided, every number beside chance.

    Parameters
    ----------
    model : sparse, with a tokenizer
    texts : name -> text, a domain each; what compares domains needs two or more
    name : of the model, for the title
    window : tokens the model sees at once (default 256); longer texts are read in windows overlapping by half
    seed : of every shuffle
    switch_off : also measure what each expert is worth, in L · E + 1 further passes over two windows of every text
    progress : called with 1 after every window and every pass

    Raises
    ------
    ValueError
        If the model is dense or has no tokenizer, or there is no text.

    Notes
    -----
    On the page stand excerpts: its size does not grow with the texts. Held in memory are all decisions of all
    routers, about L · (32·k + 8·E) bytes a token (Mixtral 8x7B: 4 kB).
    """
    return page_of(Plates(gather(model, texts, name=name, window=window, seed=seed, switch_off=switch_off,
                                 progress=progress)))  # fmt: skip


def page_of(plates: Plates, step: Callable[[int], object] = lambda n: None) -> RoutingPage:
    """Make the page of an atlas; `step` is called with 1 after every section."""
    sections = [about.what_was_read(plates)]
    for make in _SECTIONS:
        sections.append(make(plates))
        step(1)
    atlas = plates.atlas
    data = Html(f'<script type="application/json" id="routes">{routes(atlas)}</script>')
    contents = tag("nav", tag("ol", joined(
        tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections
    )), aria_label="contents")  # fmt: skip
    main = tag("main", joined([_head(plates), contents, *(section.source for section in sections)]), id="top")
    return RoutingPage(_document(f"Routing atlas: {atlas.name}", joined([main, _FOOT, data]), atlas.sizes[1]))


PARTS = len(_SECTIONS)  # how often `page_of` calls `step`

_FOOT = Html(
    "<footer><p>Made by <code>minimoe route --html</code>. After section 5 of Jiang et al., Mixtral of Experts, arXiv "
    "2401.04088. This page loads nothing from elsewhere.</p></footer>"
)


def _head(plates: Plates) -> Html:
    atlas = plates.atlas
    L, E, k = atlas.sizes
    tokens = f"{atlas.ids.shape[1]:,}"
    layers = "1 layer" if L == 1 else f"{L} layers"
    texts = "1 text" if len(atlas.texts) == 1 else f"{len(atlas.texts):,} texts"
    told = f"{layers} of {E} experts, {k} a token · {tokens} tokens of {texts}"
    caption = "The beginning of each text: a column per token, a row per layer, the first layer below; the colour is "
    caption += "the expert chosen first."
    return tag("header", joined([
        tag("p", "Routing atlas", class_="kicker"), tag("h1", atlas.name), tag("p", told, class_="sizes"),
        strips(atlas), tag("p", caption, class_="note"), tag("p", legend(E), class_="legend"),
        about.tiles(plates),
    ]))  # fmt: skip


def _document(title: str, body: Html, num_experts: int) -> str:
    folder = files("minimoe.plots.atlas")
    script = (folder / "page.js").read_text("utf-8")
    style = (folder / "page.css").read_text("utf-8") + expert_styles(num_experts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', title)}\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )
