"""The texts of an atlas on a page: a strip that shows all layers at once, and the tokens coloured by expert.

The source holds the tokens once, in the colours of the first layer; what the other layers chose lies beside them as
numbers, and a few lines of script change the colours. Without the script the first layer is what is seen.
"""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from minimoe.colours import expert_colour
from minimoe.plots.atlas.gather import Atlas, Specimen
from minimoe.plots.atlas.markup import Html, chip, image, joined, tag
from minimoe.plots.html import visible

EXCERPT = 360  # tokens of a text that are shown, at most
_LEAST = 24  # and at least, however many layers there are
_NUMBERS = 240_000  # in all excerpts: about six bytes each in the page


def excerpt_length(atlas: Atlas) -> int:
    """How many tokens of every text are shown, so that the page stays small."""
    L, _, k = atlas.sizes
    return max(_LEAST, min(EXCERPT, _NUMBERS // (L * (2 * k + 1) * len(atlas.shown))))


def reader(atlas: Atlas) -> Html:
    """The texts, the choice of text, layer and expert, and the line that explains one token."""
    L, E, _ = atlas.sizes
    n = excerpt_length(atlas)
    tabs = joined(
        tag("button", text.name, type="button", data_text=g, aria_pressed="true" if g == 0 else "false")
        for g, text in enumerate(atlas.shown)
    )
    experts = joined(
        tag("button", e, type="button", class_=f"chip e{e}", data_expert=e, aria_pressed="false",
            aria_label=f"show only the tokens of expert {e}")
        for e in range(E)
    )  # fmt: skip
    texts = joined(_shown_text(text, g, n) for g, text in enumerate(atlas.shown))
    return Html(
        f'<div class="reader" id="reader" data-layers="{L}">'
        f'<div class="controls" hidden><div class="tabs" role="group" aria-label="text">{tabs}</div>'
        f"{_layer_control(L)}</div>"
        f'<p class="legend">first choice: <span role="group" aria-label="experts">{experts}</span>'
        f' <span class="hint" hidden>press one to see where it goes</span></p>'
        f"{texts}"
        '<div class="told" id="told" aria-live="polite" hidden></div>'
        '<noscript><p class="note">Layer 0 is shown. The other layers need this page\'s script, which is switched off.'
        "</p></noscript></div>"
    )


def _layer_control(num_layers: int) -> Html:
    if num_layers == 1:
        return Html('<span class="layer">layer <output id="layer-shown">0</output>, the only one</span>')
    return Html(
        '<label class="layer">layer <output id="layer-shown">0</output>'
        f'<input id="layer" type="range" min="0" max="{num_layers - 1}" value="0" step="1"></label>'
        '<button type="button" id="play" aria-pressed="false">▶ play the layers</button>'
    )


def _shown_text(text: Specimen, g: int, n: int) -> Html:
    first = text.ids[0, :n, 0].tolist()
    tokens = "".join(_token(piece, e) for piece, e in zip(text.pieces[:n], first, strict=True))
    total = len(text.pieces)
    told = f"the first {n:,} of {total:,} tokens" if total > n else _count(total, "token") + ", all"
    head = joined([tag("b", text.name), f" · {told} · layer ", tag("span", 0, class_="of-layer")])
    label = f"{text.name}, every token on the colour of its first-choice expert"
    shown = tag("pre", Html(tokens), class_="tokens", tabindex=0, role="group", aria_label=label)
    return tag("figure", joined([tag("figcaption", head), shown]), class_="text", data_text=g)


def _token(piece: str, expert: int) -> str:
    """One token; a line end shows as an arrow, followed by a real one outside the box."""
    shown = visible(piece)
    inner = shown.removesuffix("\n")
    return f"{tag('span', joined([inner, tag('sub', expert)]), class_=f'e{expert}')}{shown[len(inner) :]}"


def routes(atlas: Atlas) -> str:
    """What the script needs to know, as JSON that can stand in a page: it holds nothing but numbers.

    Per text: `ids` and `weights` (whole percents), for every layer the slots of its tokens one after the other, and
    `margins` (hundredths; -1 where there is none).
    """
    n = excerpt_length(atlas)
    found = []
    for text in atlas.shown:
        routing = text.routing
        assert routing.weights is not None
        weights = np.rint(100 * np.nan_to_num(routing.weights[:, :n])).astype(int)
        margins = routing.margins[:, :n]
        hundredths = np.where(np.isfinite(margins), np.rint(100 * np.nan_to_num(margins, posinf=0)), -1).astype(int)
        found.append({
            "ids": [layer.ravel().tolist() for layer in routing.ids[:, :n]],
            "weights": [layer.ravel().tolist() for layer in weights],
            "margins": [layer.tolist() for layer in hundredths],
        })  # fmt: skip
    return json.dumps({"k": atlas.sizes[2], "texts": found}, separators=(",", ":"))


def strips(atlas: Atlas) -> Html:
    """One picture per text: a column per token, a row per layer, the first layer below."""
    rows = []
    for text in atlas.shown:
        n = min(len(text.pieces), EXCERPT)
        alt = f"First-choice experts of {_count(n, 'token')} of {text.name}, a column each, a row per layer."
        picture = image(_strip(text, n), alt, class_="strip")
        rows.append(f'<div class="strip-row">{tag("span", text.name, class_="strip-name")}{picture}</div>')
    return Html(f'<div class="strips">{"".join(rows)}</div>')


def _strip(text: Specimen, n: int) -> bytes:
    """A PNG with one pixel per token and layer."""
    first = text.ids[::-1, :n, 0]
    colours = np.array([[int(expert_colour(e)[i : i + 2], 16) for i in (1, 3, 5)] for e in range(int(first.max()) + 1)])
    data = io.BytesIO()
    Image.fromarray(colours[first].astype(np.uint8)).save(data, format="png", optimize=True)
    return data.getvalue()


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n:,} {what}s"


def legend(num_experts: int) -> Html:
    """All experts on their colours."""
    return joined((chip(e) for e in range(num_experts)), " ")
