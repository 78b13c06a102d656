"""A kit of one's own checkpoint and prompt: what is kept, how it is written, and whether it still belongs to it.

It is like the bundled one, with two cases: `model/own`, every named intermediate of the prompt, and
`model.chunks/own`, routing and logits of the same tokens fed through a key/value cache. The weights stay where they are
(see `exact`); the kit knows their folder and a digest. What is kept is limited by name and by size.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import checkpoint, schedule
from minimoe.config import ModelConfig
from minimoe.golden import bounds, exact, make, outputs, verify
from minimoe.golden.cases.draw import GROK, Spec
from minimoe.golden.profiles import PROFILES
from minimoe.golden.verify.words import similar

KIT = "minimoe golden vectors of a checkpoint"
_ROUTING = ("gating.logits", "gating.ids", "gating.weights")


class OwnKitError(ValueError):
    """What cannot be made, or not be used any more; the message says why."""


@dataclass(frozen=True)
class Kept:
    """Which intermediates are kept, in execution order, and the kinds that the size left out with their bytes."""

    names: list[str]
    left_out: dict[str, int]

    @property
    def left_out_text(self) -> str:
        """What was left out, in words."""
        return ", ".join(f"{kind} ({size:,} bytes)" for kind, size in self.left_out.items())


def keep(config: ModelConfig, T: int, patterns: Sequence[str], max_bytes: int) -> Kept:
    """Choose the intermediates that match a pattern and fit.

    A kind (the scores of all layers) is kept or left out as a whole: first the logits and what each layer hands on,
    then the small ones. The routing is always kept: without it a near tie could not be told from a mistake.

    Raises
    ------
    OwnKitError
        If a pattern matches no name, or not even the smallest kind fits.
    """
    every = schedule.names(config)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise OwnKitError(f"no intermediate is called {pattern!r}{similar(pattern, every)}")
    kinds: dict[str, list[str]] = {}
    for name in every:
        if not patterns or outputs.inside(name) in _ROUTING or any(fnmatchcase(name, p) for p in patterns):
            kinds.setdefault(outputs.inside(name), []).append(name)
    sizes = {kind: sum(_bytes(config, name, T) for name in names) for kind, names in kinds.items()}
    names: set[str] = set()
    left_out, total = {}, 0
    for kind in sorted(kinds, key=lambda kind: (kind not in _ROUTING, kind not in ("logits", "out"), sizes[kind])):
        if total + sizes[kind] > max_bytes and kind not in _ROUTING:
            left_out[kind] = sizes[kind]
        else:
            names, total = names | set(kinds[kind]), total + sizes[kind]
    if all(outputs.inside(name) in _ROUTING for name in names):
        smallest = min(left_out.values())
        raise OwnKitError(f"--max-bytes {max_bytes:,} leaves nothing; the smallest of the tensors take {smallest:,}")
    return Kept([name for name in every if name in names], left_out)


def _bytes(config: ModelConfig, name: str, T: int) -> int:
    """Of a tensor in the kit: its truth in float64, and rounded to float32 beside it."""
    return prod(schedule.shape(config, name, 1, T)) * (8 if name.endswith("gating.ids") else 12)


@dataclass(frozen=True)
class Wish:
    """What is to be made.

    Attributes
    ----------
    folder : the checkpoint
    tokens : the prompt
    says : the prompt in words
    profiles, samples : numeric profiles, and disturbed runs for the bounds of each
    """

    folder: Path
    tokens: list[int]
    says: str
    profiles: list[str]
    samples: int


def make_kit(out: str | Path, wish: Wish, kept: Kept, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Compute the truth and its bounds, write the kit in one step, and return its manifest."""
    config, params = checkpoint.load_params(wish.folder)
    tokens = np.array([wish.tokens], np.int64)
    truth = exact.truth(config, params, tokens, kept.names)
    progress()
    limits = {p: exact.limits(config, params, tokens, truth, p, wish.samples, progress) for p in wish.profiles}
    built = _cases(wish, tokens, truth)
    manifest: dict[str, Any] = {
        "kit": KIT,
        "version": verify.VERSION,
        "made": {
            "by": "minimoe golden make", "numpy": np.__version__, "left_out": kept.left_out_text,
            "bounds": bounds.HOW.replace(f"{bounds.SAMPLES} runs", f"{wish.samples} runs"),
        },
        "profiles": {name: PROFILES[name].says for name in wish.profiles},
        "models": {
            str(wish.folder): {
                "why": "A checkpoint outside of this kit.", "dtype": stored(wish.folder), "config": asdict(config),
                "folder": str(wish.folder), "digest": digest(wish.folder),
            }
        },
        "cases": [make.entry(case, limits) for case in built],
    }  # fmt: skip
    if "logits" not in truth:  # something must be given
        manifest["cases"][0]["outputs"][-1]["required"] = True

    def write(place: Path) -> None:
        for case in built:
            path = place / "cases" / f"{case.spec.id}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_tensors(path, make.tensors(case))
        (place / "manifest.json").write_text(make.lines(manifest), encoding="utf-8")
        for name in ("README.md", "manifest.schema.json"):
            shutil.copyfile(make.FOLDER / name, place / name)

    checkpoint.write_folder_atomically(out, write)
    return manifest


def _cases(wish: Wish, tokens: np.ndarray, truth: dict[str, np.ndarray]) -> list[make.Built]:
    inputs, model, profiles = {"tokens": tokens}, str(wish.folder), tuple(wish.profiles)
    tags = () if make.is_mixtral(checkpoint.read_config(wish.folder)) else (GROK,)
    why = f"{wish.folder} on {wish.says}: what was kept of its intermediates, in execution order."
    built = [make.Built(Spec("model/own", why, inputs, {}, model, tags, profiles), inputs, truth)]
    T = tokens.size
    if "logits" in truth and T > 1:
        single = min(4, T // 2)
        settings = {"chunks": [T - single] + [1] * single, "max_length": T}
        why = f"The same tokens fed through a key/value cache: {T - single} at once, then one by one."
        spec = Spec("model.chunks/own", why, inputs, settings, model, tags, profiles)
        same = {name: x for name, x in truth.items() if name == "logits" or outputs.inside(name) in _ROUTING}
        built.append(make.Built(spec, inputs, same))
    return built


def digest(folder: str | Path) -> str:
    """Return what tells one checkpoint from another without reading all of it.

    A SHA-256 of config.json, and of every weight file's name, size, header, and last 64 KiB.
    """
    found = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors*")):
        found.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 1 << 24
            found.update(file.read(min(length, 1 << 24)))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            found.update(file.read())
    return found.hexdigest()


def check_models(manifest: Mapping[str, Any]) -> None:
    """Refuse a kit whose checkpoint is gone, or is another one by now.

    Raises
    ------
    KitError
    """
    for model in manifest["models"].values():
        if "folder" not in model:
            continue
        folder = Path(model["folder"])
        if not (folder / "config.json").is_file():
            raise verify.KitError(f"{folder}: the checkpoint that this kit was made of is not there any more")
        if digest(folder) != model["digest"]:
            raise verify.KitError(f"{folder}: is not the checkpoint any more that this kit was made of; make it anew")


def stored(folder: Path) -> str:
    """In which type the matrices are stored: the one that most of their bytes are in."""
    sizes = Counter[str]()
    for tensor in checkpoint.headers(folder).tensors:
        if len(tensor.shape) > 1:
            sizes[str(tensor.dtype)] += tensor.nbytes
    return sizes.most_common(1)[0][0]
