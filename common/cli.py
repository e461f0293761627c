"""The command line of every script: flags from a dataclass, one-line errors, signals."""

import contextlib
import dataclasses
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

# -----------------------------------------------------------------------------
# flags and errors


def run_command(config_class: type[Config], run: Callable[[Config], None]) -> None:
    """Parse the command line into `config_class` and call `run` with the result.

    A user's mistake is a flag that tyro refuses, or a ValueError or OSError from the configuration
    or from `run`. It becomes one line on stderr, `<script>: error: <what>: <what to do>`, and exit
    code 2. Under torchrun only rank 0 prints the line. Other exceptions are bugs and pass through.
    """
    import tyro

    script = Path(sys.argv[0]).name
    complaint = io.StringIO()  # tyro draws its errors as a box: catch it and print one line instead
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_class, prog=script)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message = boxed_message(complaint.getvalue())
        raised = f"Error parsing {config_class.__name__}: "
        if message.startswith(raised):  # from the configuration, which says what to do
            fail(script, message.removeprefix(raised))
        fail(script, message.rstrip(".") + f": see python {script} --help")
    except ValueError as error:
        fail(script, str(error))
    try:
        run(config)
    except (ValueError, OSError) as error:
        fail(script, explain(error))


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
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as a dict of plain types, for JSON and for checkpoints."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


# -----------------------------------------------------------------------------
# output and signals


def say(message: str) -> None:
    """Print a line without breaking the progress bar."""
    from tqdm import tqdm

    tqdm.write(message)
    sys.stdout.flush()


def collect_stop_signals() -> list[int]:
    """Return a list that collects SIGTERM, SIGINT and SIGUSR1 as they arrive.

    A second signal of the same kind has its default effect: it ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), note)
    return received
