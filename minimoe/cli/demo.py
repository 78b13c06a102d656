"""`minimoe demo`: the bundled model at work, with nothing but the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from minimoe import golden_tiny, mixtral, texts
from minimoe.arrays import to_host
from minimoe.cli.common import add_backend, add_json, check_writable, load_model, print_json, tokenizer_of
from minimoe.display import capability, legend, text_pieces, tokens_by_expert
from minimoe.model import BUNDLED, Model
from minimoe.reading import Reading, read
from minimoe.routing_statistics import shares
from minimoe.shapes import Array

FIGURE = "minimoe_demo.png"
TEMPERATURE, TOP_P = 0.7, 0.9
SHOWN = "python"  # the text of the figure's lower half


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
    model = load_model(args)
    if not args.json:
        print(f"{model!r}\n")
    continued = continuations(model, args.max_new_tokens, args.seed)
    if not args.json:
        _print_continuations(model, continued)
    compared = golden_tiny.compare(model.ops, model.config, model.params, BUNDLED / "tiny")
    draw(model, read_domains(model), path)
    if args.json:
        told = {domain: {"prompt": texts.prompts()[domain], "text": text} for domain, (text, *_) in continued.items()}
        golden = {"error": compared.error, "bound": compared.bound, "error_over_bound": compared.ratio,
                  "same_choices": compared.same_choices, "choices": compared.choices}  # fmt: skip
        print_json({"backend": model.ops.name, "continuations": told, "golden": golden, "figure": str(path)})
    else:
        _print_golden(compared)
        print(f"figure: {path}")
    return 0 if compared.ratio <= 1 else 1


def continuations(model: Model, max_new_tokens: int, seed: int) -> dict[str, tuple[str, list[int], int, Array]]:
    """Continue the prompt of every domain, all in one batch.

    Returns
    -------
    {domain: (new text, ids of prompt and new text, how many are the prompt's, experts (L, n, k) of all of them)}
    """
    tokenizer = tokenizer_of(model, "tiny")
    prompts = [tokenizer.encode(prompt) for prompt in texts.prompts().values()]
    tokens, mask = _padded(prompts, left=True)
    new = model.generate_ids(tokens, max_new_tokens, TEMPERATURE, TOP_P, seed, mask=mask)
    eos = tokenizer.eos_id
    rows = [
        [*prompt, *row[: row.tolist().index(eos) if eos in row else None].tolist()]
        for prompt, row in zip(prompts, new, strict=True)
    ]
    ids = _experts(model, rows)
    return {
        domain: (tokenizer.decode(row[len(prompt) :], continuing=True), row, len(prompt), ids[i])
        for i, (domain, prompt, row) in enumerate(zip(texts.names(), prompts, rows, strict=True))
    }


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


def read_domains(model: Model) -> list[Reading]:
    """Let the model read the shipped text of every domain."""
    tokenizer = tokenizer_of(model, "tiny")
    return [
        read(model.ops, model.config, model.params, tokenizer, text, name=name) for name, text in texts.load().items()
    ]


def draw(model: Model, readings: list[Reading], path: Path) -> None:
    """Save the routing figure."""
    from minimoe import plots  # takes half a second

    share = np.array([shares(r.ids, model.config.num_experts) for r in readings])
    shown = next(reading for reading in readings if reading.name == SHOWN)
    assert shown.ids is not None
    pieces = text_pieces(tokenizer_of(model, "tiny"), shown.tokens)
    names = [reading.name for reading in readings]
    plots.routing_overview(share, names, pieces, shown.ids, text_name=SHOWN).savefig(path)


def _print_continuations(model: Model, continued: dict[str, tuple[str, list[int], int, Array]]) -> None:
    how, layer = capability(sys.stdout), model.config.num_layers // 2
    bar = "‖" if how != "ascii" else "||"
    print(f"Six prompts, continued from {bar} on. Each token shows its first-choice expert in layer {layer}:")
    print(legend(model.config.num_experts, how))
    tokenizer = tokenizer_of(model, "tiny")
    for domain, (_, tokens, prompt, ids) in continued.items():
        pieces, first = text_pieces(tokenizer, tokens[1:]), ids[layer, 1:, 0].tolist()  # without BOS
        before = tokens_by_expert(pieces[: prompt - 1], first[: prompt - 1], how)
        after = tokens_by_expert(pieces[prompt - 1 :], first[prompt - 1 :], how)
        print(f"\n{domain}\n{before}{bar}{after}")


def _print_golden(compared: golden_tiny.Comparison) -> None:
    verdict = "within it" if compared.ratio <= 1 else "BEYOND IT: the arithmetic here is wrong"
    print(
        f"\nlogits against the golden ones in float64: off by {compared.error:.1e} of the largest, bound "
        f"{compared.bound:.1e}: error ÷ bound = {compared.ratio:.2f}, {verdict}"
    )
    print(f"expert choices as in float64: {compared.same_choices:,} of {compared.choices:,}")
