"""Sections that begin with the experts: shares, neighbours, certainty, pairs, paths, and what each is worth."""

from __future__ import annotations

import numpy as np

from minimoe.ablation import Ablation
from minimoe.plots.atlas import numbers
from minimoe.plots.atlas.markup import Html, chip, details, joined, number, percent, table, tag, three_digits
from minimoe.plots.atlas.plates import Plates
from minimoe.plots.atlas.sections import Section, plate, tabled_layers
from minimoe.repetition import KINDS, RepeatTable, Repetition, mixtral_repeats
from minimoe.routing_pairs import coactivation, independent_coactivation

_KINDS = {"first": "same first choice", "any": "any choice in common"}


def shared(plates: Plates) -> Section:
    """Figure 7 of the paper."""
    atlas = plates.atlas
    L, E, _ = atlas.sizes
    layers, note = tabled_layers(L, E * len(atlas.shown))
    tables = [
        table(f"{text.name}: percent of each layer’s assignments", ["layer", *map(chip, range(E))],
              [[layer, *(percent(x) for x in plates.shares[g, layer])] for layer in layers])
        for g, text in enumerate(atlas.shown)
    ]  # fmt: skip
    folded = details("The numbers, text by text", joined([*tables, note]))
    return Section(
        "shares", "What each text gets",
        "A bar per expert: how much of a text’s work it does in this layer (figure 7 of the Mixtral paper); below, all "
        "layers at once.",
        f"Every bar would end at the dashed line, {three_digits(1 / E)} percent. Tokens of a text resemble each other, "
        "so some distance from the line is to be expected even of a fair router.",
        joined([plate(plates, "domains"), plate(plates, "shares"), folded]),
    )  # fmt: skip


def neighbours(plates: Plates) -> Section:
    """Table 5 of the paper."""
    _, E, k = plates.atlas.sizes
    measured, parts = plates.repeats, [plate(plates, "repeats")]
    layers, note = tabled_layers(len(measured.layers), 2 * len(measured.rows))
    parts += [_repeats(measured.of(list(layers)), kind) for kind in KINDS]
    if (E, k) == (8, 2):
        paper = mixtral_repeats()
        both = joined([*(_repeats(paper, kind) for kind in KINDS), tag("p", paper.source + ".", class_="note")])
        parts.append(details("The paper’s own figures, for Mixtral 8x7B", both))
    else:
        told = f"The paper’s figures are for 8 experts, 2 a token; beside {E} and {k} they would mislead."
        parts.append(tag("p", told, class_="note"))
    return Section(
        "neighbours", "Do neighbours share experts?",
        "How often a token and the next get the same expert, per layer (table 5 of the Mixtral paper). In square "
        f"brackets: {measured.intervals}. In round brackets: the same tokens in shuffled order.",
        f"Even and independent choices give {three_digits(measured.chance['first'])} percent for the first choice and "
        f"{three_digits(measured.chance['any'])} for any in common. Uneven use raises both: the shuffled order shows "
        "how far.",
        joined([*parts, note]),
    )  # fmt: skip


def _repeats(found: RepeatTable, kind: str) -> Html:
    caption = f"{found.title}: {_KINDS[kind]}, percent of pairs of neighbours"
    head = ["text", *(f"layer {layer}" for layer in found.layers)]
    rows = [[name, *(_rate(row[kind], i) for i in range(len(found.layers)))] for name, row in found.rows.items()]
    return table(caption, head, rows)


def _rate(one: Repetition, i: int) -> Html:
    interval = "" if np.isnan(one.low[i]) else f" [{percent(one.low[i])}, {percent(one.high[i])}]"
    shuffled = "" if one.shuffled is None or np.isnan(one.shuffled[i]) else f" ({percent(one.shuffled[i])})"
    return joined([percent(one.rate[i]), tag("small", (interval + shuffled).strip(), class_="under")])


def certainty(plates: Plates) -> Section:
    """Margins and entropies."""
    _, E, k = plates.atlas.sizes
    found = numbers.routers(plates.atlas)
    rows = [
        [i, number(found.margin[i], 2), percent(found.near[i]), number(found.entropy[i], 2),
         number(found.shuffled_entropy[i], 2), number(found.first_weight[i], 2)]
        for i in range(len(found.margin))
    ]  # fmt: skip
    head = ["layer", "median margin", f"margin below {numbers.NEAR}, percent", "mean entropy, bits",
            "the same, logits shuffled", "mean weight of the first choice"]  # fmt: skip
    return Section(
        "certainty", "How sure are the routers?",
        "The margin is the distance in logits between the last expert chosen and the next: what a rounding error would "
        f"have to bridge. The entropy says how undecided the softmax over all {E} experts was.",
        f"Experts all alike would give {number(float(np.log2(E)), 2)} bits, and a first weight of {number(1 / k, 2)}. "
        "The thin line deals each expert’s logits out anew among the tokens.",
        joined([plate(plates, "router"), table("Routers, over all tokens", head, rows)]),
    )  # fmt: skip


