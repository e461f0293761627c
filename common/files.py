"""Files that are written whole or not at all, and the lock on a folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"  # end of a file's temporary name while it is written

# -----------------------------------------------------------------------------
# the lock on a folder


def take_lock(folder: Path) -> BinaryIO:
    """Create the folder and lock it until the returned file is closed or this process ends.

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
        lock.close()
        raise ValueError(f"{folder} is in use by another run ({error.strerror})") from None
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


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears under its name whole and on disk, or not at all.

    The data goes to a temporary file in the same folder. Renaming that file replaces the old one
    in one step, so a reader sees either the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut leaves an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if os.name != "nt":  # the new name must survive a power cut too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
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
