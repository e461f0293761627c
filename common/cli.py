"""The command line of every script: flags from a dataclass, one-line errors, signals."""

import contextlib
import dataclasses
import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

Config = TypeVar("Config")

# -----------------------------------------------------------------------------
# flags and errors


def run_command(
    config_class: type[Config],
    run: Callable[[Config], None],
    fail_with: Callable[[str, str], NoReturn] | None = None,
) -> None:
    """Parse the command line into `config_class` and call `run` with the result.

    A user's mistake is a flag that tyro refuses, or a ValueError or OSError from the configuration
    or from `run`. It becomes one line on stderr, `<script>: error: <what>: <what to do>`, and exit
    code 2. A command of several ranks gives `ranks.fail`, so that only one of them prints the
    line. Other exceptions are bugs and pass through.
    """
    import tyro

    fail_with = fail_with or fail
    escape_characters("stdout", "stderr")
    script = Path(sys.argv[0]).name
    complaint = io.StringIO()  # tyro draws its errors as a box: catch it and print one line instead
    # An error must not be broken, not even inside a path; help is, and tyro hangs below 6 columns.
    helping = {"-h", "--help"} & {*sys.argv}
    columns = max(40, shutil.get_terminal_size().columns) if helping else 100_000
    try:
        with contextlib.redirect_stderr(complaint), environment({"COLUMNS": str(columns)}):
            config = tyro.cli(  # the help shows --max_steps; --max-steps works too
                config_class, prog=script, registry=path_flags(), use_underscores=True
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = boxed_message(complaint.getvalue())
        raised = f"Error parsing {config_class.__name__}: "
        if message.startswith(raised):  # from the configuration, which says what to do
            fail_with(script, message.removeprefix(raised))
        fail_with(script, message.rstrip(".") + f": see python {script} --help")
    except (ValueError, OSError) as error:
        fail_with(script, str(error))
    for name, value in vars(config).items():  # a list: tyro would keep only the last one
        flags = (f"--{name}", f"--{name.replace('_', '-')}")
        if isinstance(value, tuple) and sum(a.split("=")[0] in flags for a in sys.argv) > 1:
            fail_with(script, f"{flags[0]} is given twice: give all its values after one")
    try:
        run(config)
    except (ValueError, OSError) as error:
        fail_with(script, explain(error))
    except MemoryError as error:  # numpy says how much, Python nothing
        what = f"not enough memory ({error})" if str(error) else "not enough memory"
        fail_with(script, f"{what}: give smaller numbers, or end other programs")


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Set environment variables in the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def path_flags() -> Any:
    """Return tyro's rule for flags that are paths: `~` is the home folder, `~name` that of a user.

    The shell does not expand it in `--out_dir=~/log`, and without the rule a folder `~` appears.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    def home(words: list[str]) -> Path:
        if not words[0]:  # not the current folder: "$UNSET" is a mistake
            raise OSError("a path is empty: write one, or leave its flag out")
        try:
            return Path(words[0]).expanduser()
        except RuntimeError:  # not a ValueError, whose text tyro would drop
            raise OSError(f"{words[0]}: no such user: write the whole path") from None

    registry = ConstructorRegistry()
    spec = PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=home,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )  # fmt: skip
    registry.primitive_rule(lambda info: spec if info.type is Path else None)
    return registry


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """End the process with code 130, as a shell expects, if Ctrl-C interrupts the block."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def boxed_message(box: str) -> str:
    """Return the message in a box of tyro as one line, without title, frame, hints and footer."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    # A line of ─ ends the message. If stdout is not UTF-8, tyro draws with - and puts such a line
    # before the message too.
    runs = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯")))
    return " ".join(next((run for is_text, run in runs if is_text), ()))


@contextlib.contextmanager
def advice(
    what_to_do: str, kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Add what to do to an error of these kinds from the block.

    Code in common/ says what failed. Only the command knows what its user can do about it.
    """
    try:
        yield
    except kinds as error:
        error.add_note(what_to_do)
        raise


def explain(error: Exception) -> str:
    """Return an error's message, then the advice that the command added, each text once."""
    notes = getattr(error, "__notes__", [])
    message = str(error).rstrip(". ") if notes else str(error)
    return ": ".join(dict.fromkeys([message, *notes]))


def fail(script: str, message: str) -> NoReturn:
    """Print an error as one line and exit with code 2."""
    print_error(script, message)
    sys.exit(2)


def print_error(script: str, message: str) -> None:
    """Print an error as one line on stderr."""
    print(f"{script}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as a dict of plain types, for JSON and for checkpoints."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


# -----------------------------------------------------------------------------
# output and signals


class LossyStream:
    """A text stream that loses what it cannot write, instead of raising OSError."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def outlive_console(*streams: str) -> None:
    """Let this process go on when nobody can read its `streams` (stdout, stderr) any more.

    A closed terminal gives EIO, a pipe without a reader EPIPE, a log file on a full disk ENOSPC, to
    every line, progress bar and warning, and to Python itself, which then exits with code 120. For
    a long run the console is only a report. It must not end the run, and a character that the
    console lacks must not either.
    """
    escape_characters(*streams)
    for name in streams:
        setattr(sys, name, LossyStream(getattr(sys, name)))


def escape_characters(*streams: str) -> None:
    """Let `streams` (stdout, stderr) write a character that their encoding lacks as \\u6771.

    On Windows a redirected stream has the 250 characters of cp1252. The text of a model has more.
    A stream that is closed (`>&-`) loses what is written to it.
    """
    for name in streams:
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Print a line without breaking the progress bar."""
    from tqdm import tqdm

    tqdm.write(message)
    sys.stdout.flush()


def collect_stop_signals() -> list[int]:
    """Return a list that collects SIGTERM, SIGINT, SIGUSR1 and SIGHUP as they arrive.

    A second SIGINT, which is Ctrl-C, ends the process at once. The others often arrive twice, and
    the second one changes nothing: the shell and the kernel send SIGHUP when a terminal is closed,
    a batch system sends SIGTERM to torchrun and to the ranks, and torchrun passes it on. SIGHUP
    stays ignored if it was ignored at the start, as under nohup.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if not hasattr(signal, name):  # Windows has no SIGUSR1 and no SIGHUP
            continue
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return received
