"""Replace a folder as a whole: whatever happens, its path leads to the old contents or to the new ones, never a mix.

The new folder is written beside the old one and synchronised to the disk. Then `renameat2(RENAME_EXCHANGE)` swaps
the two in one step of the file system, and the old one is deleted. A checkpoint is several files that must agree
(config, shards, index, tokenizer, training state), so replacing them one by one would leave a moment in which they do
not; swapping their folder has none. Files that are in use stay alive until the last mapping of them is gone, so a
model may be saved over the very folder that it is mapped from.

Where the system cannot swap (no renameat2, some network file systems) the old folder is first renamed to a backup. A
process killed between the two renames leaves the backup only: readers then open it, and the next save puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from minimoe.checkpoint.errors import SaveError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h
_CANNOT_SWAP = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def write_folder_atomically(
    folder: str | Path, write: Callable[[Path], None], keep: Callable[[str], bool] = lambda name: False
) -> None:
    """Make `folder` hold exactly what `write` puts into the empty folder it is given, in one step.

    Parameters
    ----------
    folder : path
        A new folder, one to replace, or a link to one (the link stays). Missing parents are made. It takes room for
        both, and the right to write to the parent.
    write : called with a temporary folder beside the target
        If it raises, by Ctrl-C too, the target is as before.
    keep : called with the name of every entry of an old folder that `write` did not make
        True carries the entry over, by hard link.

    Raises
    ------
    SaveError
        If the target is a file, a mount point or the current directory, or the disk is full. The old contents are
        whole.
    """
    temporary, lock = None, None
    try:
        target = Path(os.path.realpath(folder))
        _check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        temporary, lock = _temporary(target)
        write(temporary)
        _carry_over(target, temporary, keep, _link)
        _synchronise(temporary)
        _swap(temporary, target)
        _carry_over(temporary, target, keep, os.rename)  # what was put into the old folder meanwhile
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"{folder}: cannot be saved: {reason}; what was there before is whole") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # the old contents by now, or the unfinished new ones
        if lock is not None:
            os.close(lock)


def backup_of(folder: Path) -> Path:
    """Where the old contents of `folder` are for a moment, where the system cannot swap folders."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.minimoe-replaced")


def _check_target(target: Path) -> None:
    if os.path.lexists(target) and not target.is_dir():
        kind = "a file" if target.is_file() else "a device or socket"
        raise SaveError(f"{target}: is {kind}; a checkpoint is saved as a folder")
    current = False
    with contextlib.suppress(FileNotFoundError):  # it may have been deleted
        current = Path.cwd().is_relative_to(target)
    if current or os.path.ismount(target):
        kind = "the current directory, or holds it" if current else "a mount point"
        raise SaveError(f"{target}: is {kind}, and cannot be replaced as a whole; save to another folder")
    if target.is_dir() and not os.access(target, os.W_OK):
        raise SaveError(f"{target}: is read-only")


def _prefix(target: Path) -> str:
    return f".{target.name}.minimoe-saving-"


def _clean_up(target: Path) -> None:
    """Put things right after saves whose process was killed."""
    backup = backup_of(target)
    with contextlib.suppress(OSError):  # nothing to do, or another process does it now
        if target.exists():
            shutil.rmtree(backup)
        else:
            os.rename(backup, target)
    for name in os.listdir(target.parent):
        if name.startswith(_prefix(target)):
            with contextlib.suppress(OSError):
                fd = os.open(target.parent / name, _FOLDER)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a running save holds it, a killed one does not
                    shutil.rmtree(target.parent / name, ignore_errors=True)
                finally:
                    os.close(fd)


def _temporary(target: Path) -> tuple[Path, int]:
    """Make an empty folder beside the target, locked for as long as this process works in it."""
    while True:
        temporary = target.with_name(_prefix(target) + secrets.token_hex(8))
        temporary.mkdir()  # follows the umask, as its files will
        with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover before it was locked
            lock = os.open(temporary, _FOLDER)
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes what cannot be locked
                fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            if os.path.samestat(os.fstat(lock), temporary.stat()):
                return temporary, lock


def _carry_over(old: Path, new: Path, keep: Callable[[str], bool], place: Callable[[Path, Path], None]) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # there is no old folder
        for name in os.listdir(old):
            if keep(name) and not os.path.lexists(new / name):
                place(old / name, new / name)


def _link(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link_file)
    else:
        _link_file(old, new)


def _link_file(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # another device, or a file system without hard links
        shutil.copy2(old, new, follow_symlinks=False)


def _synchronise(folder: Path) -> None:
    """Wait until the folder, and all below it, has reached the disk."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                _fsync(path)


def _fsync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; afterwards the old contents, if any, are where `new` was."""
    try:
        os.rename(new, target)  # where there is no target, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, target):
            backup = backup_of(target)
            os.rename(target, backup)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(backup, target)
                raise
            os.rename(backup, new)
    _fsync(target.parent)  # the rename itself


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(b))
