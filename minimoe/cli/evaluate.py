"""`minimoe eval`: how well a model predicts text files, and how evenly it uses its experts on them."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from minimoe.cli.common import (
    add_json,
    add_model,
    add_window,
    load_files,
    load_model,
    print_json,
    read_texts,
    table,
    windows_line,
)
from minimoe.reading import Reading, join
from minimoe.routing_statistics import shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe eval`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="text files in UTF-8")
    add_model(parser)
    add_window(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe eval`."""
    texts = load_files(args.files)
    model = load_model(args)
    readings = read_texts(model, texts, args)
    everything = join(readings)
    balance = _balance(everything, model.config.num_experts)
    if args.json:
        print_json({"texts": [_figures(r) for r in readings], "all": _figures(everything), "balance": balance})
        return 0
    rows = [_row(reading) for reading in [*readings, *([everything] if len(readings) > 1 else [])]]
    print(table(["text", "tokens", "bytes", "nats/token", "perplexity", "bits/byte"], rows))
    if balance:
        print(f"\nshare of assignments in percent (even: {100 / model.config.num_experts:.3g})")
        ends = ([str(i), _end(layer["least"]), _end(layer["most"])] for i, layer in enumerate(balance))
        print(table(["layer", "least", "most"], ends))
    if cut := windows_line(readings):
        print("\n" + cut)
    return 0


def _figures(reading: Reading) -> dict[str, Any]:
    return {
        "name": reading.name,
        "tokens": reading.losses.size,
        "bytes": reading.num_bytes,
        "loss": reading.loss,
        "perplexity": reading.perplexity,
        "bits_per_byte": reading.bits_per_byte,
        "window": reading.window,
        "in_windows": reading.in_windows,
    }


def _row(reading: Reading) -> list[str]:
    sizes = [f"{reading.losses.size:,}", f"{reading.num_bytes:,}"]
    return [reading.name, *sizes, f"{reading.loss:.4f}", f"{reading.perplexity:,.2f}", f"{reading.bits_per_byte:.4f}"]


def _balance(reading: Reading, num_experts: int) -> list[dict[str, Any]]:
    """Least and most used expert of each layer; nothing for a dense model."""
    if reading.ids is None:
        return []
    ends = {"least": np.argmin, "most": np.argmax}
    layers = shares(reading.ids, num_experts)
    return [
        {name: {"expert": int(end(row)), "share": float(row[end(row)])} for name, end in ends.items()} for row in layers
    ]


def _end(end: dict[str, Any]) -> str:
    return f"{100 * end['share']:.1f} (expert {end['expert']})"
