"""`python -m tests.cuda.sanitize`: run every kernel under compute-sanitizer, which watches each access to memory.

What it runs of the suite is chosen to launch each kernel a few times, since a watched kernel is some hundred times
slower. Without compute-sanitizer or a device it says so, with status 0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from minimoe.arrays import cupy_module

TOOLS = ("memcheck", "racecheck", "synccheck")
# A test of each room that draws a few shapes, and a model's steps as a graph.
CHOSEN = "race or bfloat16 or replays_one_graph"
FOUND = 9  # the status by which compute-sanitizer says that it found something


def program() -> str | None:
    """Where compute-sanitizer is: on the path, or beside the compiler."""
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def missing() -> str | None:
    """Why nothing can be run."""
    if program() is None:
        return "compute-sanitizer is not installed"
    try:
        cupy_module()
    except ValueError as error:
        return str(error)
    return None


def main() -> int:
    """Run the tools in turn; return 1 if one finds something, or the tests fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", nargs="+", choices=(*TOOLS, "initcheck"), default=TOOLS[:1])
    parser.add_argument("--select", default=CHOSEN, help="pytest's -k")
    args = parser.parse_args()
    if (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return 0
    failed = 0
    for tool in args.tool:
        command = [str(program()), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", args.select]
        status = subprocess.run([*command, "tests/cuda"], check=False).returncode
        told = {0: "clean", FOUND: "found something"}.get(status, f"status {status}")
        print(f"{tool}: {told}", flush=True)
        failed += status != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
