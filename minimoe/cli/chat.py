"""`minimoe chat`: talk with a model, a line at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minimoe.chat import Conversation, Message
from minimoe.cli.common import add_model, load_model, note, tokenizer_of

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe chat`."""
    parser.epilog = f"One line is one message; {_HELP}."
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what stands before the first message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="per answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="mass of the nucleus (default 1: all)")
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling reproducible")


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe chat`: answer each line of standard input."""
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    model = load_model(args, generates=True)
    folder = tokenizer_of(model, args.model).path.parent
    if (doubt := _doubt(folder)) is not None:
        note(f"{args.model}: {doubt}")
    conversation, uniform = model.conversation(), np.random.default_rng(args.seed)
    beginning: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(beginning)
    if sys.stdin.isatty():
        note(_HELP)
    for line in _lines():
        if line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            messages = list(beginning)
            continue
        question: Message = {"role": "user", "content": line}
        answer = _answer(conversation, [*messages, question], args, uniform)
        if answer:
            messages += [question, {"role": "assistant", "content": answer}]
        else:  # the template has no form for an empty one
            note("no answer: the question is forgotten")
    return 0


def _lines() -> Iterator[str]:
    """Yield what the user types, or what a pipe holds; Ctrl-C at the prompt begins a new line."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (editing and history; importing it is all it takes)
    while True:
        try:
            line = input("> " if terminal else "")
            if line or not terminal:
                yield line
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()


def _answer(
    conversation: Conversation, messages: list[Message], args: argparse.Namespace, uniform: np.random.Generator
) -> str:
    """Print the answer as it comes, and return it; Ctrl-C ends it there."""
    said: list[str] = []
    try:
        for piece in conversation.chat(
            messages, args.max_new_tokens, args.temperature, args.top_p, uniform, stream=True
        ):
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return "".join(said)


def _beginning(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(1_000_000)


def _doubt(folder: Path) -> str | None:
    """Why the model may not have learned this template; None where its folder says that it has."""
    files = (folder / "chat_template.jinja", folder / "tokenizer_config.json")
    says = "".join(_beginning(path) for path in files if path.is_file())
    if "[INST]" in says:
        return None
    known = "chat_template" in says or files[0].is_file()
    reason = "has another chat template" if known else "does not say that it was made for chat (no chat template)"
    return f"{reason}, so its answers may make no sense; Mixtral's v1 template is used"
