"""Several files written together: each becomes what it shall be in one step, and none does if anything fails."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class Outputs:
    """Files that are written beside their targets; `together` puts all of them into place at its end."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, Path, IO[Any]]] = []
        self._made: list[Path] = []

    def folder(self, path: Path) -> None:
        """Make a folder for files to come, unless it is there."""
        if not path.exists():
            path.mkdir()
            self._made.append(path)

    def text(self, path: str | Path) -> IO[str]:
        """Open a file for text in UTF-8; half characters, which names of files may hold, are written as escapes."""
        temporary, target = _places(Path(path))
        file = temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._waiting.append((temporary, target, file))
        return file

    def write(self, path: str | Path, data: bytes | str) -> None:
        """Write a whole file."""
        if isinstance(data, str):
            self.text(path).write(data)
            return
        temporary, target = _places(Path(path))
        file = temporary.open("wb")
        self._waiting.append((temporary, target, file))
        file.write(data)

    def _finish(self) -> None:
        for temporary, target, file in self._waiting:
            file.flush()
            if temporary != target:
                os.fsync(file.fileno())
            file.close()
        for temporary, target, _ in self._waiting:
            if temporary != target:
                os.replace(temporary, target)

    def _give_up(self) -> None:
        for temporary, target, file in self._waiting:
            with suppress(OSError):  # a full disk refuses what was still to be written
                file.close()
            if temporary != target:
                temporary.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()


@contextmanager
def together() -> Iterator[Outputs]:
    """Write files together: all are in place after the block, or, if it raises (Ctrl-C too), what was there before."""
    outputs = Outputs()
    try:
        yield outputs
        outputs._finish()
    except BaseException:
        outputs._give_up()
        raise


def _places(path: Path) -> tuple[Path, Path]:
    """Where to write, and where the file belongs; a device or a pipe cannot be replaced and is written at once."""
    if path.exists() and not path.is_file():
        return path, path
    target = Path(os.path.realpath(path))
    return target.with_name(f".minimoe-{secrets.token_hex(8)}"), target
