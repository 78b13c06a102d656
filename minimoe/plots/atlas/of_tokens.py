"""Sections that begin with the tokens: the coloured texts, their favourite experts, their kinds, what is told."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from minimoe.plots.atlas import numbers
from minimoe.plots.atlas.gather import UNIT
from minimoe.plots.atlas.markup import Html, chip, details, joined, number, percent, table, tag
from minimoe.plots.atlas.plates import Plates
from minimoe.plots.atlas.sections import Section, missing, plate, tabled_layers
from minimoe.plots.atlas.text import reader
from minimoe.plots.html import visible
from minimoe.plots.tokens import middle_layers
from minimoe.routing_pairs import specialisation
from minimoe.shapes import Array
from minimoe.token_types import TYPES

_MOST_EXPERTS = 16  # that a table of favoured tokens has room for


def coloured(plates: Plates) -> Section:
    """The texts themselves."""
    return Section(
        "text", "Look before you count",
        "Every token stands on the colour of the expert chosen first. Move from layer to layer, and watch whether a "
        "colour stays with a word, a line, or a whole text.",
        "Colours without rhyme or reason; but uneven use of the experts alone makes one colour frequent.",
        reader(plates.atlas),
    )  # fmt: skip


def favourites(plates: Plates) -> Section:
    """Whether the token decides."""
    atlas = plates.atlas
    seen, shuffled = numbers.favourites(atlas)
    often = numbers.OFTEN
    if np.isnan(seen).all():
        body = missing(f"No token occurs {often} times or more.")
    else:
        rows = [[i, percent(a), percent(b)] for i, (a, b) in enumerate(zip(seen, shuffled, strict=True))]
        body = table("Occurrences that go to their token’s favourite expert, percent",
                     ["layer", "measured", "choices shuffled"], rows)  # fmt: skip
    parts = [body, tag("h3", "What each expert likes best"), *_favoured(plates)]
    return Section(
        "favourites", "Same token, same expert?",
        f"Of every token that occurs at least {often} times, the share of its occurrences that goes to one and the "
        "same expert. Near 100 the router is a look-up table from token to expert.",
        "The favourite would win by luck, too: the last column deals the same choices out anew.",
        joined(parts),
    )  # fmt: skip


def _favoured(plates: Plates) -> list[Html]:
    atlas = plates.atlas
    L, E, _ = atlas.sizes
    found = []
    for layer in middle_layers(L):
        lists = numbers.favoured_tokens(atlas, layer)
        kept = sorted(range(E), key=lambda e: -sum(count for _, count, _ in lists[e]))[:_MOST_EXPERTS]
        rows = [[chip(e), _pieces(lists[e])] for e in sorted(kept)]
        told = "" if E <= _MOST_EXPERTS else f" ({_MOST_EXPERTS} of {E} experts)"
        caption = f"Layer {layer}: tokens an expert gets most above its share, with their number{told}"
        content = table(caption, ["expert", "tokens"], rows)
        found.append(content if layer == 0 else details(f"Layer {layer}", content))
    return found


def _pieces(tokens: list[tuple[str, int, float]]) -> Html:
    if not tokens:
        return Html("–")
    found = []
    for piece, count, expected in tokens:
        shown = visible(piece).replace("\n", "").replace(" ", "␣")
        told = f"{count:,} first choices, {number(expected)} expected"
        found.append(tag("span", joined([tag("code", shown), tag("small", f"{count:,}")]), class_="piece", title=told))
    return joined(found)


def kinds(plates: Plates) -> Section:
    """Which kinds of tokens an expert gets."""
    atlas = plates.atlas
    L, E, _ = atlas.sizes
    seen = specialisation(atlas.ids, atlas.kinds, E, len(TYPES))
    kept = np.flatnonzero(seen.sum(axis=(0, 2))).tolist()
    layers, note = tabled_layers(L, E * len(kept))
    tables = [
        table(f"Layer {layer}: percent of each kind’s assignments", ["kind", *map(chip, range(E))],
              [[TYPES[y], *(percent(x, 0) for x in _rows_to_one(seen[layer])[y])] for y in kept])
        for layer in layers
    ]  # fmt: skip
    return Section(
        "kinds", "What kinds of tokens an expert gets",
        "A row per kind of token, a column per expert. Orange: more than the expert’s share of all tokens; purple: "
        "less.",
        "Every cell of a column would be white: each expert would get its share of every kind.",
        joined([plate(plates, "token_types"), details("The numbers, layer by layer", joined([*tables, note]))]),
    )  # fmt: skip


def _rows_to_one(counts: Int[Array, "Y E"]) -> Float[Array, "Y E"]:
    total = counts.sum(axis=1, keepdims=True)
    share: Array = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    return share


def information(plates: Plates) -> Section:
    """How much the first choice tells."""
    found = plates.information
    head: list[object] = ["layer"]
    for name in found:
        head += [joined([name, tag("small", f" {what}")]) for what in ("measured", "shuffled")]
    rows = []
    for layer in range(plates.atlas.sizes[0]):
        pairs = ((one.seen[layer], one.shuffled[:, layer].mean()) for one in found.values())
        rows.append([layer, *(number(float(x), 3) for pair in pairs for x in pair)])
    parts = [plate(plates, "information"), details("The numbers", table("Bits about the first choice", head, rows))]
    if "domain" not in found:
        parts.append(missing("One text was read: what the first choice tells about the text needs at least two."))
    return Section(
        "information", "How much does a choice tell?",
        "Mutual information in bits: 0 if the choice tells nothing, log₂ E at most. “Domain, token known” is what the "
        "text still tells when the token is known: there the router reads context.",
        "An estimate from finitely many tokens is never 0. The grey bands show what shuffled labels give; texts are "
        f"dealt out anew to runs of {UNIT} tokens, which keep together.",
        joined(parts),
    )  # fmt: skip
