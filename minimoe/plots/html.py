"""A text coloured by expert as HTML for notebooks: hovering over a token shows its experts, weights and margin.

No scripts and no style sheet, only attributes, so that nbviewer, nbconvert and JupyterLab show the colours; GitHub
strips attributes, too: there the numbers below the tokens remain, and the text in its own lines. Every token brings its
own background and ink, so that dark pages show the same as light ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from minimoe.colours import expert_colour, ink
from minimoe.display import RETURN, shown_piece
from minimoe.plots.page import checked_layers, checked_routing
from minimoe.plots.tokens import middle_layers
from minimoe.shapes import Routing

_PRE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;font-size:13px;color:inherit;background:transparent;"
    "margin:0 0 1em"
)


class TokenHtml:
    """What a notebook shows as HTML; `str` gives the source, to be put into a page."""

    def __init__(self, source: str) -> None:
        self._source = source

    def _repr_html_(self) -> str:
        return self._source

    __str__ = _repr_html_

    def __repr__(self) -> str:
        return f"TokenHtml of {len(self._source):,} characters: a notebook shows it in colour"


def token_html(
    pieces: Sequence[str],
    routing: Routing | None,
    *,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> TokenHtml:
    """Return a text with every token on the colour of its first-choice expert, one paragraph per layer.

    Parameters
    ----------
    pieces : N texts, as `Tokenizer.pieces` gives them
    routing : ids (L, N, k); weights and logits where they are to be shown. None is refused: a dense model
    layers : which to show; None shows the first, the middle and the last
    title : above all
    """
    routing = checked_routing(routing, len(pieces))
    layers = checked_layers(layers, len(routing.ids), middle_layers(len(routing.ids)))
    parts = ["<div>"]
    if title:
        parts.append(f"<p><b>{escape(title)}</b></p>")
    experts = sorted({int(e) for e in routing.ids[list(layers), :, 0].flat if e >= 0})
    chips = " ".join(f'<span style="{_style(e)};padding:1px 5px">{e}</span>' for e in experts)
    parts.append(f"<p>first choice: expert {chips}</p>")
    for layer in layers:
        tokens = "".join(_token(pieces[n], n, routing, layer) for n in range(len(pieces)))
        parts.append(f'<p><b>layer {layer}</b></p><pre style="{_PRE}">{tokens}</pre>')
    return TokenHtml("".join(parts) + "</div>")


def _style(expert: int) -> str:
    colour = expert_colour(expert)
    return f"background:{colour};color:{ink(colour)};border-radius:2px;margin-right:1px"


def _number(expert: int) -> str:
    """The expert's number, small below the token; where styles are taken away, an ordinary subscript."""
    return f'<sub style="font-size:65%;line-height:0;vertical-align:-2px;margin-left:1px">{expert}</sub>'


def _token(piece: str, n: int, routing: Routing, layer: int) -> str:
    """One token; a line end shows as an arrow, followed by a real one outside the box."""
    first = int(routing.ids[layer, n, 0])
    text = escape(visible(piece))
    inner = text.removesuffix("\n")
    after = text[len(inner) :]
    title = escape(_told(piece, n, routing, layer), quote=True)
    if first < 0:
        return f'<span title="{title}" style="border:1px dotted">{inner}</span>{after}'
    return f'<span title="{title}" style="{_style(first)}">{inner}{_number(first)}</span>{after}'


def visible(piece: str) -> str:
    """Show white space: a line end as ↵ and a new line, a tab as an arrow, a run of spaces alone as dots.

    >>> visible("a\\n"), visible("    "), visible("\\tb")
    ('a↵\\n', '····', '→\\tb')
    """
    text = shown_piece(piece).replace("\t", "→\t").replace("\n", RETURN + "\n")
    head = text.rstrip(" ")
    if not head.strip(RETURN + "\n→\t "):  # nothing but white space
        return text.replace(" ", "·")
    return head + "·" * (len(text) - len(head))


def _told(piece: str, n: int, routing: Routing, layer: int) -> str:
    """What hovering tells: token, experts with weights and logits, margin."""
    name = ascii(piece) if not piece.isprintable() else f"'{piece}'"
    ids = routing.ids[layer, n]
    if ids[0] < 0:
        return f"token {n} {name} · layer {layer} · not routed"
    told = []
    for slot, expert in enumerate(ids):
        weight = "" if routing.weights is None else f" weight {float(routing.weights[layer, n, slot]):.3f}"
        logit = "" if routing.logits is None else f" (logit {float(routing.logits[layer, n, expert]):.2f})"
        told.append(f"expert {int(expert)}{weight}{logit}")
    if routing.logits is not None:
        one = Routing(ids[None, None], None, np.asarray(routing.logits)[layer, n][None, None])
        told.append(f"margin {float(one.margins[0, 0]):.3f}")
    return f"token {n} {name} · layer {layer} · " + " · ".join(told)
