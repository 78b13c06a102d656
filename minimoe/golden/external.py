"""Any program, in any language, held against a kit: it is started, given the inputs, and what it writes is checked.

The command is a list of words, never a line for a shell; `{inputs}`, `{outputs}` and `{case}` in them are replaced by
two folders and the id of a case. With `{case}` the program is started once per case, else once for all. `{inputs}` has
the layout of the kit, but its case files hold inputs only, so that a program cannot take the truth for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from minimoe.checkpoint import save_tensors, write_folder_atomically
from minimoe.golden import verify
from minimoe.golden.verify import Case, KitError, Report

KEPT = 4096  # bytes of what a program prints that are kept: the last ones
GRACE = 2.0  # seconds between asking a program to end and ending it


class ProgramError(ValueError):
    """A command that cannot be started."""


def check_program(
    command: Sequence[str],
    kit: str | Path,
    profile: str = "float32",
    only: Sequence[str] = (),
    inference: bool = False,
    allow_missing: bool = False,
    timeout: float = 600.0,
    progress: Callable[[Sequence[Case]], Iterable[Case]] = lambda cases: cases,
    expected: Sequence[str] = (),
    mixtral: bool = False,
) -> Report:
    """Run a program on the inputs of a kit, and compare what it writes: also if it fails, or must be stopped.

    Parameters
    ----------
    command : the program and its arguments
    timeout : seconds for one start of the program; then it and all it started are ended
    progress : wraps the cases while they are run one by one, as tqdm does
    expected : the cases that must fail; see `verify.expected_failures`

    Raises
    ------
    ProgramError
        If the command names no place for outputs, or cannot be started.
    KitError
        If the kit cannot be read or nothing is selected.
    """
    if not command or not any("{outputs}" in word for word in command):
        raise ProgramError("the command must say where outputs go: minimoe golden run -- PROGRAM {inputs} {outputs}")
    manifest, cases = verify.read_kit(kit)
    chosen = verify.select(cases, profile, only, inference, mixtral)
    must_fail = verify.expected_failures(expected, chosen)
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="minimoe-golden-", ignore_cleanup_errors=True) as scratch:
        inputs, outputs = Path(scratch) / "inputs", Path(scratch) / "outputs"
        outputs.mkdir()
        write_inputs(Path(kit), manifest, chosen, inputs)
        places = {"{inputs}": str(inputs), "{outputs}": str(outputs)}
        if any("{case}" in word for word in command):
            for case in progress(chosen):
                problems[case.id] = run_program(_fill(command, places | {"{case}": case.id}), timeout)
            problem = ""
        else:
            problem = run_program(_fill(command, places), timeout)
        entries = verify.check(chosen, lambda case: verify.read_outputs(outputs, case), profile, must_fail)
        warnings = [line.replace(f"{outputs}/", "") for line in verify.unknown_files(outputs, cases)]
    for _, result, _ in entries:
        if problems.get(result.id):
            result.absent, result.problem = "", "; ".join(filter(None, [problems[result.id], result.problem]))
        result.problem = result.problem.replace(f"{outputs}/", "")
    return Report(str(kit), profile, entries, len(cases), warnings, problem, allow_missing)


def write_inputs(kit: Path, manifest: Mapping[str, Any], cases: Sequence[Case], folder: Path) -> None:
    """Write a kit of some cases without their truths."""
    chosen = {case.id for case in cases}
    folder.mkdir()
    for case in cases:
        path = folder / "cases" / f"{case.id}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {f"inputs/{name}": x for name, x in case.inputs.items()})
    for model in {case.model for case in cases if case.model is not None and not Path(case.model).is_absolute()}:
        shutil.copytree(kit / "models" / model, folder / "models" / model)
    kept = {**manifest, "cases": [entry for entry in manifest["cases"] if entry["id"] in chosen]}
    (folder / "manifest.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")


def run_program(command: Sequence[str], timeout: float) -> str:
    """Run a program to its end; return how it ended if not well, with the last lines it printed.

    It runs in a session of its own, and whatever is left of that session's first process group is ended with it.

    Raises
    ------
    ProgramError
        If it cannot be started.
    """
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise ProgramError(f"{command[0]}: cannot be started: {getattr(error, 'strerror', error)}") from None
    try:
        readers = [_Tail(stream) for stream in (child.stderr, child.stdout) if stream is not None]
        ended = _wait(child.pid, timeout)
        if not ended:
            _signal_group(child.pid, signal.SIGTERM)
            _wait(child.pid, GRACE)
    finally:  # after Ctrl-C too; until wait() takes notice of its end, no other process can have its number
        _signal_group(child.pid, signal.SIGKILL)
        status = child.wait()
    words = next((text for reader in readers if (text := reader.text())), "")
    how = f"was stopped after {timeout:g} s" if not ended else _how(status)
    return how and f"{Path(command[0]).name} {how}" + (f"; its last words: {words}" if words else "")


def _wait(pid: int, timeout: float) -> bool:
    """Wait until a child has ended, without taking notice of it; False if it has not by then."""
    deadline, pause = time.monotonic() + timeout, 0.002
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}" if status else ""
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"


class _Tail:
    """Reads a stream to its end in a thread, so that a program never waits for a full pipe; keeps the last bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._bytes = stream, b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        with self._stream:
            while piece := os.read(self._stream.fileno(), 1 << 16):
                self._bytes = (self._bytes + piece)[-KEPT:]

    def text(self) -> str:
        """The last three lines, in one; what cannot be shown is left out."""
        self._thread.join(timeout=1.0)  # a process that left the group may hold the other end
        lines = [line for line in self._bytes.decode(errors="replace").splitlines() if line.strip()][-3:]
        return " / ".join("".join(c for c in line if c.isprintable()).strip()[:200] for line in lines)


def _fill(command: Sequence[str], places: Mapping[str, str]) -> list[str]:
    filled = list(command)
    for name, value in places.items():
        filled = [word.replace(name, value) for word in filled]
    return filled


def export(folder: str | Path, kit: str | Path, force: bool = False) -> None:
    """Copy a kit, with the stand-alone verifier, into a new folder; with `force`, over an older copy.

    Raises
    ------
    KitError
        If the folder holds anything else, or the kit cannot be read.
    SaveError
        If it cannot be written; what was there before is whole.
    """
    verify.read_kit(kit)
    names = {path.name for path in Path(kit).iterdir()} | {"verify"}
    held = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    if held and not held >= {"manifest.json", "cases", "verify"}:
        raise KitError(f"{folder}: is not empty, and no golden kit: export to a new folder")
    if others := sorted(held - names):
        raise KitError(f"{folder}: holds {others[0]!r}, which is no part of a golden kit: export to a new folder")
    if held and not force:
        raise KitError(f"{folder}: holds a golden kit already; --force replaces it")

    def write(place: Path) -> None:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(kit, place, dirs_exist_ok=True, ignore=ignore)
        shutil.copytree(Path(verify.__file__).parent, place / "verify", dirs_exist_ok=True, ignore=ignore)

    write_folder_atomically(folder, write)
