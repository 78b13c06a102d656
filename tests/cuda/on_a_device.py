"""`python -m tests.cuda.on_a_device --out FOLDER`: all that needs a device, in one run that keeps to a time.

The suite, the benchmark, the golden kit and the sanitizer take turns, what matters most first; each is a process of its
own, so that none takes another with it. FOLDER gets `log.txt`, `summary.json` and one JSON file per benchmark, and the
last thing that is printed is a summary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=8")
BENCH = ("-m", "minimoe", "bench", "--backend", "cuda", "--rounds", "3")
LARGE = (*BENCH, "--preset", "mixtral-8x7b")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes
    ----------
    arguments : of Python
    limit : seconds it may take at most
    keeps : the JSON file that a benchmark writes
    """

    name: str
    arguments: Sequence[str]
    limit: int
    keeps: str | None = None


PARTS = (
    Part(
        "rooms and model",
        (*PYTEST, "tests/cuda", "tests/test_backends.py", "--deselect", "tests/cuda/test_long.py"),
        200,
    ),
    Part("decode", (*LARGE, "--what", "decode", "--batch", "1", "16", "--context", "512"), 110, "decode.json"),
    Part("prefill", (*LARGE, "--what", "prefill", "first-token", "--context", "4096"), 90, "prefill.json"),
    Part("long", (*PYTEST, "tests/cuda/test_long.py", "tests/bench/test_device.py"), 150),
    Part(
        "beside transformers",
        (*LARGE, "--what", "decode", "prefill", "--context", "4096", "--peers", "transformers"),
        150,
        "peers.json",
    ),
    Part("context", (*LARGE, "--what", "prefill", "decode", "--context", "32760"), 90, "context.json"),
    Part(
        "training",
        (*BENCH, "--preset", "tiny", "--backend", "numba", "--what", "train", "--peers", "transformers"),
        120,
        "training.json",
    ),
    Part("ops", (*LARGE, "--layers", "4", "--what", "ops", "--context", "4096"), 60, "ops.json"),
    Part("sanitizer", ("-m", "tests.cuda.sanitize"), 180),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "out of time", or "not reached"."""

    name: str
    ended: str
    seconds: float
    last: str = ""


def carry_out(part: Part, out: Path, seconds: float, log: TextIO) -> Outcome:
    """Run a part for at most so many seconds; whatever it does, say how it ended."""
    command = [sys.executable, *part.arguments]
    if part.keeps is not None:
        command += ["--out", str(out / part.keeps)]
    log.write(f"\n==== {part.name}: {' '.join(command)}\n")
    log.flush()
    start, said = time.monotonic(), log.tell()
    try:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, timeout=min(seconds, part.limit), check=False
        )
        ended = "ok" if done.returncode == 0 else f"failed (status {done.returncode})"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    except OSError as error:
        ended = f"failed ({error})"
    log.flush()
    with open(log.name, encoding="utf-8", errors="replace") as file:
        file.seek(said)
        lines = [line.rstrip() for line in file if line.strip()]
    return Outcome(part.name, ended, round(time.monotonic() - start, 1), lines[-1][:160] if lines else "")


def goals(out: Path) -> list[str]:
    """What the benchmarks say of the goals."""
    from minimoe.bench.report import goals as judged

    found: list[str] = []
    for part in PARTS:
        if part.keeps is not None and (path := out / part.keeps).exists():
            found += [f"{part.name}: {line}" for line in judged(json.loads(path.read_text(encoding="utf-8")))]
    return found


def machine() -> dict[str, Any]:
    """The card and versions, or why there is none."""
    from minimoe.bench import device
    from minimoe.bench import machine as described

    try:
        return described.describe() | {"gpu": device.describe()}
    except ValueError as error:
        return described.describe() | {"gpu": str(error)}


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=480, help="that all may take (default 480)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(part.name for part in parts))
    args = parser.parse_args(arguments)
    if unknown := set(args.only or ()) - {part.name for part in parts}:
        parser.error(f"there is no part {sorted(unknown)[0]!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    outcomes: list[Outcome] = []
    with (args.out / "log.txt").open("w", encoding="utf-8") as log:
        for part in parts:
            if args.only is not None and part.name not in args.only:
                continue
            left = end - time.monotonic()
            outcome = carry_out(part, args.out, left, log) if left > 5 else Outcome(part.name, "not reached", 0.0)
            outcomes.append(outcome)
            print(f"{outcome.name}: {outcome.ended}, {outcome.seconds} s: {outcome.last}", flush=True)
            summary = {"parts": [asdict(one) for one in outcomes], "goals": goals(args.out), "machine": machine()}
            (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", "summary", *(f"  {one.ended:<20} {one.name}" for one in outcomes), *goals(args.out)]))
    return int(any(one.ended.startswith("failed") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
