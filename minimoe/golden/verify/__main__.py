"""The command `python verify KIT OUTPUTS`, wherever this folder lies."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a folder: make it the package it is
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = Path(__file__).resolve().parent.name
    importlib.import_module(__package__)

from .check import add_arguments, check_folder
from .kit import KitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verifier; return its exit status."""
    parser = argparse.ArgumentParser(prog="verify", description="Hold outputs against a golden kit.")
    parser.add_argument("kit", metavar="KIT", help="the kit's folder")
    parser.add_argument("outputs", metavar="OUTPUTS", help="folder of <id>.safetensors or <id>.npz")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where a terminal cannot show a sign
    try:
        report = check_folder(
            args.kit, args.outputs, args.profile, args.only, args.inference, args.allow_missing, args.expect_failure,
            args.mixtral,
        )  # fmt: skip
        if args.junit:
            report.write_junit(args.junit)
    except (KitError, OSError) as error:
        print(f"verify: error: {error}", file=sys.stderr)
        return 2
    likely = ["the package minimoe knows some: `minimoe golden check KIT OUTPUTS`"] if report.failures else []
    print(report.as_json() if args.json else report.text(likely))
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
