"""`minimoe generate`: continue a text."""

from __future__ import annotations

import argparse
import sys
import time

from minimoe.cli.common import add_json, add_model, load_model, print_json, tokenizer_of


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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe generate`: print what is new, without the prompt."""
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    prompt = sys.stdin.buffer.read().decode("utf-8") if args.prompt == "-" else args.prompt
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are no text come as lone surrogates
        raise ValueError("PROMPT is not valid UTF-8") from None
    model = load_model(args)
    tokenizer = tokenizer_of(model, args.model)
    start = time.perf_counter()
    pieces = model.generate(
        prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        stream=True,
    )  # fmt: skip
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    continuation = []
    for piece in pieces:
        continuation.append(piece)
        if stream and not args.json:
            print(piece, end="", flush=True)
    text = "".join(continuation)
    if args.json:
        print_json({"prompt": prompt, "text": text, "prompt_tokens": len(tokenizer.encode(prompt)),
                    "seconds": time.perf_counter() - start, "backend": model.ops.name})  # fmt: skip
    else:
        print("" if stream else text)
    return 0
