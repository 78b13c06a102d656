"""A kit on disk: its manifest, its cases, their tensors."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1  # of the kit's format and semantics
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class KitError(ValueError):
    """A kit or an output file that cannot be read; the message names it."""


@dataclass(frozen=True)
class Output:
    """What the manifest says of one output of a case.

    Attributes
    ----------
    name, letters, shape : its name and shape
    kind : "float", or "exact" (must be equal)
    required : whether a candidate must give it; the others help to find a mistake
    bounds : {profile: [relative, absolute]}: |error| <= relative · max |truth| + absolute, per tensor
    renormalised : of chosen experts: whether their weights are a softmax over them, or shares of all experts
    """

    name: str
    letters: str
    shape: tuple[int, ...]
    kind: str
    required: bool
    bounds: dict[str, list[float]] = field(default_factory=dict)
    renormalised: bool = True


@dataclass(frozen=True)
class Case:
    """One case of a kit; arrays are read when they are asked for.

    Attributes
    ----------
    id, call, level : "gating/ties"; which computation; "op", "block", "model" or "training"
    why : what the case is for
    settings : JSON values that the call takes
    model : name of the folder under models/, or None
    tags : "inference" or "training", and whatever selects cases
    outputs : in execution order
    """

    kit: Path
    id: str
    call: str
    level: str
    why: str
    settings: dict[str, Any]
    model: str | None
    tags: tuple[str, ...]
    profiles: tuple[str, ...]
    outputs: tuple[Output, ...]

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return read_tensors(self.kit / "cases" / f"{self.id}.safetensors")

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs by name: floats in float32, ids and positions int64, masks bool."""
        return self._under("inputs/")

    @property
    def truth(self) -> dict[str, np.ndarray]:
        """The outputs by name, in float64 (exact ones in their own type)."""
        return self._under("truth/")

    @property
    def model_folder(self) -> Path | None:
        """The Hugging Face checkpoint that the case computes with."""
        return None if self.model is None else self.kit / "models" / self.model

    @property
    def golden_ids(self) -> np.ndarray | None:
        """The golden routing in the shape in which it can be imposed; None where the truth has none."""
        layers = [self.truth[output.name] for output in self.outputs if is_routing(self, output.name)]
        return None if not layers else np.stack(layers) if self.level == "model" else layers[0]

    def _under(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): x for name, x in self._tensors.items() if name.startswith(prefix)}


def read_kit(folder: str | Path) -> tuple[dict[str, Any], list[Case]]:
    """Return the manifest of a kit and its cases."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise KitError(f"{folder}: not a golden kit: there is no manifest.json in it") from None
    except (ValueError, RecursionError) as error:
        raise KitError(f"{folder}/manifest.json: not JSON: {error}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise KitError(f"{folder}: kit version {version!r}; this verifier reads version {VERSION}")
    try:
        cases = [_case(folder, entry) for entry in manifest["cases"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise KitError(f"{folder}/manifest.json: not as manifest.schema.json says: {error!r}") from None
    return manifest, cases


def _case(folder: Path, entry: dict[str, Any]) -> Case:
    if ".." in Path(entry["id"]).parts or Path(entry["id"]).is_absolute():
        raise KitError(f"{folder}/manifest.json: {entry['id']!r} leads out of the kit")
    outputs = tuple(map(_output, entry["outputs"]))
    return Case(
        folder, entry["id"], entry["call"], entry["level"], entry["why"], entry["settings"], entry["model"],
        tuple(entry["tags"]), tuple(entry["profiles"]), outputs,
    )  # fmt: skip


def _output(entry: dict[str, Any]) -> Output:
    return Output(
        entry["name"], entry["letters"], tuple(entry["shape"]), entry["kind"], entry["required"],
        entry.get("bounds", {}), entry.get("routing", {}).get("renormalised", True),
    )  # fmt: skip


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read a safetensors file; bfloat16 comes as float32."""
    return read_safetensors(Path(path))[0]


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata."""
    try:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        body = memoryview(data)[8 + length :]
        return {name: _tensor(body, entry) for name, entry in header.items()}, dict(metadata)
    except OSError as error:
        raise KitError(f"{path}: cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KitError(f"{path}: not a whole safetensors file ({error})") from None


def _tensor(body: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(body):
        raise ValueError(f"a tensor lies at bytes {start} to {stop} of {len(body)}")
    array = np.frombuffer(body[start:stop], _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return (array.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else array


def is_routing(case: Case, name: str) -> bool:
    """Whether an output holds the experts that were chosen."""
    return name.endswith("gating.ids") or (case.call == "gating" and name == "ids")