def pairs(plates: Plates) -> Section:
    """Who works with whom."""
    atlas = plates.atlas
    _, E, k = atlas.sizes
    parts = [plate(plates, "pairs")]
    if plates.by_name["pairs"].draw is not None:
        parts.append(_notable_pairs(plates))
    even = k * (k - 1) / (E * (E - 1)) if E > 1 else 1.0
    return Section(
        "pairs", "Who works with whom?",
        "How often two experts serve the same token, compared with experts that are chosen this often, but "
        "independently of each other. Where there is room for numbers, these stand above the diagonal.",
        f"With even use every pair shares {three_digits(even)} percent of the tokens.",
        joined(parts),
    )  # fmt: skip


def _notable_pairs(plates: Plates) -> Html:
    """The pairs furthest from independence, in either direction."""
    atlas = plates.atlas
    _, E, _ = atlas.sizes
    seen = coactivation(atlas.ids, E)
    expected = independent_coactivation(seen)
    excess = (seen - expected) / np.sqrt(np.maximum(expected, 1e-9))
    excess[:, *np.tril_indices(E)] = 0
    N, rows = atlas.ids.shape[1], []
    for at in np.argsort(-np.abs(excess), axis=None, kind="stable")[:10]:
        layer, a, b = (int(x) for x in np.unravel_index(at, excess.shape))
        if excess[layer, a, b] and expected[layer, a, b] >= 5:
            rows.append([layer, joined([chip(a), " ", chip(b)]), percent(seen[layer, a, b] / N),
                         percent(expected[layer, a, b] / N)])  # fmt: skip
    return table(
        "Pairs furthest from independence, percent of all tokens", ["layer", "experts", "seen", "expected"], rows
    )


def paths(plates: Plates) -> Section:
    """From layer to layer."""
    parts = [plate(plates, "paths")]
    if plates.by_name["paths"].draw is not None:
        rows = [
            [f"{i} → {i + 1}", joined([chip(a), " → ", chip(b)]), f"{count:,}", f"{expected:,.0f}"]
            for i, a, b, count, expected in numbers.busiest_steps(plates.atlas)
        ]
        parts.append(table("Steps that stand out most", ["layers", "experts", "tokens", "expected"], rows))
    return Section(
        "paths", "Paths through the layers",
        "A column of experts per layer, and bands as wide as the number of tokens that go from one to the next by "
        "their first choices.",
        "If layers chose independently every band would be grey. Coloured bands do not prove a pipeline: neighbouring "
        "layers agree already because both look at the same token.",
        joined(parts),
    )  # fmt: skip


def worth(plates: Plates) -> Section:
    """What switching off costs."""
    parts = [plate(plates, "switched_off")]
    if plates.atlas.costs is not None:
        parts += _missed(plates.atlas.costs)
    return Section(
        "worth", "What is an expert worth?",
        "The gate of one layer may not choose one expert; its tokens take their next choice, and all later layers see "
        "the consequences. Shown is by how much the loss rises: evidence of cause, where shares are none.",
        "An expert that is not needed costs nothing, give or take the standard error.",
        joined(parts),
    )  # fmt: skip


def _missed(costs: Ablation) -> list[Html]:
    """The largest costs, and how many costs are more than luck."""
    rows = []
    for at in np.argsort(-costs.costs, axis=None, kind="stable")[:10]:
        g, layer, e = (int(x) for x in np.unravel_index(at, costs.costs.shape))
        rise = f"{number(costs.costs[g, layer, e], 3)} ± {number(costs.errors[g, layer, e], 3)}"
        rows.append([costs.names[g], layer, chip(e), rise, percent(costs.usage[g, layer, e], 0)])
    head = ["text", "layer", "expert", "rise of the loss, nats", "serves, percent of tokens"]
    known = np.isfinite(costs.errors) & (costs.errors > 0)
    clear, tried = int((np.abs(costs.costs[known]) > 2 * costs.errors[known]).sum()), int(known.sum())
    told = f"Of {tried:,} costs {clear:,} lie two standard errors or more from zero; luck would give about "
    luck = tag("p", told + f"{0.0455 * tried:,.0f}.", class_="note")
    return [table("The experts that are missed most", head, rows), luck]
