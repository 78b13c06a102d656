"""`minimoe route`: which expert gets how much of each text, and whether chance could explain it."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import texts
from minimoe.cli.common import (
    FIGURE_TYPES,
    add_json,
    add_model,
    add_window,
    check_writable,
    load_files,
    load_model,
    note,
    number,
    print_json,
    read_texts,
    table,
    windows_line,
)
from minimoe.config import ModelConfig
from minimoe.reading import Reading, join
from minimoe.routing_statistics import (
    chance_of_repeats,
    domain_information,
    entropy,
    repeats,
    shares,
    shuffled_information,
    shuffled_repeats,
)

UNIT = 64  # tokens that keep together when domains are dealt out anew
SHUFFLES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe route`."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="text files, one domain each; none: the shipped texts")
    add_model(parser)
    add_window(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the shuffled baselines (default 0)")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the shares (.png, .pdf or .svg)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write one row per text, layer and expert")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe route`."""
    if args.figure is not None:
        check_writable(args.figure, FIGURE_TYPES)
    if args.csv is not None:
        check_writable(args.csv)
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    given = load_files(args.files) if args.files else texts.load()
    model = load_model(args)
    if model.config.dense:
        raise ValueError(f"{args.model}: a dense model has no router: there is nothing to route")
    readings = read_texts(model, given, args)
    result = statistics(readings, model.config, args.seed)
    if args.csv is not None:
        _write_csv(args.csv, readings, model.config)
    if args.figure is not None:
        from minimoe import plots

        share = np.array([text["shares"] for text in result["texts"]])
        plots.expert_shares(share, list(given), title="Share of assignments per expert").savefig(args.figure)
    if args.json:
        print_json(result)
    else:
        _print(result, readings)
    for path in (args.csv, args.figure):
        if path is not None:
            note(f"wrote {path}")
    return 0


def statistics(readings: Sequence[Reading], config: ModelConfig, seed: int) -> dict[str, Any]:
    """Everything that is counted, ready for JSON."""
    first, any_choice = chance_of_repeats(config.num_experts, config.num_experts_per_token)
    return {
        "layers": config.num_layers,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_token,
        "even_share": 1 / config.num_experts,
        "chance_of_repeats": {"first": first, "any": any_choice},
        "texts": [_of_one(reading, config.num_experts, seed) for reading in readings],
        "information": _information(readings, seed),
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


def _information(readings: Sequence[Reading], seed: int) -> dict[str, Any] | None:
    """What the first choice tells about the text; None where there is only one."""
    if len(readings) < 2:
        return None
    ids = join(readings).ids
    assert ids is not None
    sizes = [reading.tokens.size for reading in readings]
    domains = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([np.arange(n) // UNIT for n in sizes]) + domains * (max(sizes) // UNIT + 1)
    runs = shuffled_information(ids, domains, units, shuffles=SHUFFLES, seed=seed)
    shuffled = {"mean": runs.mean(axis=0), "max": runs.max(axis=0), "shuffles": SHUFFLES, "unit_tokens": UNIT}
    at_most = entropy(np.array(sizes) / sum(sizes))
    return {"bits": domain_information(ids, domains), "at_most": at_most, "shuffled": shuffled}


def _write_csv(path: Path, readings: Sequence[Reading], config: ModelConfig) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "layer", "expert", "tokens", "first_choices", "assignments", "share"])
        for reading in readings:
            assert reading.ids is not None
            share = shares(reading.ids, config.num_experts)
            for (layer, e), value in np.ndenumerate(share):
                chosen = reading.ids[layer] == e
                counts = [reading.tokens.size, int(chosen[:, 0].sum()), int(chosen.sum())]
                writer.writerow([reading.name, layer, e, *counts, f"{value:.6f}"])


def _print(result: dict[str, Any], readings: Sequence[Reading]) -> None:
    E, chance = result["experts"], result["chance_of_repeats"]
    print(f"0 … {E - 1:<7}  share of assignments per expert in percent; even: {100 / E:.3g}")
    print(f"entropy      of the first choice in bits; even: {math.log2(E):.3g}")
    print(
        f"same first   consecutive tokens with one first choice, in percent; even chance: {_percent(chance['first'])}"
    )
    print(f"in common    consecutive tokens with any expert in common; even chance: {_percent(chance['any'])}")
    print("(in brackets the same for the tokens of this text in shuffled order)")
    for text in result["texts"]:
        print(f"\n{text['name']}: {text['tokens']:,} tokens")
        print(table(["layer", *map(str, range(E)), "entropy", "same first", "in common"], _rows(text)))
    if (information := result["information"]) is not None:
        shuffled = information["shuffled"]
        print(
            f"\nwhat the first choice tells about the text, in bits (at most {information['at_most']:.2f}); beside it,"
        )
        print(f"the same with texts dealt out anew to runs of {UNIT} tokens, {SHUFFLES} times")
        columns = zip(information["bits"], shuffled["mean"], shuffled["max"], strict=True)
        rows = [[str(i), *(number(value, 3) for value in row)] for i, row in enumerate(columns)]
        print(table(["layer", "measured", "shuffled mean", "shuffled max"], rows))
    if cut := windows_line(readings):
        print("\n" + cut)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rows(text: dict[str, Any]) -> list[list[str]]:
    rows = []
    for i, share in enumerate(text["shares"]):
        pairs = [
            f"{number(100 * text['repeats'][kind][i])} ({number(100 * text['repeats_in_shuffled_order'][kind][i])})"
            for kind in ("first", "any")
        ]
        entropy_of_layer = number(text["first_choice_entropy"][i], 2)
        rows.append([str(i), *(number(100 * value) for value in share), entropy_of_layer, *pairs])
    return rows
