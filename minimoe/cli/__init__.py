"""The command line: `minimoe COMMAND …`, or `python -m minimoe COMMAND …`.

One file per command, imported only when it is asked for. Whatever a user can get wrong ends as one line on stderr,
`minimoe: error: …`, and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

COMMANDS = {
    "demo": ("minimoe.cli.demo", "continue prompts with the bundled model, show their routing, check its logits"),
    "generate": ("minimoe.cli.generate", "continue a text"),
    "chat": ("minimoe.cli.chat", "talk with a model made for it (Mixtral-Instruct)"),
    "route": ("minimoe.cli.route", "which expert gets how much of each text, layer by layer"),
    "eval": ("minimoe.cli.evaluate", "loss, perplexity and expert balance on text files"),
    "info": ("minimoe.cli.info", "sizes, memory and FLOPs of a model, from its headers; --verify reads all of it"),
    "convert": ("minimoe.cli.convert", "write a checkpoint in another layout or number format"),
    "init": ("minimoe.cli.init", "write a checkpoint with random weights, of any size"),
    "golden": ("minimoe.cli.golden", "hold another implementation against golden vectors, and name its mistake"),
    "train": ("minimoe.training.command", "train a model in our own code"),
    "bench": ("minimoe.cli.bench", "what the machine can do, and what part of it we use"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where help is."""
        fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of one command: the others are not imported."""
    top = Parser(prog="minimoe", description="A sparse mixture-of-experts language model with every step visible.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            loaded = importlib.import_module(module)
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end a command
    try:
        return _dispatch(given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has enough; stdout is closed again at exit, and must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, ArithmeticError, MemoryError) as error:
        return fail(str(error) or "not enough memory")


def _dispatch(given: Sequence[str]) -> int:
    command = next((word for word in given if not word.startswith("-")), None)
    top = parser(command)
    args = top.parse_args(given)
    if args.version:
        from minimoe import __version__

        print(f"minimoe {__version__}")
        return 0
    if args.command is None:
        top.print_help()
        return 0
    status: int = args.run(args)
    sys.stdout.flush()  # a broken pipe shows here at the latest
    return status


def fail(message: str) -> int:
    """Print one line on stderr; return the exit status of a user's mistake."""
    print(f"minimoe: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
