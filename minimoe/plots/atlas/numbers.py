"""What an atlas counts, each beside what chance would give; figures and tables show these numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.config import ModelConfig
from minimoe.plots.atlas.gather import UNIT, Atlas
from minimoe.reading import Reading
from minimoe.repetition import RepeatTable, repeat_table
from minimoe.routing_pairs import independent, transitions
from minimoe.routing_statistics import (
    chance_of_repeats,
    domain_information,
    entropy,
    mutual_information,
    repeats,
    router_entropy,
    shares,
    shuffled_information,
    shuffled_logits,
    shuffled_repeats,
)
from minimoe.shapes import Array

SHUFFLES = 100  # of the domains
_FEW = 10  # shuffles of single tokens, which scatter less
OFTEN = 10  # occurrences from which on a token may have a favourite expert
NEAR = 0.01  # a margin in logits that rounding may bridge


@dataclass(frozen=True, eq=False)
class Information:
    """How many bits the first choice tells about something, measured (L,) and after shuffles (R, L)."""

    seen: Float[Array, " L"]
    shuffled: Float[Array, "R L"]


@dataclass(frozen=True, eq=False)
class Routers:
    """How sure the routers are, (L,) each, over all tokens.

    Attributes
    ----------
    margin : median distance in logits between the last expert chosen and the next; infinite where k = E
    near : share of tokens whose margin is below `NEAR`
    entropy, shuffled_entropy : mean bits of the softmax over all experts; the same with logits dealt out anew
    first_weight : mean gate weight of the first choice
    """

    margin: Float[Array, " L"]
    near: Float[Array, " L"]
    entropy: Float[Array, " L"]
    shuffled_entropy: Float[Array, " L"]
    first_weight: Float[Array, " L"]


def text_shares(atlas: Atlas) -> Float[Array, "G L E"]:
    """Share of the assignments of every shown text."""
    E = atlas.sizes[1]
    return np.array([shares(text.ids, E) for text in atlas.shown])


def repeated(atlas: Atlas) -> RepeatTable:
    """How often consecutive tokens get the same expert, in every shown text."""
    routings = {text.name: text.ids for text in atlas.shown}
    return repeat_table(routings, atlas.sizes[1], title=atlas.name, seed=atlas.seed)


def summary(readings: Sequence[Reading], config: ModelConfig, seed: int) -> dict[str, Any]:
    """What `minimoe route` prints: everything that is counted on ids alone, ready for JSON."""
    first, any_choice = chance_of_repeats(config.num_experts, config.num_experts_per_token)
    return {
        "layers": config.num_layers,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_token,
        "even_share": 1 / config.num_experts,
        "chance_of_repeats": {"first": first, "any": any_choice},
        "texts": [_of_one(reading, config.num_experts, seed) for reading in readings],
        "information": _domain_summary(readings, seed),
    }


def _of_one(reading: Reading, num_experts: int, seed: int) -> dict[str, Any]:
    """What is counted for one text."""
    assert reading.ids is not None
    first, any_choice = repeats(reading.ids)
    shuffled_first, shuffled_any = (runs.mean(axis=0) for runs in shuffled_repeats(reading.ids, seed=seed))
    return {
        "name": reading.name,
        "tokens": reading.tokens.size,
        "in_windows": reading.in_windows,
        "shares": shares(reading.ids, num_experts),
        "first_choice_entropy": entropy(shares(reading.ids[..., :1], num_experts)),
        "repeats": {"first": first, "any": any_choice},
        "repeats_in_shuffled_order": {"first": shuffled_first, "any": shuffled_any},
    }


def _domain_summary(readings: Sequence[Reading], seed: int) -> dict[str, Any] | None:
    """What the first choice tells about the text; None where there is only one."""
    if len(readings) < 2:
        return None
    found, at_most = domain_bits(readings, seed)
    runs = found.shuffled
    shuffled = {"mean": runs.mean(axis=0), "max": runs.max(axis=0), "shuffles": SHUFFLES, "unit_tokens": UNIT}
    return {"bits": found.seen, "at_most": at_most, "shuffled": shuffled}


def domain_bits(readings: Sequence[Reading], seed: int) -> tuple[Information, float]:
    """What the first choice tells about the text, and the most it could; texts are dealt to runs of 64 tokens."""
    ids = np.concatenate([one.ids for one in readings if one.ids is not None], axis=1)
    sizes = [one.tokens.size for one in readings]
    domains = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([np.arange(n) // UNIT for n in sizes]) + domains * (max(sizes) // UNIT + 1)
    shuffled = shuffled_information(ids, domains, units, shuffles=SHUFFLES, seed=seed)
    return Information(domain_information(ids, domains), shuffled), float(entropy(np.array(sizes) / sum(sizes)))


def information(atlas: Atlas) -> dict[str, Information]:
    """What the first choice tells about token, kind of token and domain; the last two need several texts."""
    rng, first = np.random.default_rng(atlas.seed), atlas.ids[..., 0]
    tokens = np.unique(atlas.tokens, return_inverse=True)[1]
    found = {}
    for name, labels in (("token", tokens), ("kind of token", atlas.kinds)):
        shuffled = [[mutual_information(layer, rng.permutation(labels)) for layer in first] for _ in range(_FEW)]
        found[name] = Information(
            np.array([mutual_information(layer, labels) for layer in first]), np.array(shuffled)
        )  # fmt: skip
    if len(atlas.texts) > 1:
        found["domain"] = domain_bits([text.reading for text in atlas.texts], atlas.seed)[0]
        found["domain, token known"] = _given_token(first, tokens, atlas.domains, found["token"].seen, rng)
    return found


def _given_token(
    first: Int[Array, "L N"],
    tokens: Int[Array, " N"],
    domains: Int[Array, " N"],
    token_bits: Float[Array, " L"],
    rng: np.random.Generator,
) -> Information:
    """I(expert; domain | token) = I(expert; token and domain) - I(expert; token); domains are dealt within tokens."""

    def bits(labels: Int[Array, " N"]) -> Float[Array, " L"]:
        both = np.unique(tokens * (int(domains.max()) + 1) + labels, return_inverse=True)[1]
        return np.array([mutual_information(layer, both) for layer in first]) - token_bits

    def dealt() -> Int[Array, " N"]:
        labels = np.empty_like(domains)
        labels[np.argsort(tokens, kind="stable")] = domains[np.lexsort((rng.random(tokens.size), tokens))]
        return labels

    return Information(bits(domains), np.array([bits(dealt()) for _ in range(_FEW)]))


def favourites(atlas: Atlas) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """Share of occurrences that go to their token's favourite expert, seen and with the choices shuffled.

    Tokens that occur fewer than `OFTEN` times are left out; NaN where there are no others.
    """
    rng, E = np.random.default_rng(atlas.seed), atlas.sizes[1]
    tokens = np.unique(atlas.tokens, return_inverse=True)[1]

    def share(first: Int[Array, " N"]) -> float:
        counts = np.bincount(tokens * E + first, minlength=(int(tokens.max()) + 1) * E).reshape(-1, E)
        often = counts[counts.sum(axis=1) >= OFTEN]
        return float(often.max(axis=1).sum() / often.sum()) if often.size else float("nan")

    first = atlas.ids[..., 0]
    return np.array([share(f) for f in first]), np.array([share(rng.permutation(f)) for f in first])


def favoured_tokens(atlas: Atlas, layer: int, most: int = 8) -> list[list[tuple[str, int, float]]]:
    """Of every expert of a layer, the tokens that it gets most above expectation: (piece, count, expected count).

    Counted are first choices; the order is by (seen - expected) / √expected, and what is below 5 counts is left out.
    """
    E, pieces = atlas.sizes[1], [piece for text in atlas.texts for piece in text.pieces]
    _, where, tokens = np.unique(atlas.tokens, return_index=True, return_inverse=True)
    counts = np.bincount(tokens * E + atlas.ids[layer, :, 0], minlength=len(where) * E).reshape(-1, E)
    expected = independent(counts)
    excess = np.where(counts >= 5, (counts - expected) / np.sqrt(np.maximum(expected, 1e-9)), -np.inf)
    found = []
    for e in range(E):
        best = [int(t) for t in np.argsort(-excess[:, e], kind="stable")[:most] if excess[t, e] > 0]
        found.append([(pieces[where[t]], int(counts[t, e]), float(expected[t, e])) for t in best])
    return found


def routers(atlas: Atlas) -> Routers:
    """How sure the routers are."""
    routing, L = atlas.routing, atlas.sizes[0]
    assert routing.logits is not None and routing.weights is not None
    margins, logits = routing.margins, routing.logits
    seen = np.array([router_entropy(logits[i]).mean() for i in range(L)])
    dealt = [router_entropy(shuffled_logits(logits[i : i + 1], seed=atlas.seed)).mean() for i in range(L)]
    first = np.asarray(routing.weights[..., 0], np.float64).mean(axis=1)
    return Routers(np.median(margins, axis=1), (margins < NEAR).mean(axis=1), seen, np.array(dealt), first)


def busiest_steps(atlas: Atlas, most: int = 10) -> list[tuple[int, int, int, int, float]]:
    """Steps from layer to layer that stand out: (layer, expert, next expert, tokens, expected), most excess first."""
    counts = transitions(atlas.ids, atlas.sizes[1])
    expected = independent(counts)
    excess = (counts - expected) / np.sqrt(np.maximum(expected, 1e-9))
    order = np.argsort(-excess, axis=None, kind="stable")[:most]
    places = [tuple(int(x) for x in np.unravel_index(at, counts.shape)) for at in order]
    return [(i, a, b, int(counts[i, a, b]), float(expected[i, a, b])) for i, a, b in places if counts[i, a, b] >= 5]
