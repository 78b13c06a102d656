"""Whether arrays would fit into memory, asked before any is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.checkpoint.errors import NotEnoughMemoryError, gigabytes
from minimoe.config import ModelConfig


def check_memory(config: ModelConfig, dtype: Any) -> None:
    """Raise NotEnoughMemoryError if the weights of a model in `dtype` exceed the memory that is free."""
    count, kind = config.num_parameters(), np.dtype(dtype)  # "int8" too; its scales are less than one in a hundred
    require_memory(count * kind.itemsize, f"{count:,} parameters in {kind}")


def require_memory(size: int, what: str) -> None:
    """Raise NotEnoughMemoryError if `size` bytes are more than is free."""
    free = free_memory()
    if size > free:
        raise NotEnoughMemoryError(f"{what} need {gigabytes(size)} of memory; {gigabytes(free)} are free")


def free_memory() -> int:
    """Bytes of memory that can be had without swapping; all of the machine's where Linux does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
