"""What the commands that write checkpoints share: flags, progress, and what they say at the end."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from minimoe import checkpoint
from minimoe.checkpoint.errors import gigabytes
from minimoe.checkpoint.layouts import LAYOUTS
from minimoe.checkpoint.writing import SHARD_BYTES
from minimoe.cli.common import print_json
from minimoe.config import ModelConfig

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add --layout and --shard-size."""
    names = ", ".join(f"{name} ({layout.title})" for name, layout in LAYOUTS.items())
    parser.add_argument("--layout", default="hf", metavar="NAME", help=f"{names}; default: hf")
    parser.add_argument(
        "--shard-size", metavar="SIZE", help=f"of a file, at most, as in 500MB; default: {gigabytes(SHARD_BYTES)}"
    )


def shard_bytes(text: str | None) -> int:
    """Return the bytes that --shard-size asks for.

    >>> shard_bytes("1.5GB"), shard_bytes("800")
    (1500000000, 800)
    """
    if text is None:
        return SHARD_BYTES
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?B)?", text.upper())
    if match is None or (size := int(float(match[1]) * _UNITS[match[2] or "B"])) < 1:
        raise ValueError(f"--shard-size must be a size such as 500MB or 5GB, not {text!r}")
    return size


@contextlib.contextmanager
def writing_bar() -> Iterator[Callable[[int, int], None]]:
    """Show how much is written, where stderr is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def report(folder: Path, config: ModelConfig, as_json: bool) -> None:
    """Say what was written."""
    headers = checkpoint.headers(folder)
    files = sorted({info.file for info in headers.tensors})
    kinds = sorted({info.kind for info in headers.tensors})
    if as_json:
        print_json(
            {
                "folder": str(folder), "layout": headers.layout.name, "files": files, "tensors": len(headers.tensors),
                "bytes": headers.nbytes, "dtypes": kinds, "parameters": config.num_parameters(),
            }
        )  # fmt: skip
        return
    count = f"{len(files)} file" + "s" * (len(files) > 1)
    print(
        f"wrote {folder}: {config.num_parameters():,} parameters in {', '.join(kinds)}, layout {headers.layout.name}, "
        f"{gigabytes(headers.nbytes)} in {count}"
    )
