"""Build the golden vectors from the cases: `python -m minimoe.golden.make` writes minimoe/golden/vectors anew.

The truth of a case is what the array-code reference computes in float64 from the stored inputs and weights. Inputs and
weights are the same bits wherever this runs (see `cases.draw`); outputs agree to about 1e-15 of each tensor's norm,
since BLAS and exp differ in their last bits between processors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minimoe import checkpoint
from minimoe.backends import make_backend
from minimoe.checkpoint import save_tensors
from minimoe.config import ModelConfig
from minimoe.golden import bounds, outputs, verify
from minimoe.golden.calls import CALLS, GoldenModel, cast, run
from minimoe.golden.cases import MODELS, Spec, specs, weights
from minimoe.golden.cases.draw import GROK
from minimoe.golden.profiles import PROFILES
from minimoe.params import Params, map_leaves
from minimoe.shapes import Array

FOLDER = Path(__file__).parent / "vectors"
BEYOND_MIXTRAL = (
    "activation", "renormalise", "attention_scale", "attention_cap", "embedding_multiplier", "output_multiplier",
    "post_norms",
)  # fmt: skip
Limits = Mapping[str, Mapping[str, tuple[float, float]]]  # {profile: {output: (relative, absolute)}}


@dataclass(frozen=True)
class Built:
    """A case with its stored inputs (floats in float32) and its truth (floats in float64)."""

    spec: Spec
    inputs: dict[str, Array]
    truth: dict[str, Array]


@cache
def stored(name: str) -> Params:
    """Return the weights of a model as they are stored."""
    return weights(name, MODELS[name])


def model(name: str | None, store: Any = np.float64) -> GoldenModel | None:
    """Return a model with its weights in the type `store`; None for cases that have none."""
    if name is None:
        return None
    return GoldenModel(MODELS[name].config, map_leaves(stored(name), lambda w: w.astype(store)))


def build(spec: Spec) -> Built:
    """Compute the truth of a case."""
    inputs = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in spec.inputs.items()}
    wide = cast(spec.call, inputs, np.float64, np.float64)
    found = run(spec.call, make_backend("numpy"), wide, spec.settings, model(spec.model))
    if spec.call in ("block", "model") and "mask" in inputs:
        found = {name: _without_padding(name, x, inputs["mask"]) for name, x in found.items()}
    return Built(spec, inputs, found)


def _without_padding(name: str, x: Array, mask: Array) -> Array:
    """Set to NaN what belongs to padding: an implementation may put anything there, and nothing compares it."""
    if x.dtype != np.float64:
        return x  # ids of padding are -1: it is pinned that it is not routed
    if outputs.inside(name) in ("attention.scores", "attention.probs"):
        return np.where(mask[:, None, :, None], x, np.nan)  # (B, H, T, S)
    rows = mask if x.shape[:2] == mask.shape and name in ("out", "logits") else mask.reshape(-1)
    return np.where(rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim)), x, np.nan)


def write(folder: Path, built: Iterable[Built], about: Mapping[str, Any]) -> None:
    """Write cases, models and the manifest `about` them; what else lies in the folder (schema, README) stays."""
    for part in ("cases", "models"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for case in built:
        path = folder / "cases" / f"{case.spec.id}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors(case))
    (folder / "models").mkdir()
    for name, spec in MODELS.items():
        checkpoint.save(folder / "models" / name, spec.config, stored(name))
    (folder / "manifest.json").write_text(lines(about), encoding="utf-8")


def tensors(case: Built) -> dict[str, Array]:
    """Return what the case's file holds."""
    held = {f"inputs/{name}": x for name, x in case.inputs.items()}
    for name, x in case.truth.items():
        held[f"truth/{name}"] = x
        if x.dtype == np.float64:
            held[f"truth32/{name}"] = x.astype(np.float32)
    return held


