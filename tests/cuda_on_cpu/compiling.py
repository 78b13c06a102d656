"""Compile a CUDA kernel for the processor, with `emulator.hpp` in place of CUDA's own words, and call it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

EMULATOR = Path(__file__).with_name("emulator.hpp")
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC")
_ONE_AT_A_TIME = threading.Lock()  # what a block shares is static memory; on a device a stream keeps launches apart
# What the emulator keeps across its jumps is static or in memory.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered")

_STUB = """
extern "C" const char* launch(const unsigned* grid, const unsigned* block, unsigned long shared, int order,
                              void** arguments, const int* sizes, int count) {
    return cuda_on_cpu::launch(&%s, grid, block, shared, order, arguments, sizes, count);
}
"""


class KernelError(RuntimeError):
    """A kernel that does not compile, or breaks a rule while it runs."""


@functools.cache
def _folder() -> Path:
    """Where compiled kernels are kept: of this user, between runs and beside other processes."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or tempfile.gettempdir()) / f"minimoe-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@functools.cache
def _header() -> Path:
    """The emulator, its precompiled form beside it: most of a kernel's time to compile is that of C++'s own headers."""
    header = _folder() / f"emulator-{_key(EMULATOR.read_text())}.hpp"
    if not (precompiled := header.with_suffix(".hpp.gch")).exists():
        _replace(header, lambda file: shutil.copyfile(EMULATOR, file))
        _replace(precompiled, lambda file: _compile("the emulator", "-w", "-x", "c++-header", header, "-o", file))
    return header


@functools.cache
def compiled(source: str, kernel: str) -> ctypes._CFuncPtr:
    """Return the launcher of one instantiation, compiled unless an earlier run did."""
    text = f'#include "{_header()}"\n#line 1 "kernels.cuh"\n{source}\n{_STUB % kernel}'
    library = _folder() / f"{_key(text)}.so"
    if not library.exists():
        arguments = (*WARNINGS, "-shared", "-x", "c++", "-", "-o")
        _replace(library, lambda file: _compile(kernel, *arguments, file, text=text))
    function = ctypes.CDLL(str(library)).launch
    function.restype = ctypes.c_char_p
    return function


def _key(text: str) -> str:
    return hashlib.sha256("\0".join([text, *FLAGS, *WARNINGS]).encode()).hexdigest()[:24]


def _replace(file: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside its place first: another process may be making the same."""
    unique = file.with_name(f"{os.getpid()}.{file.name}")
    make(unique)
    unique.replace(file)


def _compile(what: str, *arguments: str | Path, text: str | None = None) -> None:
    command = [str(COMPILER), *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise KernelError(f"{what} does not compile:\n{done.stderr[:4000]}")


def run(
    source: str,
    kernel: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: list[tuple[bytes, int]],
    shared: int,
    order: int,
) -> None:
    """Run a kernel: `arguments` are the bytes of each, as a launch on a device would copy them.

    `order` says in which order the threads of a block run between two barriers: 0 rising, 1 falling, 2 shuffled.
    """
    size = ctypes.c_uint * 3
    boxes = [ctypes.create_string_buffer(data, len(data)) for data, _ in arguments]
    pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
    sizes = (ctypes.c_int * len(boxes))(*(length for _, length in arguments))
    launch = compiled(source, kernel)
    with _ONE_AT_A_TIME:
        wrong = launch(
            size(*(*grid, 1, 1)[:3]), size(*(*block, 1, 1)[:3]), ctypes.c_ulong(shared), order, pointers, sizes,
            len(boxes),
        )  # fmt: skip
    if wrong:
        raise KernelError(f"{kernel}: {wrong.decode()}")
