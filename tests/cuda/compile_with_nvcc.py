"""`python -m tests.cuda.compile_with_nvcc`: compile every kernel that the CUDA backend can launch, warnings as errors.

Nothing is run, so it needs CUDA's compiler but no device. Prints what the assembler says of each kernel: registers,
shared memory, and spills, of which there must be none.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import minimoe.ops
from minimoe.cuda import source

ROOMS = sorted(path.parent.name for path in Path(minimoe.ops.__path__[0]).glob("*/kernels.cu"))
ROOMS += ["benchmark"]  # no room: what it runs on the device besides the model


def dialect_of(room: str) -> ModuleType:
    """The module that names a room's kernels."""
    return importlib.import_module("minimoe.bench.device" if room == "benchmark" else f"minimoe.ops.{room}.cupy_gpu")


def unit(room: str) -> str:
    """A room's source, and a table that asks for every instantiation of its list."""
    dialect = dialect_of(room)
    table = ",\n    ".join(f"reinterpret_cast<void*>(&{name})" for name in dialect.INSTANCES)
    return f"{source(dialect.KERNELS)}\nvoid* instances[] = {{\n    {table}}};\n"


def compiled(room: str, arch: str, folder: Path) -> tuple[int, str]:
    """Return nvcc's exit status and what it said."""
    file = folder / f"{room}-{arch}.cu"
    file.write_text(unit(room), encoding="utf-8")
    command = ["nvcc", "--std=c++17", f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", str(file.with_suffix(".cubin")), str(file)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Compile all rooms for all architectures; return 1 if one does not compile, or spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--verbose", action="store_true", help="print what the assembler says of every kernel")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(room, arch) for arch in args.arch for room in ROOMS]
        for (room, arch), (status, said) in zip(
            jobs, pool.map(lambda job: compiled(*job, Path(folder)), jobs), strict=True
        ):
            entries = said.count("Compiling entry function")
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
            used = f"at most {max(registers, default=0)} registers, {sum(spills)} bytes spilt"
            print(f"{arch} {room}: {entries} kernels, {used}")
            if status or sum(spills) or args.verbose:
                print(said)
            failed += bool(status or sum(spills) or not entries)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
