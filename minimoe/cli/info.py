"""`minimoe info`: what a model is and what it costs, from its headers alone; `--verify` reads every tensor."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimoe import checkpoint
from minimoe.backends import DIALECT_FILES, BackendError, make_backend
from minimoe.cli.common import add_json, print_json, table
from minimoe.config import ModelConfig, preset
from minimoe.model import BUNDLED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe info`."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a checkpoint; none: the bundled model")
    parser.add_argument("--preset", metavar="NAME", help="the sizes of a known model, instead of a folder")
    parser.add_argument("--context", type=int, default=1, metavar="TOKENS", help="keys each token sees (default 1)")
    parser.add_argument("--verify", action="store_true", help="read every tensor; exit 1 if any holds NaN or Inf")
    parser.add_argument("--backends", action="store_true", help="show which op has loops of its own in which backend")
    parser.add_argument("--backend", metavar="NAME", help="with --backends: only this one")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe info`."""
    if args.preset is not None and (args.folder is not None or args.verify):
        raise ValueError(f"--preset {args.preset} has no files: give it without FOLDER and --verify")
    if args.context < 1:
        raise ValueError(f"--context must be at least 1, not {args.context}")
    facts: dict[str, Any] = {}
    if args.backends or args.backend is not None:
        facts["backends"] = _backends([args.backend] if args.backend is not None else list(DIALECT_FILES))
    if args.preset is not None:
        facts |= {"preset": args.preset} | _sizes(preset(args.preset), args.context, 2)
    elif args.folder is not None or args.verify or not facts:
        facts |= _folder(Path(BUNDLED / "tiny" if args.folder is None else args.folder), args)
    if args.json:
        print_json(facts)
    else:
        _print(facts)
    return 1 if facts.get("problems") else 0


def _sizes(config: ModelConfig, context: int, kv_itemsize: int) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "parameters": config.num_parameters(),
        "active_parameters": config.num_active_parameters(),
        "kv_cache_bytes_per_token": config.kv_bytes_per_token(kv_itemsize),
        "context": context,
        "flops_per_token": config.flops_per_token(context),
    }


def _folder(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the files of a folder say; every tensor is read only with --verify."""
    config, headers = checkpoint.read_config(folder), checkpoint.headers(folder)
    files = sorted({info.file for info in headers.tensors})
    types = Counter(info.kind for info in headers.tensors)
    name = headers.layout.name_of("layers.0.attention.wk")
    keys = next((info.dtype for info in headers.tensors if info.name == name), None)
    # float16 is widened, and what is packed becomes float32
    kv_itemsize = 2 if str(keys) == "bfloat16" else 8 if str(keys) == "float64" else 4
    base = folder if folder.is_dir() else folder.parent  # of a GGUF file
    facts: dict[str, Any] = {
        "folder": str(folder),
        "layout": headers.layout.name,
        "layout_title": headers.layout.title,
        "files": files,
        "bytes_on_disk": sum((base / file).stat().st_size for file in files),
        "tensors": len(headers.tensors),
        "dtypes": dict(types),
        "tokenizer": (base / checkpoint.TOKENIZER).exists(),
        "stored_parameters": sum(info.size for info in headers.tensors),
    }
    with contextlib.suppress(checkpoint.TensorMismatchError):  # which --verify reports
        facts["copied_bytes"] = checkpoint.copied_bytes(folder)
    if args.verify:
        facts["problems"] = _verify(folder, headers.nbytes)
    return facts | _sizes(config, args.context, kv_itemsize)


def _verify(folder: Path, size: int) -> list[str]:
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:
        return [
            str(problem) for problem in checkpoint.verify(folder, lambda done, _: bar.update(done - bar.n) and None)
        ]


def _backends(names: list[str]) -> dict[str, Any]:
    """The dialect of every cell, or why a backend cannot run here."""
    cells: dict[str, Any] = {}
    for name in names:
        try:
            dialects = make_backend(name).dialects
        except BackendError as error:
            if name not in DIALECT_FILES:
                raise
            cells[name] = {"error": str(error)}
        else:
            cells[name] = {f"{room}.{function}": dialect for (room, function), dialect in dialects.items()}
    return cells


def _print(facts: dict[str, Any]) -> None:
    blocks = [_model_lines(facts)] if "config" in facts else []
    if "problems" in facts:
        sound = f"verified: all {facts['tensors']} tensors are there, of the right shape, without NaN or Inf"
        blocks.append("\n".join(facts["problems"]) or sound)
    if "backends" in facts:
        blocks.append(_backend_lines(facts["backends"]))
    print("\n\n".join(blocks))


def _model_lines(facts: dict[str, Any]) -> str:
    config = ModelConfig(**facts["config"])
    show: Callable[[int], str] = "{:,}".format
    rows = []
    if "folder" in facts:
        kind = "dense (Mistral or Llama)" if config.dense else "Mixtral"
        stored = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in facts["dtypes"].items())
        rows += [
            ("folder", facts["folder"]),
            (
                "layout",
                f"{facts['layout_title']}, {kind}, {len(facts['files'])} weight file" + "s" * (len(facts["files"]) > 1),
            ),
            ("stored as", stored),
            ("on disk", f"{show(facts['bytes_on_disk'])} bytes"),
            ("tokenizer", "tokenizer.model" if facts["tokenizer"] else "none"),
        ]
    else:
        rows.append(("preset", facts["preset"]))
    if facts.get("copied_bytes"):
        rows.append(("copied", f"{show(facts['copied_bytes'])} bytes of memory, for weights not used where they lie"))
    share = 100 * facts["active_parameters"] / facts["parameters"]
    rows += [
        ("sizes", _letters(config)),
        ("parameters", show(facts["parameters"])),
        ("active per token", f"{show(facts['active_parameters'])} ({share:.1f} %)"),
        ("KV cache", f"{show(facts['kv_cache_bytes_per_token'])} bytes per token"),
        ("FLOPs per token", f"{show(facts['flops_per_token'])} at a context of {facts['context']:,}"),
    ]
    if facts.get("stored_parameters", facts["parameters"]) != facts["parameters"]:
        rows.append(
            ("note", f"the files hold {show(facts['stored_parameters'])} numbers: --verify names the difference")
        )
    return "\n".join(f"{name:<16}  {value}" for name, value in rows)


def _letters(config: ModelConfig) -> str:
    experts = "dense" if config.dense else f"E {config.num_experts}  k {config.num_experts_per_token}"
    window = "none" if config.sliding_window is None else str(config.sliding_window)
    return (
        f"L {config.num_layers}  D {config.hidden_size}  H {config.num_heads}  K {config.num_kv_heads}  "
        f"C {config.head_dim}  F {config.intermediate_size}  {experts}  V {config.vocab_size}  W {window}"
    )


def _backend_lines(backends: dict[str, Any]) -> str:
    able = {name: cells for name, cells in backends.items() if "error" not in cells}
    names = list(next(iter(able.values()), {}))
    lines = [table(["op", *able], [[cell, *(able[name][cell] for name in able)] for cell in names])] if able else []
    lines += [f"{name}: {cells['error']}" for name, cells in backends.items() if "error" in cells]
    return "\n".join(lines)
