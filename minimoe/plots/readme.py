"""The figures of README, made by one command from the repository's root: `python -m minimoe.plots.readme`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from minimoe import texts
from minimoe.display import text_pieces
from minimoe.model import Model, load
from minimoe.plots.overview import routing_overview
from minimoe.plots.page import Page
from minimoe.reading import read
from minimoe.routing_statistics import shares

SHOWN = "python"  # the text whose tokens are coloured


def routing_figure(model: Model) -> Page:
    """Draw how a model routes the shipped texts, a domain each; the demo saves the same picture."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: it cannot read the shipped texts")
    readings = {
        name: read(model.ops, model.config, model.params, model.tokenizer, text, name=name)
        for name, text in texts.load().items()
    }
    if model.config.dense:
        raise ValueError("a dense model has no router: there is nothing to draw")
    share = np.array([shares(reading.ids, model.config.num_experts) for reading in readings.values()])
    shown = readings[SHOWN]
    assert shown.ids is not None
    pieces = text_pieces(model.tokenizer, shown.tokens)
    return routing_overview(share, list(readings), pieces, shown.ids, text_name=SHOWN)


def main(folder: str | Path = "figures") -> Path:
    """Write all figures; return the folder."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    routing_figure(load("tiny")).savefig(folder / "routing.png")
    return folder


if __name__ == "__main__":
    print(f"wrote {main(*sys.argv[1:2])}")
