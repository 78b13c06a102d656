"""`minimoe golden`: hold another implementation against golden vectors, and name the mistake it makes."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimoe.backends import make_backend
from minimoe.cli.common import add_json, check_writable, print_json
from minimoe.display import capability
from minimoe.golden import external, own, own_kit, report, verify
from minimoe.golden.adapters import OurBackend, load
from minimoe.golden.calls import CALLS
from minimoe.golden.verify.check import add_arguments as add_choice

if TYPE_CHECKING:
    from minimoe.golden.verify import Case, Report

EXAMPLES = """
  minimoe golden export KIT                       the vectors, their specification, and a verifier of its own
  minimoe golden check KIT OUTPUTS --only 'gating*'
  minimoe golden check KIT --adapter mine.py:Mine          a Python class instead of files
  minimoe golden check KIT --backend numba                 one of this package's own
  minimoe golden run -- ./mine {inputs} {outputs}          any program
  minimoe golden make KIT --model FOLDER --prompt "Once"   a kit of your own checkpoint
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `minimoe golden`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES.strip("\n")
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)

    listing = commands.add_parser("list", help="what a kit asks for: calls, or the cases of some")
    listing.add_argument("kit", nargs="?", metavar="KIT", default=str(report.VECTORS), help="default: the bundled one")
    listing.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cases or calls, as 'gating*'")
    add_json(listing)
    listing.set_defaults(subrun=_list)

    exporting = commands.add_parser("export", help="copy the bundled kit and the stand-alone verifier into a folder")
    exporting.add_argument("folder", metavar="FOLDER", help="a new folder")
    exporting.add_argument("--force", action="store_true", help="replace an older copy")
    exporting.set_defaults(subrun=_export)

    checking = commands.add_parser("check", help="compare outputs with a kit; exit 0 all fits, 1 something does not")
    checking.add_argument("kit", nargs="?", metavar="KIT", default=str(report.VECTORS), help="default: the bundled one")
    checking.add_argument("outputs", nargs="?", metavar="OUTPUTS", help="folder of <id>.safetensors or <id>.npz")
    checking.add_argument("--adapter", metavar="MODULE:NAME", help="run a Python adapter instead of reading OUTPUTS")
    checking.add_argument("--backend", metavar="NAME", help="run numpy, numba or cuda instead of reading OUTPUTS")
    checking.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for one case of an adapter (default 600)"
    )
    add_choice(checking)
    checking.set_defaults(subrun=_check, profile=None)

    running = commands.add_parser("run", help="run a program on the inputs of a kit, and check what it writes")
    running.add_argument("--kit", metavar="KIT", default=str(report.VECTORS), help="default: the bundled one")
    running.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for one start of it (default 600)"
    )
    add_choice(running)
    running.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="-- PROGRAM …",
        help="with {inputs} and {outputs}, two folders; with {case} it is started once per case",
    )  # fmt: skip
    running.set_defaults(subrun=_run)

    making = commands.add_parser("make", help="make a kit from your own checkpoint and prompt")
    own.add_arguments(making)
    making.set_defaults(subrun=own.main)


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe golden`."""
    if getattr(args, "junit", None) is not None:
        check_writable(Path(args.junit))
    status: int = args.subrun(args)
    return status


def _list(args: argparse.Namespace) -> int:
    _, cases = verify.read_kit(args.kit)
    cases = verify.matching(cases, args.only) if args.only else cases
    calls = list(dict.fromkeys(case.call for case in cases))
    if args.json:
        print_json([{"id": c.id, "call": c.call, "level": c.level, "why": c.why, "tags": c.tags, "profiles": c.profiles,
                     "outputs": [{"name": o.name, "letters": o.letters, "shape": o.shape} for o in c.outputs]}
                    for c in cases])  # fmt: skip
    elif args.only:
        print("\n".join(f"{case.id}\n    {case.why}" for case in cases))
    else:
        for name in calls:
            number = sum(case.call == name for case in cases)
            print(f"{name:<24}{number:>4}  {CALLS[name].says if name in CALLS else ''}")
        print(f"{'':<24}{len(cases):>4}  cases in {args.kit}; profiles {', '.join(_profiles(cases))}")
    return 0


def _profiles(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(profile for case in cases for profile in case.profiles))


def _export(args: argparse.Namespace) -> int:
    external.export(args.folder, report.VECTORS, args.force)
    print(f"{args.folder}: README.md is the specification; write OUTPUTS/<id>.npz, one file per case, and check them:")
    print(f"  python {Path(args.folder) / 'verify'} {args.folder} OUTPUTS --only 'rmsnorm*'")
    return 0


def _check(args: argparse.Namespace) -> int:
    given = [name for name in ("outputs", "adapter", "backend") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError("give one of OUTPUTS, --adapter and --backend: minimoe golden check KIT OUTPUTS")
    _check_timeout(args.timeout)
    _check_models(args.kit)
    if args.outputs is not None:
        profile = args.profile or "float32"
        found = verify.check_folder(
            args.kit, args.outputs, profile, args.only, args.inference, args.allow_missing, args.expect_failure,
            args.mixtral,
        )  # fmt: skip
    else:
        adapter = load(args.adapter) if args.adapter is not None else OurBackend(make_backend(args.backend))
        adapter.profile = args.profile or adapter.profile
        found = report.check_adapter(
            adapter, args.kit, args.only, args.inference, _progress, args.expect_failure, args.timeout, args.mixtral
        )
    return _show(args, found)


def _run(args: argparse.Namespace) -> int:
    _check_timeout(args.timeout)
    _check_models(args.kit)
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    found = external.check_program(
        program, args.kit, args.profile, args.only, args.inference, args.allow_missing, args.timeout, _progress,
        args.expect_failure, args.mixtral,
    )  # fmt: skip
    return _show(args, found)


def _check_timeout(seconds: float) -> None:
    if not 0 < seconds < threading.TIMEOUT_MAX:  # NaN is not, either
        raise ValueError(f"--timeout must be more than 0 seconds, not {seconds:g}")


def _check_models(kit: str) -> None:
    manifest, _ = verify.read_kit(kit)
    if manifest.get("models"):
        own_kit.check_models(manifest)


def _progress(cases: Sequence[Case]) -> Iterable[Case]:
    from tqdm import tqdm

    bar: Iterable[Case] = tqdm(cases, unit="case", disable=None, leave=False, file=sys.stderr)
    return bar


def _show(args: argparse.Namespace, found: Report) -> int:
    if args.junit:
        found.write_junit(args.junit)
    lines = report.likely(found)
    if args.json:
        print(report.as_json(found, lines))
    elif capability(sys.stdout) == "colour":
        print(found.text(lines, report.paint))
    else:
        print(found.text(lines))
    return found.exit_status
