"""`minimoe golden make`: golden vectors of one's own checkpoint and prompt.

    minimoe golden make --model FOLDER --prompt "def add(a, b):" OUT

What it makes, and how a model larger than memory is taken, is said in `own_kit` and `exact`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimoe import checkpoint
from minimoe.config import ModelConfig
from minimoe.golden import bounds
from minimoe.golden.own_kit import KIT, OwnKitError, Wish, keep, make_kit, stored
from minimoe.golden.profiles import PROFILES
from minimoe.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[1] / "models" / "tiny"
PROMPT = "def add(a, b):\n    return"
MAX_BYTES = 64 << 20
SAMPLES, FEW_SAMPLES = 12, 6  # disturbed runs per profile; few of a model with more than `bounds.SMALL` parameters
_PROFILES, _FEW_PROFILES = ("float32", "bfloat16", "hf_bfloat16", "float16"), ("float32", "hf_bfloat16", "float16")
_STORED = {"bfloat16": "bfloat16", "hf_bfloat16": "bfloat16", "mistral_bfloat16": "bfloat16", "float16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe golden make`."""
    parser.add_argument("out", metavar="OUT", help="the kit's folder: a new one, or an older kit of this kind")
    parser.add_argument(
        "--model", default=str(BUNDLED), metavar="FOLDER", help="a Hugging Face folder; without it, the bundled model"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="for a model with a tokenizer.model")
    prompt.add_argument("--tokens", metavar="1,2,3", help="token ids instead of a text")
    parser.add_argument(
        "--names", action="append", default=[], metavar="PATTERN",
        help="keep only these intermediates, as 'layers.0.*' or logits; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--max-bytes", type=int, default=MAX_BYTES, metavar="N",
        help=f"of the tensors kept (default {MAX_BYTES:,}); the largest kinds are left out first",
    )  # fmt: skip
    parser.add_argument(
        "--profiles",
        metavar="NAMES",
        help="numeric profiles, as float32,hf_bfloat16; default: the usual ones that fit the weights",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N",
        help=f"disturbed runs for the bounds (default {SAMPLES}; {FEW_SAMPLES} of large models)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    """Carry out `minimoe golden make`."""
    from tqdm import tqdm

    folder = Path(args.model).resolve()
    config = checkpoint.read_config(folder)
    tokens, says = _tokens(args, folder, config)
    small = config.num_parameters() <= bounds.SMALL
    samples = args.samples if args.samples is not None else SAMPLES if small else FEW_SAMPLES
    if samples < 3:
        raise OwnKitError(f"--samples must be at least 3, not {samples}")
    wish = Wish(folder, tokens, says, _profiles(args.profiles, stored(folder), small), samples)
    kept = keep(config, len(tokens), args.names, args.max_bytes)
    _check_out(Path(args.out))
    total = 1 + samples * len(wish.profiles)
    with tqdm(total=total, unit="run", disable=None, leave=False, file=sys.stderr) as bar:
        manifest = make_kit(args.out, wish, kept, lambda: bar.update() and None)
    print(json.dumps(_summary(args.out, manifest), indent=1) if args.json else "\n".join(_text(args.out, manifest)))
    return 0


def _tokens(args: argparse.Namespace, folder: Path, config: ModelConfig) -> tuple[list[int], str]:
    """The prompt as token ids, and in words."""
    if args.tokens is not None:
        try:
            tokens = [int(word) for word in args.tokens.replace(",", " ").split()]
        except ValueError:
            raise OwnKitError(f"--tokens must be numbers like 1,2,3, not {args.tokens!r}") from None
        says = f"{len(tokens)} token ids"
    else:
        file = folder / "tokenizer.model"
        if not file.exists():
            raise OwnKitError(f"{folder}: holds no tokenizer.model, so it cannot read a text: give --tokens 1,2,3")
        prompt = PROMPT if args.prompt is None else args.prompt
        tokens = Tokenizer(file).encode(prompt)
        says = f"{prompt!r} ({len(tokens)} tokens)"
    if not tokens or len(tokens) > config.max_length:
        raise OwnKitError(f"the prompt must have 1 to {config.max_length} tokens, not {len(tokens)}")
    if wrong := [token for token in tokens if not 0 <= token < config.vocab_size]:
        raise OwnKitError(f"token {wrong[0]} is not in the vocabulary of {config.vocab_size}")
    return tokens, says


def _profiles(given: str | None, kind: str, small: bool) -> list[str]:
    """The profiles asked for; those of 16 bits compute with the weights as they are, so these must have 16 bits."""
    fitting = [name for name in PROFILES if _STORED.get(name, kind) == kind]
    if given is None:
        return [name for name in fitting if name in (_PROFILES if small else _FEW_PROFILES)]
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in PROFILES:
            raise OwnKitError(f"there is no profile {name!r}; there are {', '.join(PROFILES)}")
        if name not in fitting:
            raise OwnKitError(f"profile {name}: these weights are stored in {kind}, and would be rounded first")
    return names


def _check_out(out: Path) -> None:
    """Refuse to replace anything but an older kit of this kind."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        older = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["kit"] == KIT
    except (OSError, ValueError, LookupError, TypeError):
        older = False
    if not older:
        raise OwnKitError(f"{out}: is there already, and is no kit that this command made: give a new folder")


def _summary(out: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    main = manifest["cases"][0]
    leads = {o["name"]: o["routing"]["margin"] for o in main["outputs"] if "routing" in o}
    closest = min(leads, key=lambda name: leads[name], default="")
    return {
        "kit": str(out), "cases": [case["id"] for case in manifest["cases"]], "profiles": main["profiles"],
        "tensors": len(main["outputs"]), "bytes": sum(p.stat().st_size for p in Path(out).rglob("*") if p.is_file()),
        "left_out": manifest["made"]["left_out"],
        "closest": {"name": closest, "lead": leads[closest]} if leads else None,
    }  # fmt: skip


def _text(out: str, manifest: Mapping[str, Any]) -> list[str]:
    found = _summary(out, manifest)
    lines = [f"{out}: {found['tensors']} tensors, {found['bytes']:,} bytes; profiles {', '.join(found['profiles'])}"]
    if found["left_out"]:
        lines.append(f"left out, being too large (--max-bytes): {found['left_out']}")
    if (closest := found["closest"]) is not None:
        lines.append(f"closest decision of a gate: {closest['name']}, by {closest['lead']:.3g}")
    return [
        *lines,
        "now let yours compute the same tokens, and write the tensors that it has to OUTPUTS/model/own.npz:",
        f"  minimoe golden list {out} --json",
        f"  minimoe golden check {out} OUTPUTS --profile {found['profiles'][-1]}",
    ]
