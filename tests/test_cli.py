"""common/cli.py: every mistake is one line that says what to do, and signals are collected."""

import dataclasses
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from conftest import ROOT
from tyro.conf import Positional

from common.cli import (
    LossyStream,
    advice,
    collect_stop_signals,
    explain,
    fail,
    outlive_console,
    plain,
    run_command,
    say,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A command for the tests."""

    steps: int = 3  # number of steps
    out: Path | None = None  # a file

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}: make it 1 or more")


@pytest.fixture(params=["utf-8", "ascii"])
def boxes(request, monkeypatch) -> None:
    """Both forms of tyro's error boxes: it draws them by the encoding of stdout."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=request.param)
    monkeypatch.setattr(sys, "stdout", stdout)


@pytest.fixture
def error_of(monkeypatch, capsys) -> Callable[..., str]:
    """A function that runs a command that must fail with exit code 2, and returns its stderr."""

    def error_of(run: Callable[[Config], None], *args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["/some/where/script.py", *args])
        with pytest.raises(SystemExit) as stop:
            run_command(Config, run)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return error_of


def never(config: Config) -> None:
    raise AssertionError("a bad command line must not run")


# -----------------------------------------------------------------------------
# errors and advice


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, UnicodeError])
def test_advice_is_added_to_the_one_line(error_of, kind):
    def run(config: Config) -> None:
        with advice("make room"):
            raise kind("disk is full")

    assert error_of(run) == "script.py: error: disk is full: make room\n"


def test_an_error_without_advice_is_printed_as_it_is(error_of):
    def run(config: Config) -> None:
        raise ValueError("--steps is odd: give an even one")

    assert error_of(run) == "script.py: error: --steps is odd: give an even one\n"


def test_advice_without_an_error_does_nothing(capsys):
    with advice("make room"):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_same_advice_never_appears_twice(error_of):
    def run(config: Config) -> None:
        error = OSError("disk is full")
        for _ in range(2):  # the same error again, as when it is kept and raised later
            with pytest.raises(OSError), advice("make room"), advice("make room"):
                raise error
        with advice("or stop"):
            raise error

    assert error_of(run) == "script.py: error: disk is full: make room: or stop\n"


def test_advice_can_depend_on_the_kind_of_error(error_of):
    def run_with(error: Exception) -> Callable[[Config], None]:
        def run(config: Config) -> None:
            with advice("wait", ValueError), advice("choose another", OSError):
                raise error

        return run

    assert error_of(run_with(ValueError("in use"))) == "script.py: error: in use: wait\n"
    assert (
        error_of(run_with(FileNotFoundError("gone"))) == "script.py: error: gone: choose another\n"
    )


def test_a_full_stop_before_the_advice_is_dropped(error_of):
    def run(config: Config) -> None:
        with advice("give another"):
            raise OSError("The port is in use.")

    assert error_of(run) == "script.py: error: The port is in use: give another\n"


def test_explain_gives_the_message_before_the_advice():
    error = ValueError("damaged")
    assert explain(error) == "damaged"
    error.add_note("restore it")
    assert explain(error) == "damaged: restore it"


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_bugs_keep_their_traceback(monkeypatch, kind):
    raised = kind("a bug")

    def run(config: Config) -> None:
        with advice("make room"):
            raise raised

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(kind) as error:
        run_command(Config, run)
    assert error.value is raised
    assert not hasattr(raised, "__notes__")


def test_an_error_of_many_lines_is_printed_as_one(capsys):
    with pytest.raises(SystemExit):
        fail("script.py", "one\n  two\n\nthree")
    assert capsys.readouterr().err == "script.py: error: one two three\n"


def test_a_rank_in_the_environment_does_not_silence_a_command_that_runs_alone(
    error_of, monkeypatch
):
    def run(config: Config) -> None:
        raise ValueError("wrong")

    monkeypatch.setenv("RANK", "1")  # of a pod or a job in which somebody types the command
    assert error_of(run) == "script.py: error: wrong\n"


