"""The files of a candidate: one of outputs per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .kit import VERSION, Case, KitError, read_safetensors
from .words import similar

MAX_BYTES = 1 << 30  # of one file of outputs


def read_outputs(folder: str | Path, case: Case) -> dict[str, np.ndarray] | None:
    """Read a candidate's outputs of a case from <id>.safetensors or <id>.npz; None where there is neither.

    Raises
    ------
    KitError
        If there are both, or the file is no regular one, too large, broken, or says (in the metadata, or an array,
        `minimoe_golden`) that it was made for another version of the kit.
    """
    paths = [p for end in (".safetensors", ".npz") if (p := Path(folder) / f"{case.id}{end}").exists()]
    if not paths:
        return None
    path = paths[0]
    if len(paths) == 2:
        raise KitError(f"{path} and {paths[1].name} are both there: which one counts? Delete the other")
    if not path.is_file():
        raise KitError(f"{path}: not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise KitError(f"{path}: {path.stat().st_size:,} bytes; more than {MAX_BYTES:,} are not read")
    outputs, made_for = _read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    version = str(made_for.get("minimoe_golden", VERSION)).strip()
    if version != str(VERSION):
        raise KitError(f"{path}: made for kit version {version[:20]}; this kit has version {VERSION}")
    return outputs


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if (size := sum(entry.file_size for entry in file.zip.infolist())) > MAX_BYTES:
                raise ValueError(f"{size:,} bytes unpacked; more than {MAX_BYTES:,} are not read")
            outputs = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and NumPy have a dozen ways to say that a file is broken
        raise KitError(f"{path}: not a whole .npz file ({' '.join(str(error).split()) or error!r})") from None
    return outputs, {"minimoe_golden": outputs.pop("minimoe_golden", VERSION)}


def unknown_files(folder: str | Path, cases: Sequence[Case]) -> list[str]:
    """Name the tensor files in a folder of outputs that belong to no case."""
    known, folder = [case.id for case in cases], Path(folder)
    files = [path for end in ("safetensors", "npz") for path in sorted(folder.rglob(f"*.{end}"))]
    names = [(path, path.relative_to(folder).with_suffix("").as_posix()) for path in files]
    return [f"{path}: no case has this name{similar(name, known)}" for path, name in names if name not in known]