def described(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a config; what Grok-1 has and Mixtral has not only where it is there."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: value for name, (value, default) in values.items() if name not in BEYOND_MIXTRAL or value != default}


def is_mixtral(config: ModelConfig) -> bool:
    """Whether a config does nothing otherwise than Mixtral (or Mistral), as Grok-1 does."""
    return not set(BEYOND_MIXTRAL) & set(described(config))


def manifest(built: Iterable[Built], old: Mapping[str, Limits]) -> dict[str, Any]:
    """Return the manifest: everything about the kit that is no tensor. `old` holds bounds that need not be made."""
    return {
        "kit": "minimoe golden vectors",
        "version": verify.VERSION,
        "made": {"by": "python -m minimoe.golden.make", "numpy": np.__version__, "bounds": bounds.HOW},
        "profiles": {name: profile.says for name, profile in PROFILES.items()},
        "models": {
            name: {"why": spec.why, "dtype": np.dtype(spec.dtype).name, "config": described(spec.config)}
            for name, spec in MODELS.items()
        },
        "cases": [entry(case, old.get(case.spec.id)) for case in built],
    }


def entry(case: Built, limits: Limits | None) -> dict[str, Any]:
    """Return what the manifest says of a case; bounds are made where `limits` lacks some."""
    spec, call = case.spec, CALLS[case.spec.call]
    tags = ["training" if call.gradient else "inference", *spec.tags]
    given = {tensor.name: tensor for tensor in call.inputs}
    floats = {name for name in case.truth if outputs.describe(spec.call, name).kind == "float"}
    if limits is None or not all(floats <= set(limits.get(profile, ())) for profile in spec.profiles):
        limits = {profile: _bounds(case, profile) for profile in spec.profiles}
    return {
        "id": spec.id, "call": spec.call, "level": call.level, "why": spec.why, "model": spec.model,
        "settings": dict(spec.settings), "tags": tags, "profiles": list(spec.profiles),
        "inputs": [
            {"name": name, "letters": given[name].letters, "shape": list(x.shape), "kind": given[name].kind}
            for name, x in case.inputs.items()
        ],
        "outputs": [_output(case, name, limits) for name in case.truth],
    }  # fmt: skip


def _output(case: Built, name: str, limits: Limits) -> dict[str, Any]:
    described, x = outputs.describe(case.spec.call, name), case.truth[name]
    entry: dict[str, Any] = {
        "name": name, "letters": described.letters, "shape": list(x.shape), "kind": described.kind,
        "required": not described.optional,
    }  # fmt: skip
    if described.kind == "float":
        entry["bounds"] = {
            profile: [float(f"{number:.3g}") for number in found[name]] for profile, found in limits.items()
        }
    link = outputs.routing(name)
    if link is not None and link["logits"] in case.truth:
        forced = "ids" in case.inputs
        margin = outputs.smallest_lead(case.truth[link["logits"]], x)
        entry["routing"] = {**link, "forced": forced, "margin": None if forced else margin}
        if GROK in case.spec.tags:
            entry["routing"]["renormalised"] = False
    return entry


def _bounds(case: Built, profile: str) -> dict[str, tuple[float, float]]:
    spec = case.spec
    return bounds.make(spec.call, case.inputs, spec.settings, model(spec.model), case.truth, profile)


def known_bounds(folder: Path) -> dict[str, Limits]:
    """Return the bounds that a manifest holds, by case."""
    found: dict[str, Limits] = {}
    for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["cases"]:
        found[entry["id"]] = {
            profile: {o["name"]: tuple(o["bounds"][profile]) for o in entry["outputs"] if "bounds" in o}
            for profile in entry["profiles"]
        }
    return found


def lines(manifest: Mapping[str, Any]) -> str:
    """Return JSON that is short, and readable in a diff."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    return _fold(text) + "\n"


def _fold(text: str) -> str:
    """Join lines of JSON, indented by one, so that every input and output has one line of its own."""
    folded: list[str] = []
    for line in text.split("\n"):
        rest = line.lstrip(" ")
        depth = len(line) - len(rest)
        if depth > 4 or (depth == 4 and rest[0] != "{") or (depth == 3 and rest[0] in "}]"):
            folded[-1] += ("" if folded[-1][-1] in "{[" or rest[0] in "}]" else " ") + rest
        else:
            folded.append(line)
    return "\n".join(folded)


def main(arguments: Sequence[str]) -> None:
    """Rebuild the vectors, and say how many cases, bytes and seconds there are per call."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--keep-bounds", action="store_true", help="of known cases; to make them takes minutes")
    old = known_bounds(FOLDER) if parser.parse_args(arguments).keep_bounds else {}
    start = time.perf_counter()
    built = [build(spec) for spec in specs()]
    write(FOLDER, built, manifest(tqdm(built, "bounds", unit="case"), old))
    counts, size = Counter(case.spec.call for case in built), Counter[str]()
    for case in built:
        size[case.spec.call] += (FOLDER / "cases" / f"{case.spec.id}.safetensors").stat().st_size
    for call, count in counts.items():
        print(f"{call:24} {count:4} cases {size[call]:10,} bytes")
    whole = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    seconds = time.perf_counter() - start
    print(f"{'all':24} {len(built):4} cases {whole:10,} bytes with models and manifest, {seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
