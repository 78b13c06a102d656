"""`minimoe demo`: the bundled model at work, with nothing but the package."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from minimoe import golden_tiny, mixtral, texts
from minimoe.arrays import to_host
from minimoe.cli.common import add_backend, add_json, check_writable, load_model, print_json, tokenizer_of
from minimoe.display import capability, legend, text_pieces, tokens_by_expert
from minimoe.model import BUNDLED, Model
from minimoe.shapes import Array

FIGURE = "minimoe_demo.png"
TEMPERATURE, TOP_P = 0.7, 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe demo`."""
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=f"where {FIGURE} goes (default: here)")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="per prompt (default 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (default 0)")
    add_backend(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe demo`; the status is 1 if the logits are not the golden ones."""
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    args.model, path = "tiny", args.out / FIGURE
    check_writable(path)
    model = load_model(args, generates=True)
    if not args.json:
        print(f"{model!r}\n")
    continued = continuations(model, args.max_new_tokens, args.seed)
    if not args.json:
        _print_continuations(model, continued)
    compared = golden_tiny.compare(model.ops, model.config, model.params, BUNDLED / "tiny")
    _draw(model, path)
    if args.json:
        told = {name: {"prompt": texts.prompts()[name], "text": one.text} for name, one in continued.items()}
        golden = {"error": compared.error, "bound": compared.bound, "error_over_bound": compared.ratio,
                  "same_choices": compared.same_choices, "choices": compared.choices}  # fmt: skip
        print_json({"backend": model.ops.name, "continuations": told, "golden": golden, "figure": str(path)})
    else:
        _print_golden(compared)
        print(f"figure: {path}")
    return 0 if compared.ratio <= 1 else 1


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prompt and how it went on: the ids of both, BOS first, of which so many are the prompt's; experts (L, n, k)."""

    text: str
    tokens: list[int]
    prompt_length: int
    ids: Array


def continuations(model: Model, max_new_tokens: int, seed: int) -> dict[str, Continuation]:
    """Continue the prompt of every domain, all in one batch."""
    tokenizer = tokenizer_of(model, "tiny")
    prompts = [tokenizer.encode(prompt) for prompt in texts.prompts().values()]
    tokens, mask = _padded(prompts, left=True)
    new = model.generate_ids(tokens, max_new_tokens, TEMPERATURE, TOP_P, seed, mask=mask)
    added = [list(takewhile(lambda token: token != tokenizer.eos_id, row.tolist())) for row in new]
    rows = [prompt + more for prompt, more in zip(prompts, added, strict=True)]
    shown = (tokenizer.decode(more, continuing=True) for more in added)
    found = zip(shown, rows, map(len, prompts), _experts(model, rows), strict=True)
    return {name: Continuation(*parts) for name, parts in zip(texts.names(), found, strict=True)}


def _padded(rows: list[list[int]], left: bool) -> tuple[Array, Array]:
    """Return tokens and mask (B, T)."""
    T = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        at = slice(T - len(row), T) if left else slice(0, len(row))
        tokens[b, at], mask[b, at] = row, True
    return tokens, mask


def _experts(model: Model, rows: list[list[int]]) -> list[Array]:
    """Return the experts (L, n, k) of every row."""
    tokens, mask = _padded(rows, left=False)
    inputs = mixtral.check_inputs(tokens, model.config.vocab_size, mask)
    _, routed = mixtral.forward(model.ops, model.config, model.params, inputs)
    B, T = tokens.shape
    ids = np.stack([to_host(layer.ids) for layer in routed]).reshape(len(routed), B, T, -1)
    return [ids[:, b, : len(row)] for b, row in enumerate(rows)]


def _draw(model: Model, path: Path) -> None:
    from minimoe.plots.readme import routing_figure  # matplotlib takes half a second: text comes first

    routing_figure(model).savefig(path)


def _print_continuations(model: Model, continued: dict[str, Continuation]) -> None:
    how, layer = capability(sys.stdout), model.config.num_layers // 2
    bar = "‖" if how != "ascii" else "||"
    print(f"Six prompts, continued from {bar} on. Each token shows its first-choice expert in layer {layer}:")
    print(legend(model.config.num_experts, how))
    tokenizer = tokenizer_of(model, "tiny")
    for domain, one in continued.items():
        pieces, first = text_pieces(tokenizer, one.tokens[1:]), one.ids[layer, 1:, 0].tolist()  # without BOS
        cut = one.prompt_length - 1
        halves = (tokens_by_expert(pieces[part], first[part], how) for part in (slice(cut), slice(cut, None)))
        print(f"\n{domain}\n{bar.join(halves)}")


def _print_golden(compared: golden_tiny.Comparison) -> None:
    verdict = "within it" if compared.ratio <= 1 else "BEYOND IT: the arithmetic here is wrong"
    print(
        f"\nlogits against the golden ones in float64: off by {compared.error:.1e} of the largest, bound "
        f"{compared.bound:.1e}: error ÷ bound = {compared.ratio:.2f}, {verdict}"
    )
    print(f"expert choices as in float64: {compared.same_choices:,} of {compared.choices:,}")
