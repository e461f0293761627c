"""common/cli.py: every mistake is one line that says what to do, and signals are collected."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.cli import advice, collect_stop_signals, explain, fail, plain, run_command, say


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


def test_only_rank_0_prints_an_error(error_of, monkeypatch):
    def run(config: Config) -> None:
        raise ValueError("wrong")

    monkeypatch.setenv("RANK", "1")
    assert error_of(run) == ""
    monkeypatch.setenv("RANK", "0")
    assert error_of(run) == "script.py: error: wrong\n"


# -----------------------------------------------------------------------------
# flags


def test_flags_become_the_configuration(monkeypatch):
    configs = []
    for name in ("--steps", "--out"):
        monkeypatch.setattr(sys, "argv", ["script.py", name, "5"])
        run_command(Config, configs.append)
    assert configs == [Config(steps=5), Config(out=Path("5"))]


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


def test_the_first_signal_is_collected_and_the_second_ends_the_process():
    received = collect_stop_signals()
    assert received == []
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGUSR1, signal.SIGTERM]
    script = (
        "import signal\nfrom common.cli import collect_stop_signals\n"
        "received = collect_stop_signals()\nsignal.raise_signal(signal.SIGTERM)\n"
        "print(len(received), flush=True)\nsignal.raise_signal(signal.SIGTERM)\nprint('alive')\n"
    )
    root = Path(__file__).parent.parent
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, cwd=root, env={**os.environ}, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("1\n", -signal.SIGTERM)
