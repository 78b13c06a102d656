"""`minimoe convert`: a checkpoint in another layout or number format, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from minimoe import checkpoint
from minimoe.cli.common import add_json
from minimoe.cli.writing import add_writing, report, shard_bytes, writing_bar
from minimoe.model import folder_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe convert`."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint in any layout, tiny, or hf:owner/name@revision")
    parser.add_argument("folder", metavar="DST", help="the folder to write, replaced as a whole when it is complete")
    add_writing(parser)
    parser.add_argument("--dtype", metavar="NAME", help="float32, float64, bfloat16 or float16; default: as they are")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe convert`."""
    size = shard_bytes(args.shard_size)
    source = folder_of(args.source)
    with writing_bar() as progress:
        config = checkpoint.convert(
            source, args.folder, layout=args.layout, dtype=args.dtype, max_shard_bytes=size, progress=progress
        )
    report(Path(args.folder), config, args.json)
    return 0
