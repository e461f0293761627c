"""common/files.py: files are put in place whole or not at all, and one process locks a folder."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from common.files import UNFINISHED, atomic_write, locked, replace, take_lock, write_atomically

ADVICE = ("--", ".py", "carry on", "make room", "command", "out_dir", "choose", "delete")


def message(error: pytest.ExceptionInfo, path: Path) -> str:
    """Return what the error says about `path`. Only a command may add advice."""
    start, text = str(error.value)[: len(str(path))], str(error.value)[len(str(path)) :]
    assert start == str(path)
    assert not any(words in text for words in ADVICE), text
    assert not getattr(error.value, "__notes__", [])
    return text


# -----------------------------------------------------------------------------
# atomic writes


def test_a_file_is_put_in_place_by_renaming_and_never_by_copying(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        with atomic_write(path) as file:
            file.write(b"new contents")
            written = os.fstat(file.fileno())
            assert path.read_bytes() == b"old"
        assert reader.read() == b"old", "a reader of the old file must not see the new bytes"
    now = path.stat()
    assert (now.st_dev, now.st_ino) == (written.st_dev, written.st_ino), "the file was copied"
    assert path.read_bytes() == b"new contents"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failure_at_any_moment_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, fails):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    if fails != "write":
        monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no space"), atomic_write(path) as file:
        file.write(b"half of the new")
        if fails == "write":
            fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_data_is_on_disk_before_the_rename_and_the_new_name_after_it(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_fsync(number: int) -> None:
        what = os.fstat(number)
        calls.append("fsync folder" if stat.S_ISDIR(what.st_mode) else f"fsync {what.st_size}")
        fsync(number)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"12345")  # small enough to stay in Python's buffer until it is flushed
    assert calls == ["fsync 5", "replace file", "fsync folder"]


def refuse(number: int) -> Callable:
    """A call that always fails with this error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


NO_FSYNC = ["EINVAL", "EPERM", "ENOTSUP", "ENOSYS", "EBADF", "EACCES"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", [*NO_FSYNC, "EIO", "ENOSPC", "EDQUOT"])
def test_a_file_is_written_where_there_is_no_fsync_but_not_if_the_disk_fails(
    tmp_path, monkeypatch, kind, name
):
    fsync, number = os.fsync, getattr(errno, name)

    def sometimes(file: int) -> None:
        (refuse(number) if stat.S_ISDIR(os.fstat(file).st_mode) == (kind == "folder") else fsync)(
            file
        )

    monkeypatch.setattr(os, "fsync", sometimes)
    with (
        contextlib.nullcontext() if name in NO_FSYNC else pytest.raises(OSError, match="cannot be")
    ):
        write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "file").exists() == (name in NO_FSYNC or kind == "folder")


def test_a_file_is_written_into_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", refuse(errno.EACCES))  # files are opened by another call
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_windows_waits_a_moment_for_the_reader_of_an_old_file(tmp_path, monkeypatch):
    pauses, tries, real = [], [], os.replace

    def busy(*paths: Path) -> None:
        tries.append(paths)
        (refuse(errno.EACCES) if len(tries) < 3 else real)(*paths)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(time, "sleep", pauses.append)
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(PermissionError):
        replace(tmp_path / "a", tmp_path / "b")
    assert pauses == [], "elsewhere it means that the folder cannot be written"
    tries.clear()
    monkeypatch.setattr("common.files.os", WINDOWS := types.SimpleNamespace(**vars(os)))
    WINDOWS.name = "nt"
    replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    assert pauses == [0.1, 0.2]
    monkeypatch.setattr(WINDOWS, "replace", refuse(errno.EACCES))
    with pytest.raises(PermissionError):
        replace(tmp_path / "b", tmp_path / "a")
    assert sum(pauses[2:]) < 4


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("target")
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "link"}


def test_a_link_to_itself_is_no_traceback(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with contextlib.suppress(OSError):  # refused or replaced
        write_atomically(tmp_path / "a", b"new")


def test_dev_stdout_is_written_where_stdout_is(tmp_path):
    code = "import pathlib, common.files as f; print('first')\n"
    code += "f.write_atomically(pathlib.Path('/dev/stdout'), b'second\\n'); print('third')"
    out = tmp_path / "out"
    out.write_text("before\n")
    with open(out, "a") as file:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file, check=True)
    assert out.read_text().split() == ["before", "first", "second", "third"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"new")
    assert os.read(reader, 9) == b"new" and pipe.is_fifo()
    os.close(reader)


def test_write_atomically_joins_its_parts_and_returns_their_sha256(tmp_path):
    whole = b"header" + bytes(range(100))
    digest = write_atomically(tmp_path / "file", b"header", memoryview(bytes(range(100))))
    assert (tmp_path / "file").read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()


def test_write_atomically_says_only_what_failed(tmp_path):
    path = tmp_path / "none" / "file"
    with pytest.raises(OSError, match="cannot be written") as error:
        write_atomically(path, b"data")
    assert message(error, path) == f" cannot be written ({os.strerror(errno.ENOENT)})"


# -----------------------------------------------------------------------------
# the lock


def test_locked_says_only_what_failed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written") as error, locked(tmp_path / "file"):
        pass
    reason = os.strerror(errno.EEXIST)
    assert message(error, tmp_path / "file") == f" cannot be written ({reason})"
    with locked(tmp_path):
        with pytest.raises(ValueError, match="in use by another run") as error, locked(tmp_path):
            pass
        reason = os.strerror(errno.EAGAIN)
        text = f" is in use by another run ({reason})"
        assert message(error, tmp_path) == text
        assert (tmp_path / ".lock").exists(), "the one who was refused must leave the lock alone"


def test_the_lock_is_free_after_an_error_and_when_its_file_is_closed(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    lock = take_lock(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        take_lock(tmp_path)
    lock.close()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EIO"])
def test_a_file_system_without_locks_is_no_folder_in_use(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(fcntl, "flock", refuse(getattr(errno, name)))
    (tmp_path / f".killed{UNFINISHED}").touch()
    with locked(tmp_path / "new"), locked(tmp_path):
        assert not (tmp_path / f".killed{UNFINISHED}").exists()
    reason = os.strerror(getattr(errno, name))
    for folder, line in zip((tmp_path / "new", tmp_path), capsys.readouterr().out.splitlines()):  # noqa: B905
        assert line == f"note: {folder} is on a file system without locks ({reason}): " + (
            "never start two runs in this folder"
        )
    assert os.listdir(tmp_path) == [], "no lock file may stay, and stop the next run"


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EACCES"])
def test_a_lock_that_another_process_has_is_a_folder_in_use(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", refuse(getattr(errno, name)))
    with pytest.raises(ValueError, match="in use by another run"):
        take_lock(tmp_path)


def test_locked_leaves_no_lock_file_and_no_new_empty_folder(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new/deep", "kept/deep"):
        with locked(tmp_path / name):
            assert (tmp_path / name / ".lock").exists()
            if name == "kept/deep":
                (tmp_path / name / "file").touch()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["kept", "kept/deep", "kept/deep/file", "old"]


def test_locked_deletes_the_unfinished_files_of_a_killed_process_and_nothing_else(tmp_path):
    for name in (f".shard.npy{UNFINISHED}", "shard.npy", ".hidden", f"named{UNFINISHED}"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        assert not (tmp_path / f".shard.npy{UNFINISHED}").exists()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden", f"named{UNFINISHED}", "shard.npy"]
