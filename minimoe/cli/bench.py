"""`minimoe bench`: the machine's limits and what we reach of them, and if asked what transformers does, in one run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minimoe.bench import growth, report
from minimoe.bench.models import BENCHMARKS, DTYPES
from minimoe.bench.plan import Order, check
from minimoe.bench.run import run as measure
from minimoe.bench.workloads import WORKLOADS
from minimoe.cli.common import FIGURE_TYPES, add_json, check_writable, note, print_json, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe bench`."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(BENCHMARKS)}: sizes with random, seeded weights")
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder instead; it is mapped into memory")
    parser.add_argument(
        "--backend", metavar="NAME", help="numpy, numba (default), cuda; several may be given", **several
    )
    parser.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}; several may be given", **several)
    parser.add_argument("--batch", type=int, metavar="B", help="sequences; several may be given", **several)
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of the prompt; several may be given", **several)
    parser.add_argument("--experts", type=int, metavar="E", help="instead of the preset's; several", **several)
    parser.add_argument("--layers", type=int, metavar="L", help="only the preset's first layers")
    parser.add_argument("--what", metavar="TASK", help=f"{', '.join(WORKLOADS)}, ops; several", **several)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns that everything takes (default 5)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of ours, of BLAS and of the peer (default: all cores)"
    )
    parser.add_argument("--peers", metavar="NAME", help="transformers: the same weights and inputs, in turn", **several)
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the results as JSON")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the roofline of every op (.png, .pdf, .svg)")
    parser.add_argument(
        "--growth", type=Path, metavar="PATH",
        help="draw how a decoding step grows with experts, chosen experts, context and batch; sizes of its own",
    )  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe bench`; the status is 1 where an answer was wrong."""
    if args.preset is not None and args.model is not None:
        raise ValueError(f"--preset {args.preset} and --model {args.model} exclude each other")
    if args.growth is not None:
        return _growth(args)
    order = _order(args)
    check(order)
    document = _measured(args, args.figure, lambda: measure(order, _progress()))
    if args.figure is not None:
        _draw(document, args.figure)
    if args.json:
        print_json(document)
    else:
        _print(document)
    return 0 if all(report.right(entry) for entry in document["results"]) else 1


def _growth(args: argparse.Namespace) -> int:
    """Measure the four curves, instead of a model's tasks."""
    own = ("preset", "model", "batch", "context", "experts", "layers", "what", "peers", "figure")
    if given := [name for name in own if getattr(args, name) is not None]:
        raise ValueError(f"--growth has sizes and tasks of its own: leave out --{given[0]}")
    order = Order(
        backends=_once(args.backend) or ("numba",), dtypes=_once(args.dtype) or ("float32",), rounds=args.rounds,
        threads=args.threads, what=("decode",),
    )  # fmt: skip
    check(order)
    if len(order.backends) > 1 or len(order.dtypes or ()) > 1:
        raise ValueError("--growth measures one backend and one dtype")
    document = _measured(args, args.growth, lambda: growth.run(order, _progress()))
    from minimoe.plots import cost_growth

    where = f"{document['machine']['processor']}, {document['threads']} threads, {document['backend']}"
    title = f"What a decoding step costs: {document['dtype']}, {where}"
    cost_growth(document["points"], title=title).savefig(args.growth)
    if args.json:
        print_json(document)
    else:
        _clear_progress()
        print(table(growth.HEAD, growth.rows(document["points"])))
    note(f"wrote {args.growth}")
    return 0


def _measured(args: argparse.Namespace, picture: Path | None, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, once what is to be written can be; say in the document how and when, and keep it if asked."""
    if picture is not None:
        check_writable(picture, FIGURE_TYPES)
    if args.out is not None:
        check_writable(args.out, (".json",))
    begin = datetime.now(UTC)
    document = run() | {"command": _command(args), "date": begin.isoformat(timespec="seconds")}
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def _order(args: argparse.Namespace) -> Order:
    return Order(
        preset=None if args.model is not None else args.preset or "tiny", folder=args.model,
        backends=_once(args.backend) or ("numba",), dtypes=_once(args.dtype), batches=_once(args.batch),
        contexts=_once(args.context), experts=_once(args.experts), what=_once(args.what),
        ops=args.figure is not None, rounds=args.rounds, threads=args.threads, peers=_once(args.peers) or (),
        layers=args.layers,
    )  # fmt: skip


def _once(values: list[Any] | None) -> list[Any] | None:
    """What was given, each once."""
    return None if values is None else list(dict.fromkeys(values))


def _command(args: argparse.Namespace) -> str:
    """The command as it would be typed again; where results are kept is left out."""
    words = ["minimoe", "bench"]
    flags = (
        "preset",
        "model",
        "backend",
        "dtype",
        "batch",
        "context",
        "experts",
        "layers",
        "what",
        "threads",
        "peers",
        "growth",
    )
    for name in flags:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", *map(str, _once(value) or () if isinstance(value, list) else [value])]
    return shlex.join([*words, *(["--rounds", str(args.rounds)] if args.rounds != 5 else [])])


def _progress() -> Callable[[str], None]:
    """Say on a terminal what is going on, each line in the place of the one before."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _draw(document: dict[str, Any], path: Path) -> None:
    from minimoe.plots import roofline

    title = f"The roofline: {document['model']}, {document['machine']['processor']}, {document['threads']} threads"
    roofline(**report.roofline_points(document), title=title).savefig(path)
    note(f"wrote {path}")


def _print(document: dict[str, Any]) -> None:
    machine = document["machine"]
    _clear_progress()
    threads = f"{document['threads']} threads"
    where = f"{machine['gpu']['card']} beside {machine['processor']}" if "gpu" in machine else machine["processor"]
    print(f"{report.sizes(document)} on {where}, {threads}, median of {document['rounds']} rounds\n")
    if document["results"]:
        print(table(report.HEAD, report.rows(document)))
        print()
    if document["ops"]:
        print(table(report.OPS_HEAD, report.op_rows(document)))
        print()
    if document["processes"]:
        print(table(report.PROCESS_HEAD, report.process_rows(document)))
        print()
    print("\n".join(report.lines(document)))
