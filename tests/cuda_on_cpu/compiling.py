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
from pathlib import Path

EMULATOR = Path(__file__).with_name("emulator.hpp")
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC")
_ONE_AT_A_TIME = threading.Lock()  # what a block shares is static memory; on a device a stream keeps launches apart
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")

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
def compiled(source: str, kernel: str) -> ctypes._CFuncPtr:
    """Return the launcher of one instantiation, compiled unless an earlier run did."""
    text = f'#include "{EMULATOR}"\n#line 1 "kernels.cuh"\n{source}\n{_STUB % kernel}'
    key = hashlib.sha256("\0".join([text, EMULATOR.read_text(), *FLAGS, *WARNINGS]).encode()).hexdigest()[:24]
    library = _folder() / f"{key}.so"
    if not library.exists():
        unique = library.with_suffix(f".{os.getpid()}.so")  # another process may be compiling the same
        command = [COMPILER, *FLAGS, *WARNINGS, "-x", "c++", "-", "-o", str(unique)]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        if done.returncode:
            raise KernelError(f"{kernel} does not compile:\n{done.stderr[:4000]}")
        unique.replace(library)
    function = ctypes.CDLL(str(library)).launch
    function.restype = ctypes.c_char_p
    return function


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
