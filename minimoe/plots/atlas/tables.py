"""What an atlas is as CSV: a row per text, layer and expert, or a row per decision of a router."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from minimoe.plots.atlas.gather import Atlas, Specimen
from minimoe.reading import Reading
from minimoe.routing_statistics import shares
from minimoe.shapes import Routing

SHARES = ("text", "layer", "expert", "tokens", "first_choices", "assignments", "share")
DECISIONS = ("text", "layer", "token", "token_id", "piece", "slot", "expert", "weight", "logit", "margin")


def write_shares(file: IO[str], readings: Sequence[Reading], num_experts: int) -> None:
    """Write one row per text, layer and expert."""
    writer = csv.writer(file)
    writer.writerow(SHARES)
    for reading in readings:
        assert reading.ids is not None
        for (layer, e), value in np.ndenumerate(shares(reading.ids, num_experts)):
            chosen = reading.ids[layer] == e
            counts = [reading.tokens.size, int(chosen[:, 0].sum()), int(chosen.sum())]
            writer.writerow([reading.name, layer, e, *counts, f"{value:.6f}"])


def write_decisions(file: IO[str], atlas: Atlas) -> None:
    """Write one row per text, layer, token and slot: which expert, with which weight, logit and margin.

    Numbers are written so that float32 is read back exactly; the margin of a token that uses all experts is inf.
    """
    writer = csv.writer(file)
    writer.writerow(DECISIONS)
    for text in atlas.texts:
        writer.writerows(_decisions(text))


def _decisions(text: Specimen) -> Iterator[list[object]]:
    """One layer at a time, so that a long text does not take the memory of all its rows."""
    routing, tokens = text.routing, text.reading.tokens.tolist()
    assert routing.weights is not None and routing.logits is not None
    for layer in range(len(routing.ids)):
        at = slice(layer, layer + 1)
        for row in Routing(routing.ids[at], routing.weights[at], routing.logits[at]).table():
            n = int(row["token"])
            numbers = (f"{row[name]:.9g}" for name in ("weight", "logit", "margin"))
            yield [text.reading.name, layer, n, tokens[n], text.pieces[n], row["slot"], row["expert"], *numbers]
