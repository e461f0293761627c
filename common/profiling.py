"""Where a run's time goes: the compiler's seconds, and three steps through torch.profiler."""

import contextlib
import gzip
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomically

STEPS = 3  # profiled steps: the first one may still warm something up
LARGEST = 15  # rows of the table

# -----------------------------------------------------------------------------
# a clock that knows the compiler


class Clock:
    """Measure laps, and how much of each was spent in torch.compile.

    Compiling happens inside the first passes: forward, backward, and again for evaluation.
    """

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.compiling = 0.0  # seconds in this lap
        self.started: float | None = None  # when the compiler began, while it works
        self.handler: Any = None

    def watch_compiler(self) -> None:
        """Count the compiler's time from now on, until `close`."""
        from torch._dynamo.callback import callback_handler  # torch has no public way to ask

        self.handler = callback_handler
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def lap(self) -> tuple[float, float]:
        """Return the seconds since the last lap, and those of them that were spent compiling."""
        now = time.perf_counter()
        seconds, compiling = now - self.last, self.compiling
        self.last, self.compiling = now, 0.0
        return seconds, compiling

    def close(self) -> None:
        if self.handler is not None:
            self.handler.remove_start_callback(self._start)
            self.handler.remove_end_callback(self._end)
            self.handler = None

    def _start(self, _: Any) -> None:
        self.started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.compiling += time.perf_counter() - self.started


# -----------------------------------------------------------------------------
# three steps, looked at closely


class StepProfiler:
    """Profile three steps of a run, from step `first` on.

    It writes a trace into `out_dir`, for ui.perfetto.dev or chrome://tracing, and on CUDA a picture
    of the memory, for pytorch.org/memory_viz. `say` prints a table of the largest kernels
    (operators on a CPU). Profiled steps are slower. What they compute does not change.
    """

    def __init__(self, first: int, out_dir: Path, device: str, say: Callable[[str], None]):
        self.first, self.out_dir, self.say = first, out_dir, say
        self.cuda = device == "cuda"
        self.profile: torch.profiler.profile | None = None
        self.steps = 0  # profiled so far

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the step inside the `with` block, if it is one of the three."""
        if not self.first <= step < self.first + STEPS:
            yield
            return
        if self.profile is None:
            self._start()
        with torch.profiler.record_function(f"step {step}"):
            yield
        self.steps += 1
        if step == self.first + STEPS - 1:
            self.finish()

    def finish(self) -> None:
        """Write and print what was profiled, after the last of the steps or where the run ends."""
        if self.profile is None:
            if not self.steps:
                last = self.first + STEPS - 1
                self.say(f"note: steps {self.first} to {last} were not run: nothing was profiled")
            return
        profile, self.profile = self.profile, None
        profile.stop()
        for line in largest(profile, self.cuda, max(1, self.steps)):
            self.say(line)
        try:
            trace = self.out_dir / f"profile_{self.first:06d}.json.gz"
            with tempfile.TemporaryDirectory() as folder:
                raw = Path(folder, "trace.json")
                profile.export_chrome_trace(str(raw))
                write_atomically(trace, gzip.compress(raw.read_bytes(), 6))
            self.say(f"profile: {trace}, for ui.perfetto.dev or chrome://tracing")
            if self.cuda:
                snapshot = self.out_dir / f"memory_{self.first:06d}.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
                self.say(f"profile: {snapshot}, for pytorch.org/memory_viz")
        except OSError as error:  # the run is worth more
            self.say(f"warning: the profile could not be written ({error}): make room")
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.profile = torch.profiler.profile(activities=kinds)
        self.profile.start()


def largest(profile: torch.profiler.profile, cuda: bool, steps: int) -> list[str]:
    """Return a table of the kernels that took most time; on a CPU, of the operators."""
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    rows = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key)
        for e in profile.key_averages()
        if e.device_type == device and not e.is_user_annotation
    ]  # microseconds
    total = sum(row[0] for row in rows) or 1
    what = "kernel" if cuda else "operator"
    head = f"{'ms a step':>10}  {'share':>5}  {'calls a step':>12}  {what}"
    return [
        head,
        *(
            f"{time / steps / 1e3:10.2f}  {time / total:5.1%}  {count / steps:12.1f}  {name[:80]}"
            for time, count, name in sorted(rows, reverse=True)[:LARGEST]
        ),
    ]