def test_a_command_of_several_ranks_prints_its_errors_its_own_way(monkeypatch):
    told = []

    def fail_with(script: str, message: str) -> NoReturn:
        told.append(message)
        sys.exit(2)

    def run(config: Config) -> None:
        raise ValueError("wrong")

    for argv, message in ((["--steps", "5"], "wrong"), (["--nothing"], "nrecognized")):
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        with pytest.raises(SystemExit):
            run_command(Config, run, fail_with)
        assert message in told.pop()


# -----------------------------------------------------------------------------
# flags


def test_flags_become_the_configuration(monkeypatch):
    configs = []
    for name in ("--steps", "--out"):
        monkeypatch.setattr(sys, "argv", ["script.py", name, "5"])
        run_command(Config, configs.append)
    assert configs == [Config(steps=5), Config(out=Path("5"))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """A command with paths of every kind."""

    runs: Positional[tuple[Path, ...]]  # folders
    out_dir: Path = Path("log")  # a folder
    data: Path | None = None  # a file that must exist
    prompt: str = ""  # text

    def __post_init__(self):
        if self.data and not self.data.exists():
            raise ValueError(f"{self.data}: no such file: check --data")


def test_a_tilde_in_a_path_is_the_home_folder_and_in_text_it_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").touch()
    configs = []
    args = ["~/a", "b", "c/~/d", "--out_dir=~/x y", "--data", "~/d", "--prompt", "~/d"]
    monkeypatch.setattr(sys, "argv", ["script.py", *args])
    run_command(Paths, configs.append)
    assert configs == [
        Paths(
            runs=(tmp_path / "a", Path("b"), Path("c/~/d")), out_dir=tmp_path / "x y",
            data=tmp_path / "d", prompt="~/d",
        )
    ]  # fmt: skip


def test_a_path_in_the_home_of_an_unknown_user_is_one_line(error_of):
    path = "~nobody-of-this-name/x"
    line = f"script.py: error: {path}: no such user: write the whole path\n"
    assert error_of(never, "--out", path) == line


def test_an_empty_path_is_no_path_to_the_current_folder(error_of):
    line = "script.py: error: a path is empty: write one, or leave its flag out\n"
    assert error_of(never, "--out", "") == line


def test_a_path_in_an_error_is_whole_on_a_narrow_terminal(error_of, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Refusing:
        out: Path

        def __post_init__(self):
            raise ValueError(f"{self.out}: no such file")

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setitem(globals(), "Config", Refusing)
    path = "/" + "long" * 60
    assert error_of(never, "--out", path) == f"script.py: error: {path}: no such file\n"
    assert os.environ["COLUMNS"] == "20"


def test_too_little_memory_is_one_line(error_of):
    def run(_: Config) -> None:
        np.empty(1 << 62, np.uint8)

    error = error_of(run)
    assert error.startswith("script.py: error: not enough memory (Unable to allocate 4.00 EiB")
    assert error.endswith(": give smaller numbers, or end other programs\n")


def test_help_needs_no_open_stdout_and_no_wide_terminal():
    help = f"COLUMNS=1 {sys.executable} sample.py --help >&-"
    ended = subprocess.run(help, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_bad_flag_is_one_line_that_points_to_the_help(error_of, boxes):
    for args in (["--stepz", "5"], ["--steps", "five"], ["--steps"], ["extra"]):
        error = error_of(never, *args)
        assert error.count("\n") == 1
        assert error.startswith("script.py: error: ")
        assert error.endswith(": see python script.py --help\n")
        assert not set("│╭╰─") & set(error), "no part of a box"
        assert "---" not in error
        assert "number of steps" not in error, "no help text"
    assert "five" in error_of(never, "--steps", "five")


def test_an_error_of_the_configuration_is_printed_as_it_is(error_of, boxes):
    line = "script.py: error: --steps is 0: make it 1 or more\n"
    assert error_of(never, "--steps", "0") == line


def test_help_prints_the_comment_of_each_field_and_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_command(Config, never)
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "number of steps" in output
    assert "A command for the tests." in output


def test_plain_holds_only_types_that_json_and_checkpoints_allow():
    assert plain(Config(out=Path("a/b"))) == {"steps": 3, "out": str(Path("a/b"))}
    assert plain(Config()) == {"steps": 3, "out": None}


# -----------------------------------------------------------------------------
# output and signals


def test_say_prints_a_line(capsys):
    say("one line")
    assert capsys.readouterr().out == "one line\n"


SIGNALS = """
import signal, sys
from common.cli import collect_stop_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
received = collect_stop_signals()
for name in sys.argv[1:]:
    signal.raise_signal(getattr(signal, name))
print([signal.Signals(number).name for number in received])
"""


def after_signals(*names: str) -> tuple[str, int]:
    """Raise signals in a process that collects them; return its output and its exit code."""
    words = [sys.executable, "-c", SIGNALS, *names]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip(), result.returncode


def test_signals_are_collected_and_a_repeated_one_changes_nothing():
    # shell and kernel, or a batch system and torchrun, send the same signal
    names = ["SIGUSR1", "SIGTERM", "SIGHUP"]
    assert after_signals(*names * 3) == (str(names), 0)


def test_a_second_interrupt_ends_the_process():
    assert after_signals("SIGINT") == ("['SIGINT']", 0)
    assert after_signals("SIGINT", "SIGINT") == ("", -signal.SIGINT)


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    received = collect_stop_signals()
    signal.raise_signal(signal.SIGHUP)
    assert received == []


REPORTS = """
import sys, warnings
from tqdm import tqdm
from common.cli import outlive_console, say
outlive_console("stdout", "stderr")
for stream in (sys.stdout, sys.stderr):
    with tqdm(total=1000, file=stream, mininterval=0) as bar:
        for n in range(1000):  # more than any buffer holds
            bar.update()
            print("a line", file=stream, flush=n % 2 == 0)
            say("a line above the bar")
            warnings.warn(f"warning {n}")
open(sys.argv[1], "w").write("all work is done")
"""


def broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("console", [broken_pipe, full_disk, closed_terminal, None])
def test_a_process_goes_on_and_succeeds_when_nobody_can_read_its_output(tmp_path, console):
    words = [sys.executable, "-c", REPORTS, str(tmp_path / "result")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if console is None:  # started with stdout and stderr closed: Python has None for them
        words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    output = console() if console else None
    process = subprocess.run(words, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=60)
    if console:
        os.close(output)
    assert process.returncode == 0, "120: Python could not flush at exit"
    assert (tmp_path / "result").read_text() == "all work is done"


def test_a_console_that_can_be_written_again_shows_the_next_lines():
    read, write = os.pipe()
    os.set_blocking(write, False)  # full: EAGAIN
    with open(write, "w") as file, open(read) as reader:
        console = LossyStream(file)
        for n in range(10_000):
            print(f"line {n} of many", file=console, flush=True)
        assert os.read(read, 1 << 20).startswith(b"line 0 of many")
        print("there is room again", file=console, flush=True)
        file.close()
        assert reader.read().endswith("there is room again\n")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_character_that_the_console_does_not_have_is_escaped(monkeypatch, encoding):
    text = "na\u00efve, \u6771\u4eac \U0001f642, a file name \udcff"

    def run(config: Config) -> None:
        print(text)
        say(text)
        raise ValueError(text)

    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for prepare in (lambda: None, lambda: outlive_console("stdout", "stderr")):
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            stream.reconfigure(errors="strict")  # as Python starts a command
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["script.py"])
        prepare()
        with pytest.raises(SystemExit):
            run_command(Config, run)
    for stream in streams:
        stream.flush()
    shown = text.encode(encoding, "backslashreplace")
    assert streams[0].buffer.getvalue() == (shown + b"\n") * 4
    assert streams[1].buffer.getvalue() == (b"script.py: error: " + shown + b"\n") * 2
