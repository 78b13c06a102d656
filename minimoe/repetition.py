"""How often consecutive tokens get the same expert, with intervals, as a table: table 5 of arXiv 2401.04088.

Intervals are percentiles of a bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): units of
64 consecutive tokens of one document are drawn anew with replacement, since neighbouring pairs are not independent; a
pair belongs to the unit of its first token.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minimoe import published
from minimoe.routing_statistics import chance_of_repeats, consecutive_pairs, repeats, routed_ids, shuffled_repeats
from minimoe.shapes import Array

KINDS = ("first", "any")
_HEADS = {"first": "first choice", "any": "any choice in common"}


@dataclass(frozen=True, eq=False)
class Repetition:
    """Of one domain and kind of repetition, per layer, as shares: what was seen, its interval, and in shuffled order.

    Attributes
    ----------
    rate, low, high : (L,) NaN where there is no pair; low and high NaN, too, where there are fewer than two units
    shuffled : (L,) the mean over shuffles of the tokens of each document, or None where that is not known
    """

    rate: Float[Array, " L"]
    low: Float[Array, " L"]
    high: Float[Array, " L"]
    shuffled: Float[Array, " L"] | None


@dataclass(frozen=True, eq=False)
class RepeatTable:
    """Table 5 of the paper, for any routing; a notebook shows it as HTML, `print` as text.

    Attributes
    ----------
    title, source : what was measured, and where the figures come from
    intervals : what the intervals are; "" where there are none
    layers : number of each layer in the rows
    rows : {domain: {"first": Repetition, "any": Repetition}}
    chance : {"first": share, "any": share} for routers that choose evenly and independently
    """

    title: str
    source: str
    layers: tuple[int, ...]
    rows: dict[str, dict[str, Repetition]]
    chance: dict[str, float]
    intervals: str = ""

    def of(self, layers: Sequence[int]) -> RepeatTable:
        """Return the table with some of the layers only."""
        if not layers or not set(layers) <= set(self.layers):
            raise ValueError(f"layers must name some of {list(self.layers)}, not {list(layers)}")
        at = [self.layers.index(layer) for layer in layers]

        def cut(x: Repetition) -> Repetition:
            return Repetition(x.rate[at], x.low[at], x.high[at], None if x.shuffled is None else x.shuffled[at])

        rows = {name: {kind: cut(one) for kind, one in row.items()} for name, row in self.rows.items()}
        return RepeatTable(self.title, self.source, tuple(layers), rows, self.chance, self.intervals)

    def to_csv(self) -> str:
        """One line per domain, kind and layer; shares in percent, empty where not known."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["source", "domain", "kind", "layer", "percent", "low", "high", "shuffled", "chance"])
        for name, kind, i, one in self._cells():
            shuffled = np.nan if one.shuffled is None else one.shuffled[i]
            values = [one.rate[i], one.low[i], one.high[i], shuffled, self.chance[kind]]
            writer.writerow([self.title, name, kind, self.layers[i], *(_percent(value, 2) for value in values)])
        return file.getvalue()

    def _cells(self) -> Iterator[tuple[str, str, int, Repetition]]:
        for name, row in self.rows.items():
            for kind in KINDS:
                for i in range(len(self.layers)):
                    yield name, kind, i, row[kind]

    def __str__(self) -> str:
        head = ["", *(f"{_short(kind)} {layer}" for kind in KINDS for layer in self.layers)]
        body = [[name, *(_cell(row[kind], i) for kind in KINDS for i in range(len(self.layers)))]
                for name, row in self.rows.items()]  # fmt: skip
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [head, *body]]
        return "\n".join([self.title, *lines, self._foot()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        span = len(self.layers)
        heads = "".join(f'<th colspan="{span}">{_HEADS[kind]}</th>' for kind in KINDS)
        numbers = "".join(f"<th>layer {layer}</th>" for _ in KINDS for layer in self.layers)
        body = "".join(
            f'<tr><th align="left">{html.escape(name)}</th>'
            + "".join(f'<td align="right">{_cell(row[kind], i)}</td>' for kind in KINDS for i in range(span))
            + "</tr>"
            for name, row in self.rows.items()
        )
        return (
            f"<table><caption>{html.escape(self.title)}: consecutive tokens with the same expert, percent</caption>"
            f"<thead><tr><th></th>{heads}</tr><tr><th></th>{numbers}</tr></thead><tbody>{body}</tbody></table>"
            f"<p><small>{html.escape(self._foot())}</small></p>"
        )

    def _foot(self) -> str:
        chance = ", ".join(f"{_HEADS[kind]} {_percent(self.chance[kind], 1)}" for kind in KINDS)
        brackets = f" In brackets: {self.intervals}." if self.intervals else ""
        return f"Even chance: {chance}.{brackets}" + (f" {self.source}." if self.source else "")


def repeat_table(
    routings: Mapping[str, Int[Array, "L N k"]],
    num_experts: int,
    *,
    documents: Mapping[str, Int[Array, " N"]] | None = None,
    title: str = "measured",
    unit: int = 64,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RepeatTable:
    """Count how often consecutive tokens get the same expert, in every domain and layer.

    Parameters
    ----------
    routings : domain -> ids (L, N, k) of its tokens in reading order
    num_experts : E
    documents : domain -> (N,) the document of each token: pairs across two do not count; None is one document each
    title : says whose figures these are
    unit : tokens of a document that keep together in the bootstrap
    resamples, level, seed : of the bootstrap

    Raises
    ------
    ValueError
        If there is nothing to count: a dense model, no domain, no routed token.
    """
    if not routings:
        raise ValueError("no domain was given: there is nothing to count")
    rows, shapes = {}, set()
    for name, given in routings.items():
        ids = routed_ids(given)
        shapes.add((len(ids), ids.shape[2]))
        rows[name] = _count(ids, None if documents is None else documents[name], unit, resamples, level, seed)
    if len(shapes) > 1:
        raise ValueError(f"the domains must be routed by one model: (L, k) are {sorted(shapes)}")
    [(L, k)] = shapes
    chance = dict(zip(KINDS, chance_of_repeats(num_experts, k), strict=True))
    told = f"{100 * level:.0f}% of {resamples} bootstraps over units of {unit} tokens"
    return RepeatTable(title, "", tuple(range(L)), rows, chance, told)


def mixtral_repeats() -> RepeatTable:
    """Return what the paper reports for Mixtral 8x7B; it gives no intervals."""
    unknown = np.full(len(published.MIXTRAL_LAYERS), np.nan)
    rows = {
        name: {kind: Repetition(np.array(one) / 100, unknown, unknown, None)
               for kind, one in zip(KINDS, both, strict=True)}
        for name, both in published.MIXTRAL_REPEATS.items()
    }  # fmt: skip
    chance = dict(zip(KINDS, chance_of_repeats(8, 2), strict=True))
    return RepeatTable(published.MIXTRAL, published.MIXTRAL_SOURCE, published.MIXTRAL_LAYERS, rows, chance)


def _count(
    ids: Int[Array, "L N k"], documents: Int[Array, " N"] | None, unit: int, resamples: int, level: float, seed: int
) -> dict[str, Repetition]:
    documents = np.zeros(ids.shape[1], np.int64) if documents is None else np.asarray(documents)
    pairs, *same = consecutive_pairs(ids, documents)
    units = _units(documents, unit)[:-1]
    U = int(units.max(initial=0)) + 1
    drawn = np.random.default_rng(seed).multinomial(U, np.full(U, 1 / U), size=resamples)
    found = {}
    for kind, yes, rate, shuffled in zip(
        KINDS, same, repeats(ids, documents), shuffled_repeats(ids, documents, seed=seed), strict=True
    ):
        low, high = _interval(_per_unit(yes, units), _per_unit(pairs, units), drawn, level)
        found[kind] = Repetition(rate, low, high, shuffled.mean(axis=0))
    return found


def _units(documents: Int[Array, " N"], unit: int) -> Int[Array, " N"]:
    """Number runs of at most `unit` tokens of one document, across all documents."""
    starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
    inside = np.arange(documents.size) - np.repeat(starts, np.diff(np.r_[starts, documents.size]))
    numbers: Array = np.cumsum(inside % unit == 0) - 1
    return numbers


def _per_unit(flags: Array, units: Int[Array, " n"]) -> Float[Array, "L U"]:
    return np.array([np.bincount(units, weights=layer, minlength=units.max(initial=0) + 1) for layer in flags])


def _interval(
    same: Float[Array, "L U"], pairs: Float[Array, "L U"], drawn: Int[Array, "R U"], level: float
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    counts = drawn @ pairs.T  # (R, U) -> (R, L)
    rates = np.divide(drawn @ same.T, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    known = ((pairs > 0).sum(axis=1) >= 2) & np.isfinite(rates).any(axis=0)
    low, high = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not known.any():
        return low, high
    low[known], high[known] = np.nanquantile(rates[:, known], tails, axis=0)
    return low, high


def _cell(one: Repetition, i: int) -> str:
    interval = "" if np.isnan(one.low[i]) else f" [{_percent(one.low[i], 1)}, {_percent(one.high[i], 1)}]"
    return (_percent(one.rate[i], 1) or "–") + interval


def _percent(share: float, digits: int) -> str:
    return "" if np.isnan(share) else f"{100 * share:.{digits}f}"


def _short(kind: str) -> str:
    return {"first": "1st", "any": "any"}[kind]
