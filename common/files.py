"""Files that are written whole or not at all, and the lock on a folder."""

import contextlib
import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.cli import say

UNFINISHED = ".unfinished"  # end of a file's temporary name while it is written

# -----------------------------------------------------------------------------
# the lock on a folder

# another process has the lock: flock's answer, that of some network file systems, and of Windows
IN_USE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


def take_lock(folder: Path) -> BinaryIO:
    """Create the folder and lock it until the returned file is closed or this process ends.

    The system ends the lock of a killed process, on every node. A file that only exists while a run
    lives would not do that. So where the file system has no locks (Lustre mounted without flock,
    some FUSE, NFS without its lock service), there is a note and no lock.

    Raises OSError if the folder cannot be written, ValueError if another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror})") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in IN_USE:
            lock.close()
            raise ValueError(f"{folder} is in use by another run ({error.strerror})") from None
        no_locks = f"note: {folder} is on a file system without locks ({error.strerror})"
        say(f"{no_locks}: never start two runs in this folder")
    return lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder. Then remove the lock file, and new folders that stayed empty.

    Deletes the unfinished files of a killed process. While the lock is held, no other process
    writes them.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with take_lock(folder):
            for leftover in folder.glob(f".*{UNFINISHED}"):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    (folder / ".lock").unlink()
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


# -----------------------------------------------------------------------------
# atomic writes

# answers of a file system that has no fsync, or none for folders (SMB, VirtualBox, some FUSE). An
# error of the disk itself (EIO, ENOSPC, EDQUOT) is not among them.
NO_FSYNC = (
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES,
    errno.EBADF, errno.EISDIR,
)  # fmt: skip


def sync(file: int) -> None:
    """Wait until an open file or folder is on disk, if its file system can do that.

    `file` is its descriptor. Raises OSError if the disk fails or is full.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def replace(source: Path, target: Path) -> None:
    """Rename a file in one step, over an old one if there is one.

    Windows refuses while another process has the old file open. A virus scanner or an indexer lets
    it go after a moment.
    """
    for pause in (0.1, 0.2, 0.4, 0.8, 1.6) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    return os.replace(source, target)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears under its name whole and on disk, or not at all.

    The data goes to a temporary file in the same folder. Renaming that file replaces the old one
    in one step, so a reader sees either the old file or the new one, never a part. A symbolic link
    stays, and its target is replaced. A device, a pipe, or /dev/stdout is written to.
    """
    stream = {"/dev/stdout": sys.stdout, "/dev/stderr": sys.stderr}.get(str(path))
    if stream or (path.exists() and not path.is_file() and not path.is_dir()):
        if stream:
            stream.flush()
        with open(os.dup(stream.fileno()) if stream else path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            sync(file.fileno())  # before the rename: else a power cut leaves an empty file
        replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # The new name must survive a power cut too. Where a folder cannot be opened (Windows) or has no
    # fsync, the file is whole all the same.
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        sync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, *parts: bytes | memoryview) -> str:
    """Write a file, whole or not at all; return its sha256. Raises OSError that names the file."""
    digest = hashlib.sha256()
    try:
        with atomic_write(path) as file:
            for part in parts:
                file.write(part)
                digest.update(part)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
    return digest.hexdigest()
