"""The figures of README and the notebooks, made by one command from the repository's root:
`python -m minimoe.plots.readme`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from minimoe import ablation, repetition, texts
from minimoe.arrays import to_host
from minimoe.display import text_pieces
from minimoe.model import BUNDLED, Model, load
from minimoe.params import map_leaves
from minimoe.plots.ablation import switched_off
from minimoe.plots.attention import attention_maps
from minimoe.plots.coactivation import expert_pairs
from minimoe.plots.differences import routing_differences
from minimoe.plots.domains import domain_shares
from minimoe.plots.gate import gate_steps
from minimoe.plots.grid import token_grid
from minimoe.plots.overview import routing_overview
from minimoe.plots.page import Page
from minimoe.plots.paths import token_paths
from minimoe.plots.repeats import repeated_assignments
from minimoe.plots.ring import cache_ring
from minimoe.plots.router import router_distributions
from minimoe.plots.specialisation import token_type_specialisation
from minimoe.plots.tokens import token_colours
from minimoe.plots.training import balance_over_training
from minimoe.reading import Reading, join, read
from minimoe.routing_statistics import shares
from minimoe.shapes import Array
from minimoe.token_types import token_types
from minimoe.tokenizer import Tokenizer

SHOWN = "python"  # the text whose tokens are coloured
LINE = "def mean(values):\n    return sum(values) / len(values)\n"  # what is shown token by token


def routing_figure(model: Model) -> Page:
    """Draw how a model routes the shipped texts, a domain each; the demo saves the same picture."""
    return _overview(model, _readings(model))


def figures(model: Model) -> Iterator[tuple[str, Page]]:
    """Draw one picture of every kind, by name, of a model that reads the shipped texts."""
    readings = _readings(model)
    tokenizer, E = _tokenizer(model), model.config.num_experts
    ids = {name: reading.ids for name, reading in readings.items()}
    every = join(list(readings.values())).ids
    assert every is not None
    yield "routing", _overview(model, readings)
    shown = readings[SHOWN]
    yield "tokens", token_colours(text_pieces(tokenizer, shown.tokens), ids[SHOWN], num_experts=E, max_lines=36)
    yield "domains", domain_shares(_shares(readings, E), list(readings))
    yield "repeats", repeated_assignments(repetition.repeat_table(ids, E, title=f"{model.config.num_layers} layers"))
    yield "pairs", expert_pairs(every, E)
    yield "paths", token_paths(every, E)
    types = [token_types(tokenizer.pieces(reading.tokens.tolist())) for reading in readings.values()]
    yield "token_types", token_type_specialisation(every, np.concatenate(types), E)
    yield from _of_one_line(model)
    yield from _of_routers(model)
    costs = ablation.switch_off(model.ops, model.config, model.params, _encoded(tokenizer))
    yield "switched_off", switched_off(costs)
    yield "cache_ring", cache_ring(np.array([8, 9, 10, 11, 12, 5, 6, 7]), 13, window=8)


def _readings(model: Model) -> dict[str, Reading]:
    tokenizer = _tokenizer(model)
    if model.config.dense:
        raise ValueError("a dense model has no router: there is nothing to draw")
    return {
        name: read(model.ops, model.config, model.params, tokenizer, text, name=name)
        for name, text in texts.load().items()
    }


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: it cannot read the shipped texts")
    return model.tokenizer


def _encoded(tokenizer: Tokenizer) -> dict[str, list[int]]:
    return {name: tokenizer.encode(text) for name, text in texts.load().items()}


def _shares(readings: dict[str, Reading], num_experts: int) -> Array:
    return np.array([shares(reading.ids, num_experts) for reading in readings.values()])


def _overview(model: Model, readings: dict[str, Reading]) -> Page:
    shown = readings[SHOWN]
    assert shown.ids is not None
    pieces = text_pieces(_tokenizer(model), shown.tokens)
    share = _shares(readings, model.config.num_experts)
    return routing_overview(share, list(readings), pieces, shown.ids, text_name=SHOWN)


def _of_one_line(model: Model) -> Iterator[tuple[str, Page]]:
    """What is drawn of single tokens."""
    layer = model.config.num_layers - 1
    slots, probs = f"layers.{layer}.experts.slots", f"layers.{layer // 2}.attention.probs"
    trace = model.trace(LINE, only=[slots, probs])
    pieces = _tokenizer(model).pieces(trace.tokens[0].tolist())
    routing = trace.routing
    assert routing is not None
    yield "grid", token_grid(pieces, routing)
    n = pieces.index("return") if "return" in pieces else len(pieces) - 1
    logits, weights = np.asarray(routing.logits)[layer, n], np.asarray(routing.weights)[layer, n]
    yield "gate", gate_steps(logits, routing.ids[layer, n], weights, trace[slots][n], piece=pieces[n], layer=layer)
    window, heads = model.config.sliding_window, model.config.num_kv_heads
    title = f"Where each head of layer {layer // 2} looks"
    yield "attention", attention_maps(trace[probs][0], pieces, window=window, num_kv_heads=heads, title=title)


def _of_routers(model: Model) -> Iterator[tuple[str, Page]]:
    """What is drawn of logits, of the beginning of every text; and the same in float64 beside it."""
    encoded = _encoded(_tokenizer(model)).values()
    T = min(model.config.max_length, 256, *map(len, encoded))
    tokens = np.array([one[:T] for one in encoded])
    weights = map_leaves(model.params, lambda w: model.ops.asarray(to_host(w).astype(np.float64)))
    exact = Model(model.config, weights, model.ops, model.tokenizer)
    stored, truth = (m.trace(tokens, only="layers.0.gating.ids") for m in (model, exact))
    yield "router", router_distributions(stored.routing)
    yield "differences", routing_differences(truth.routing, stored.routing, names=("float64", stored.stored))


def _log(path: Path) -> dict[str, Array]:
    """Read what a training run wrote down."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in ("step", "loss", "balance", "least_share")}


def small_png(page: Page, limit: int = 150_000) -> bytes:
    """Return a picture as PNG of at most so many bytes: in 256 colours, then coarser, where that is necessary."""
    for dpi in (150, 120, 100, 80):
        drawn = io.BytesIO()
        page.savefig(drawn, format="png", dpi=dpi)
        image = Image.open(drawn).convert("RGB")
        few = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
        for version in (image, few):
            data = io.BytesIO()
            version.save(data, format="png", optimize=True)
            if data.tell() <= limit:
                return data.getvalue()
    return data.getvalue()


def main(folder: str | Path = "figures") -> Path:
    """Write all figures; return the folder."""
    folder, model = Path(folder), load("tiny")
    folder.mkdir(exist_ok=True)
    for name, page in figures(model):
        (folder / f"{name}.png").write_bytes(small_png(page))
    log = BUNDLED / "tiny" / "log.jsonl"
    if log.exists():
        page = balance_over_training({"the bundled model": _log(log)}, even=model.config.num_experts_per_token)
        (folder / "training.png").write_bytes(small_png(page))
    return folder


if __name__ == "__main__":
    print(f"wrote {main(*sys.argv[1:2])}")
