"""The command line of every script: flags from a dataclass, errors of one line, signals."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

# -----------------------------------------------------------------------------
# flags and errors


def run_command(config_class: type[Config], run: Callable[[Config], None]) -> None:
    """Parse the command line into `config_class` and call `run` with the result.

    A user's mistake (a flag that tyro refuses; ValueError or OSError from the configuration or
    from `run`) becomes one line on stderr, `<script>: error: <what>: <what to do>`, and exit
    code 2. Under torchrun only rank 0 prints it.
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
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
        end = next((i for i, line in enumerate(lines) if line.startswith("──") or not line), None)
        message = " ".join(lines[1:end])
        raised = f"Error parsing {config_class.__name__}: "
        if message.startswith(raised):  # the configuration raised it, and says what to do
            fail(script, message.removeprefix(raised))
        fail(script, message.rstrip(".") + f": see python {script} --help")
    except ValueError as error:
        fail(script, str(error))
    try:
        run(config)
    except (ValueError, OSError) as error:
        fail(script, explain(error))


@contextlib.contextmanager
def advice(what_to_do: str) -> Iterator[None]:
    """Add what to do to a ValueError or OSError from the block.

    Code in common/ says what failed. Only the command knows what its user can do about it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        error.add_note(what_to_do)
        raise


def explain(error: Exception) -> str:
    """Return an error's message and, after it, the advice that the command added."""
    return ": ".join([str(error), *getattr(error, "__notes__", [])])


def fail(script: str, message: str) -> None:
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

    The second signal of a kind has its usual effect: it ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), note)
    return received
