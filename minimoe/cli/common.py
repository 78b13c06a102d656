"""What several commands share: loading a model, reading text files, tables, JSON, figures."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import threads
from minimoe.model import Model, load
from minimoe.reading import WINDOW, Reading, TextError, count_windows, read
from minimoe.tokenizer import Tokenizer

FIGURE_TYPES = (".png", ".pdf", ".svg")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend."""
    parser.add_argument("--backend", default="auto", metavar="NAME", help="numpy, numba, cuda or auto (default)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU (default: $MINIMOE_NUM_THREADS, or one per core)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model and --backend."""
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="FOLDER",
        help="a checkpoint folder, or hf:owner/name@revision on the Hub; without it, the bundled model",
    )
    parser.add_argument(
        "--dtype", metavar="NAME",
        help="store weights as float32, float64, bfloat16, or int8 (linear maps and experts); default: as in the file",
    )  # fmt: skip
    parser.add_argument(
        "--no-mmap",
        dest="mmap",
        action="store_false",
        help="read all weights into memory first, where others may write to the files; default: used where they lie",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE",
        help="a tokenizer.model or tokenizer.json, or v1 (Mixtral's own, of mistral-common); default: the folder's",
    )  # fmt: skip
    add_backend(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_window(parser: argparse.ArgumentParser) -> None:
    """Add --window."""
    text = f"tokens the model sees at once (default {WINDOW}); longer texts are read in windows overlapping by half"
    parser.add_argument("--window", type=int, metavar="TOKENS", help=text)


def load_model(args: argparse.Namespace, generates: bool = False) -> Model:
    """Load the model of --model on --backend, and say so if nothing has been compiled yet.

    A command that `generates` then has its loops compiled ahead, which takes little more than half as long.
    """
    given = {name: value for name, value in vars(args).items() if name in ("dtype", "mmap", "tokenizer")}
    model = load(args.model, backend=args.backend, **given)
    if args.threads is not None:
        threads.use(args.threads, "--threads")
    if model.ops.name == "numba":
        from minimoe.loops import cache_folder, keep_freed_memory

        keep_freed_memory()
        if next(Path(cache_folder()).rglob("*.nbc"), None) is None:
            note("Numba compiles the loops for this machine, once: this takes some tens of seconds …")
            if generates:
                from minimoe.cli.ahead import compile_ahead

                compile_ahead(model)
    return model


def tokenizer_of(model: Model, folder: str) -> Tokenizer:
    """Return the model's tokenizer, or say that its folder has none."""
    if model.tokenizer is None:
        raise ValueError(
            f"{folder}: there is no tokenizer.model or tokenizer.json in this folder, so it cannot read text"
        )
    return model.tokenizer


def read_texts(model: Model, texts: dict[str, str], args: argparse.Namespace) -> list[Reading]:
    """Let the model read all texts, with a progress bar."""
    from tqdm import tqdm

    tokenizer = tokenizer_of(model, args.model)
    window = min(WINDOW, model.config.max_length) if args.window is None else args.window
    if not 2 <= window <= model.config.max_length:
        raise ValueError(f"--window must be between 2 and the model's {model.config.max_length} tokens, not {window}")
    total = sum(count_windows(len(tokenizer.encode(text)), window) for text in texts.values())
    with tqdm(total=total, unit="window", disable=None if total > 8 else True, leave=False, file=sys.stderr) as bar:
        return [
            read(
                model.ops, model.config, model.params, tokenizer, text, name=name, window=window, progress=bar.update
            )
            for name, text in texts.items()
        ]  # fmt: skip


def load_files(paths: Sequence[str]) -> dict[str, str]:
    """Read text files; each is named by its stem, or by its path where two have the same."""
    stems = [Path(path).stem for path in paths]
    names = [path if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TextError(f"{twice}: given more than once")
    return {name: load_text(path) for name, path in zip(names, paths, strict=True)}


def load_text(path: str | Path) -> str:
    """Read a text file.

    Raises
    ------
    TextError
        If it is empty or not UTF-8 text.
    OSError
        If it cannot be read.
    """
    data = Path(path).read_bytes()
    if not data:
        raise TextError(f"{path}: the file is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})") from None
    if "\0" in text:
        raise TextError(f"{path}: not a text file (a zero byte at offset {data.index(0)})")
    return text


def windows_line(readings: Iterable[Reading]) -> str | None:
    """Say which texts were read in windows; None where none was."""
    cut = [reading for reading in readings if reading.in_windows]
    if not cut:
        return None
    names = ", ".join(reading.name for reading in cut[:8]) + (", …" if len(cut) > 8 else "")
    return f"longer than {cut[0].window} tokens, read in windows that overlap by half: {names}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out columns: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = (
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in shown)


def number(value: float, digits: int = 1) -> str:
    """Return a number with so many digits, or a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def print_json(value: Any) -> None:
    """Print JSON; NaN, which JSON does not have, becomes null."""
    print(json.dumps(_jsonable(value), indent=1, ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: Path, kinds: Sequence[str] = ()) -> None:
    """Raise before the work is done, not after, if a file cannot be written."""
    if kinds and path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: the name must end in {', '.join(kinds)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: cannot be written: permission denied")


def note(text: str) -> None:
    """Say something that is not part of the result."""
    print(text, file=sys.stderr, flush=True)
