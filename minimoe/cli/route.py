"""`minimoe route`: which expert gets how much of each text, and whether chance could explain it."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from minimoe.reading import Reading

if TYPE_CHECKING:
    from minimoe.ablation import Ablation
    from minimoe.model import Model
    from minimoe.plots.atlas.gather import Atlas

FORMATS = ("png", "svg", "pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe route`."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="text files, one domain each; none: the shipped texts")
    add_model(parser)
    add_window(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the shuffled baselines (default 0)")
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="write the routing atlas: one page that needs no network"
    )
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write every figure of the atlas into a folder")
    parser.add_argument("--format", choices=FORMATS, help="of --figures (default png)")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the shares alone (.png, .pdf or .svg)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write one row per text, layer and expert")
    parser.add_argument(
        "--tokens-csv", type=Path, metavar="PATH",
        help="write one row per layer, token and slot: expert, weight, logit, margin",
    )  # fmt: skip
    parser.add_argument(
        "--switch-off", action="store_true",
        help="also switch every expert off in turn: L·E + 1 passes over two windows of each text",
    )  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe route`."""
    _check(args)
    given = load_files(args.files) if args.files else texts.load()
    model = load_model(args)
    _check_model(model, args)
    from minimoe.plots.atlas.gather import Watch, assemble
    from minimoe.plots.atlas.numbers import summary

    watch = Watch(model) if args.html or args.figures or args.tokens_csv else None
    start = time.perf_counter()
    readings = read_texts(model if watch is None else watch.model, given, args)
    costs = _costs(model, readings, time.perf_counter() - start) if args.switch_off else None
    result = summary(readings, model.config, args.seed)
    if costs is not None:
        result["switched_off"] = vars(costs)
    name = args.model if args.model == "tiny" else Path(args.model).resolve().name
    atlas = None if watch is None else assemble(model, name, readings, watch, seed=args.seed, costs=costs)
    written = _write(args, readings, atlas, result)
    if args.json:
        print_json(result)
    else:
        _print(result, readings)
        if costs is not None:
            _print_costs(costs)
    for path in written:
        note(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse before the work is done what could not be written after it."""
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    if args.format and not args.figures:
        raise ValueError(f"--format {args.format} says how to write --figures, which was not given")
    kinds: dict[str, Sequence[str]] = {"html": (".html", ".htm"), "figure": FIGURE_TYPES, "csv": (), "tokens_csv": ()}
    taken = {os.path.realpath(file): "a text to read" for file in args.files}
    for name, endings in kinds.items():
        path = getattr(args, name)
        if path is not None:
            check_writable(path, endings)
            place, flag = os.path.realpath(path), "--" + name.replace("_", "-")
            if place in taken:
                raise ValueError(f"{flag} {path}: is {taken[place]}")
            taken[place] = f"the file of {flag}, too"
    if args.figures is not None:
        _check_folder(args.figures)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not a folder")
    if not folder.exists() and not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise ValueError(f"{folder}: cannot be written: permission denied")


def _check_model(model: Model, args: argparse.Namespace) -> None:
    E, k = model.config.num_experts, model.config.num_experts_per_token
    if model.config.dense:
        raise ValueError(f"{args.model}: a dense model has no router: there is nothing to route")
    if args.switch_off and k == E:
        raise ValueError(f"--switch-off: every token uses all {E} experts: none can be switched off")


def _costs(model: Model, readings: Sequence[Reading], seconds: float) -> Ablation:
    """Switch every expert off in turn; say before how long it takes, by the speed at which the texts were read."""
    from tqdm import tqdm

    from minimoe.plots.atlas.gather import measure_costs

    passes = model.config.num_layers * model.config.num_experts + 1
    read = sum(reading.tokens.size for reading in readings)
    sample = sum(min(2 * reading.window, reading.tokens.size + 1) for reading in readings)
    note(f"switching off: {passes:,} passes over {sample:,} tokens, about {seconds * passes * sample / read:,.0f} s")
    with tqdm(total=passes, unit="pass", disable=None, leave=False, file=sys.stderr) as bar:
        return measure_costs(model, readings, bar.update)


def _write(
    args: argparse.Namespace, readings: Sequence[Reading], atlas: Atlas | None, result: dict[str, Any]
) -> list[Path]:
    """Write all that was asked for; nothing is in place before everything is made."""
    from minimoe import plots
    from minimoe.plots.atlas.files import together
    from minimoe.plots.atlas.tables import write_decisions, write_shares

    with together() as outputs:
        if args.csv is not None:
            write_shares(outputs.text(args.csv), readings, result["experts"])
        if args.tokens_csv is not None and atlas is not None:
            write_decisions(outputs.text(args.tokens_csv), atlas)
        if args.figure is not None:
            from minimoe.plots.atlas.plates import rendered

            share, names = np.array([text["shares"] for text in result["texts"]]), [one.name for one in readings]
            page = plots.expert_shares(share, names, title="Share of assignments per expert")
            outputs.write(args.figure, rendered(page, args.figure.suffix.lower()[1:]))
        drawn = [] if atlas is None else _draw(args, atlas)
        if args.figures is not None:
            outputs.folder(args.figures)
        for path, data in drawn:
            outputs.write(path, data)
    single = (args.csv, args.tokens_csv, args.figure)
    return [*(path for path in single if path is not None), *(path for path, _ in drawn)]


def _draw(args: argparse.Namespace, atlas: Atlas) -> list[tuple[Path, bytes | str]]:
    """Make the page and the figures."""
    from tqdm import tqdm

    from minimoe.plots.atlas.page import PARTS, page_of
    from minimoe.plots.atlas.plates import Plates, rendered

    plates, kind, made = Plates(atlas), args.format or "png", list[tuple[Path, bytes | str]]()
    total = (PARTS if args.html else 0) + (len(plates.by_name) + len(atlas.shown) if args.figures else 0)
    with tqdm(total=total, unit="part", disable=None, leave=False, file=sys.stderr) as bar:
        if args.html is not None:
            made.append((args.html, str(page_of(plates, bar.update))))
        if args.figures is not None:
            for name, page in plates.drawn():
                made.append((args.figures / f"{name}.{kind}", rendered(page, kind)))
                bar.update(1)
    return made


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
        told = (shuffled["unit_tokens"], shuffled["shuffles"])
        print("the same with texts dealt out anew to runs of {} tokens, {} times".format(*told))
        columns = zip(information["bits"], shuffled["mean"], shuffled["max"], strict=True)
        rows = [[str(i), *(number(value, 3) for value in row)] for i, row in enumerate(columns)]
        print(table(["layer", "measured", "shuffled mean", "shuffled max"], rows))
    if cut := windows_line(readings):
        print("\n" + cut)


def _print_costs(costs: Ablation) -> None:
    """Print the experts that are missed most."""
    rows = []
    for at in np.argsort(-costs.costs, axis=None, kind="stable")[:10]:
        g, layer, e = (int(x) for x in np.unravel_index(at, costs.costs.shape))
        rise, error, usage = (x[g, layer, e] for x in (costs.costs, costs.errors, costs.usage))
        rows.append([costs.names[g], str(layer), str(e), number(rise, 3), number(error, 3), _percent(usage)])
    print("\nby how much the loss rises without an expert, in nats per token: those that are missed most")
    print(table(["text", "layer", "expert", "rise", "standard error", "serves, percent"], rows))


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
