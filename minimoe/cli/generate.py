"""`minimoe generate`: continue a text."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from minimoe.cli import traffic
from minimoe.cli.common import (
    FIGURE_TYPES,
    add_json,
    add_model,
    check_writable,
    load_model,
    note,
    print_json,
    tokenizer_of,
)
from minimoe.expert_traffic import Watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe generate`."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="mass of the nucleus (default 1: all)")
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling reproducible")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (default: in a terminal)"
    )
    parser.add_argument(
        "--stats", action="store_true",
        help="also say which experts' weights were read, what a cache of experts would save, and the memory used",
    )  # fmt: skip
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw what a cache would save (.png, .pdf or .svg)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe generate`: print what is new, without the prompt."""
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    if args.figure is not None:
        check_writable(args.figure, FIGURE_TYPES)
    prompt = sys.stdin.buffer.read().decode("utf-8") if args.prompt == "-" else args.prompt
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are no text come as lone surrogates
        raise ValueError("PROMPT is not valid UTF-8") from None
    model = load_model(args, generates=True)
    tokenizer = tokenizer_of(model, args.model)
    watch = Watch(model) if args.stats or args.figure is not None else None
    start = time.perf_counter()
    pieces = (model if watch is None else watch.model).generate(
        prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        stream=True,
    )  # fmt: skip
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    continuation = []
    peak = traffic.MemoryPeak()
    with peak if args.stats else nullcontext():
        for piece in pieces:
            continuation.append(piece)
            if stream and not args.json:
                print(piece, end="", flush=True)
    text = "".join(continuation)
    result = {"prompt": prompt, "text": text, "prompt_tokens": len(tokenizer.encode(prompt)),
              "seconds": time.perf_counter() - start, "backend": model.ops.name}  # fmt: skip
    stats = traffic.facts(watch.traffic, model, peak) if watch is not None and args.stats else None
    if args.json:
        print_json(result | ({} if stats is None else {"stats": stats}))
    else:
        print("" if stream else text)
        if stats is not None:
            print("\n" + traffic.shown(stats))
    if watch is not None and args.figure is not None:
        _draw(watch, args.figure)
    return 0


def _draw(watch: Watch, path: Path) -> None:
    from minimoe import plots

    plots.expert_cache(watch.traffic).savefig(path)
    note(f"wrote {path}")
