"""`minimoe init`: a checkpoint with random weights, as large as the disk has room for."""

from __future__ import annotations

import argparse
from pathlib import Path

from minimoe import checkpoint
from minimoe.cli.common import add_json
from minimoe.cli.writing import add_writing, report, shard_bytes, writing_bar
from minimoe.config import PRESETS, ModelConfig, preset
from minimoe.tokenizer_json import tokenizer_of

# What of a preset may be another: flag, field, help.
_SIZES = (
    ("--layers", "num_layers", "layers"),
    ("--hidden-size", "hidden_size", "model width D"),
    ("--intermediate-size", "intermediate_size", "expert hidden width F"),
    ("--heads", "num_heads", "query heads H"),
    ("--kv-heads", "num_kv_heads", "key/value heads K"),
    ("--head-dim", "head_dim", "head width C"),
    ("--experts", "num_experts", "experts E"),
    ("--top-k", "num_experts_per_token", "experts per token k"),
    ("--vocab-size", "vocab_size", "vocabulary V"),
    ("--window", "sliding_window", "attention window W"),
    ("--max-length", "max_length", "longest context in tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe init`."""
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write, replaced as a whole when it is complete")
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"its sizes: {', '.join(PRESETS)}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same weights")
    parser.add_argument("--dtype", default="bfloat16", metavar="NAME", help="float32, float64, bfloat16 (default), …")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model or .json to copy into the folder")
    add_writing(parser)
    sizes = parser.add_argument_group("sizes other than the preset's")
    for flag, field, text in _SIZES:
        sizes.add_argument(flag, dest=field, type=int, metavar="N", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe init`."""
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    given = {field: getattr(args, field) for _, field, _ in _SIZES}
    config = preset(args.preset).replace(**{field: size for field, size in given.items() if size is not None})
    size = shard_bytes(args.shard_size)
    if args.tokenizer is not None:
        _check_tokenizer(args.tokenizer, config)
    with writing_bar() as progress:
        checkpoint.initialise(
            args.folder, config, args.seed, layout=args.layout, dtype=args.dtype, tokenizer_file=args.tokenizer,
            max_shard_bytes=size, progress=progress,
        )  # fmt: skip
    report(Path(args.folder), config, args.json)
    return 0


def _check_tokenizer(file: str, config: ModelConfig) -> None:
    """Refuse a tokenizer with which the checkpoint could not be loaded."""
    tokenizer = tokenizer_of(Path(), config, file)
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{file}: has {tokenizer.vocab_size:,} tokens: add --vocab-size {tokenizer.vocab_size}")
