"""Mapped files: noticing that one was changed, and what of a process's memory they are.

Weights are used where they lie in the file (`tensors.map_tensors`). A file that is deleted, renamed or replaced stays
what it is for as long as it is mapped; one that is written to *in place* changes the weights under a running model.
Size and time of the last change are therefore compared with those at loading before every call (one fstat a file, about
1 µs). What this cannot see: a change within the file system's clock tick of the loading, and one by a writer who
sets the time back. A file truncated during a call ends the process with SIGBUS; `minimoe.load(path, mmap=False)` reads
files that others may change into memory instead.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minimoe.checkpoint.errors import ChangedFileError
from minimoe.params import Params, leaves

_T = TypeVar("_T")


class MappedFile(mmap.mmap):
    """A file mapped to be read, which knows what it was when it was mapped; made by `map_file`."""

    where: str
    fd: int  # of the file itself: it may have another name by now, or none
    seen: tuple[int, int]  # bytes, and nanoseconds of the last change


def map_file(file: BinaryIO, where: str) -> MappedFile:
    """Map a whole open file, which may be closed afterwards; `where` is its name in messages."""
    mapping = MappedFile(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    mapping.where, mapping.fd = where, os.dup(file.fileno())
    weakref.finalize(mapping, os.close, mapping.fd)
    mapping.seen = _size_and_time(mapping.fd)
    return mapping


class MappedFiles:
    """The files that any weights of a model are views of; none where all were read or converted.

    Attributes
    ----------
    files : each once
    copied_bytes : of the weights that are views of no file
    """

    def __init__(self, params: Params) -> None:
        found: dict[int, MappedFile] = {}
        self.copied_bytes = 0
        for _, leaf in leaves(params):
            for w in leaf if isinstance(leaf, list) else [leaf]:
                if (mapping := _mapping_of(w)) is None:
                    self.copied_bytes += int(w.nbytes)
                else:
                    found[id(mapping)] = mapping
        self.files = list(found.values())

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files))

    def check(self) -> None:
        """Raise ChangedFileError if a file is not what it was when it was mapped."""
        for file in self.files:
            if (now := _size_and_time(file.fd)) != file.seen:
                size = "" if now[0] == file.seen[0] else f" (it had {file.seen[0]:,} bytes, and has {now[0]:,})"
                raise ChangedFileError(
                    f"{file.where}: the file was changed while it was mapped{size}: load the model again, with "
                    "mmap=False (--no-mmap) where others write to its files"
                )

    def checked(self, steps: Iterable[_T]) -> Iterator[_T]:
        """Yield `steps`, with a check before each and one after the last."""
        self.check()
        for step in steps:
            yield step
            self.check()


def memory_in_use() -> dict[str, int] | None:
    """Return bytes of this process that are in memory, None where the system does not say (it is not Linux).

    `anonymous` is its own: what it has allocated. `files` are pages of mapped files, weights among them, which the
    system may drop at any time and read again. `peak` is the most that both were together.
    """
    names = {"RssAnon": "anonymous", "RssFile": "files", "VmHWM": "peak"}
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    except OSError:
        return None
    found = {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in names}
    return found if len(found) == len(names) else None


def _size_and_time(fd: int) -> tuple[int, int]:
    now = os.fstat(fd)
    return now.st_size, now.st_mtime_ns


def _mapping_of(array: Any) -> MappedFile | None:
    """The mapped file that an array is a view of."""
    held = array
    while held is not None and not isinstance(held, MappedFile):
        held = held.obj if isinstance(held, memoryview) else getattr(held, "base", None)
    return held
