"""A checkpoint's folder, held open, so that all files read belong to one checkpoint even while it is being replaced.

`save` swaps whole folders (see `atomic`). A reader therefore opens the folder once and every file relative to that
descriptor: it sees the old checkpoint or the new one. Where the old one's files are already being deleted, reading
starts again with the new folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from minimoe.checkpoint import strict_json
from minimoe.checkpoint.atomic import backup_of
from minimoe.checkpoint.errors import (
    CheckpointError,
    DamagedFileError,
    MissingFileError,
    OutsideFolderError,
    UnsafeFormatError,
    shown,
)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GGUF_SUFFIX = ".gguf"
_RETRIES = 100
_T = TypeVar("_T")


class Folder:
    """An open folder: `with Folder(path) as folder: ...`. The path of a GGUF file is a folder that holds it alone.

    Raises
    ------
    MissingFileError
        If there is no such folder, or it is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._only: str | None = None
        if self.path.suffix == GGUF_SUFFIX and os.path.isfile(self.path):
            self.path, self._only = self.path.parent, self.path.name
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            # The backup is all there is for a moment, where the system cannot swap folders; then the path is back.
            for path in (self.path, backup_of(self.path), self.path):
                with contextlib.suppress(FileNotFoundError):
                    return os.open(path, flags)
            raise MissingFileError(f"{self.path}: there is no such folder")
        except NotADirectoryError:
            self._refuse_file()
            raise MissingFileError(f"{self.path}: is a file; a checkpoint is the folder that holds it") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise MissingFileError(f"{shown(str(self.path))}: cannot be opened: {reason}") from None

    def _refuse_file(self) -> None:
        if self.path.suffix in PICKLES:
            raise UnsafeFormatError(
                f"{self.path}: a pickle file, never opened, because it can run code; convert it to safetensors with "
                "transformers' save_pretrained, and give the folder"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        """Names of everything in the folder, sorted."""
        return sorted(os.listdir(self._fd)) if self._only is None else [self._only]

    def replaced(self) -> bool:
        """Whether the path leads to another folder by now, or to none."""
        for path in (self.path, backup_of(self.path)):
            with contextlib.suppress(OSError):
                return not os.path.samestat(os.stat(path), os.fstat(self._fd))
        return True

    def open(self, name: str) -> BinaryIO:
        """Open a regular file of this folder.

        Raises
        ------
        MissingFileError, DamagedFileError, OutsideFolderError
        """
        self.check_name(name)
        self._check_link(name)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)  # a FIFO must not block
        except FileNotFoundError:
            raise MissingFileError(f"{self.path}: there is no {shown(name)}") from None
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a possible file name"
            raise MissingFileError(f"{self.path}/{shown(name)}: cannot be opened: {reason}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise DamagedFileError(f"{self.path}/{name}: not a regular file")
        return os.fdopen(fd, "rb")

    def check_name(self, name: str) -> None:
        """Raise OutsideFolderError unless `name` is a plain name, which cannot lead out of the folder."""
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name or "\\" in name:
            raise OutsideFolderError(f"{self.path}: {shown(name)} is not the plain name of a file in this folder")

    def _check_link(self, name: str) -> None:
        """Refuse a symbolic link that leaves the folder; the Hugging Face cache's links to its blobs may."""
        try:
            link = os.readlink(name, dir_fd=self._fd)
        except (OSError, UnicodeError):
            return
        root = Path(os.path.realpath(self.path))
        target = Path(os.path.realpath(root / link))
        allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        if not any(target.is_relative_to(place) for place in allowed):
            raise OutsideFolderError(
                f"{self.path}/{name}: a symbolic link that leaves the folder, to {shown(str(target))}; "
                "put the file itself there"
            )

    def read_json(self, name: str, limit: int) -> dict[str, Any]:
        """Read a JSON object of at most `limit` bytes."""
        where = f"{self.path}/{name}"
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise DamagedFileError(f"{where}: {size:,} bytes; at most {limit:,} are read")
            if size == 0:
                raise DamagedFileError(f"{where}: the file is empty")
            return strict_json.parse(file.read(size), where)  # asked for more, it would make room for all of that


def read_whole(path: str | Path, read: Callable[[Folder], _T]) -> _T:
    """Return what `read` finds in the folder; a checkpoint replaced meanwhile is read again from the start."""
    for _ in range(_RETRIES):
        with Folder(path) as folder:
            try:
                return read(folder)
            except CheckpointError:
                if not folder.replaced():
                    raise
            except OSError as error:  # no right to list it, a failing disk, too many mappings
                raise MissingFileError(f"{path}: cannot be read: {error.strerror}") from error
    raise CheckpointError(f"{path}: is replaced by other saves faster than it can be read")
