"""Where a run's time goes: the compiler's seconds, and three steps through torch.profiler."""

import contextlib
import gzip
import json
import os
import tempfile
import time
from collections import Counter
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
    """Profile three steps of a run, from step `first` on, and nothing that happens between them.

    It writes a trace into `out_dir`, for ui.perfetto.dev or chrome://tracing, and on CUDA a picture
    of the memory, for pytorch.org/memory_viz. `say` prints a table of the largest kernels
    (operators on a CPU). Profiled steps are slower. What they compute does not change.
    """

    def __init__(self, first: int, out_dir: Path, device: str, say: Callable[[str], None]):
        self.first, self.out_dir, self.say = first, out_dir, say
        self.cuda = device == "cuda"
        self.profiles: list[torch.profiler.profile] = []  # of one step each
        self.finished = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the step inside the `with` block, if it is one of the three."""
        if self.finished or not self.first <= step < self.first + STEPS:
            yield
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        if self.cuda and not self.profiles:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
        # acc_events: without it torch 2.11 warns that it forgets earlier cycles; there are none
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            self.profiles.append(profile)
            with torch.profiler.record_function(f"step {step}"):
                yield
        if step == self.first + STEPS - 1:
            self.finish()

    def finish(self) -> None:
        """Write and print what was profiled: after the last of the steps, or where the run ends."""
        if self.finished:
            return
        self.finished = True
        if not self.profiles:
            last = self.first + STEPS - 1
            self.say(f"note: steps {self.first} to {last} were not run: nothing was profiled")
            return
        try:
            for line in largest(self.profiles, self.cuda):
                self.say(line)
            trace = self.out_dir / f"profile_{self.first:06d}.json.gz"
            write_atomically(trace, gzip.compress(joined_trace(self.profiles), 6))
            self.say(f"profile: {trace}, for ui.perfetto.dev or chrome://tracing")
            if self.cuda:
                snapshot = self.out_dir / f"memory_{self.first:06d}.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
                self.say(f"profile: {snapshot}, for pytorch.org/memory_viz")
        except (OSError, RuntimeError, ValueError) as error:  # the run is worth more
            self.say(f"warning: the profile could not be written ({error})")
        finally:
            self.profiles.clear()
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)


def joined_trace(profiles: list[torch.profiler.profile]) -> bytes:
    """Return the traces of several steps as one, in Chrome's JSON format."""
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for profile in profiles:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
            events = whole.get("traceEvents", []) + trace["traceEvents"]  # of one clock
            whole = {**trace, "traceEvents": events}
    return json.dumps(whole).encode()


def largest(profiles: list[torch.profiler.profile], cuda: bool) -> list[str]:
    """Return a table of the kernels that took most time; on a CPU, of the operators."""
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times, calls = Counter(), Counter()  # microseconds
    for event in (event for profile in profiles for event in profile.key_averages()):
        if event.device_type == device and not event.is_user_annotation:
            times[event.key] += event.self_device_time_total if cuda else event.self_cpu_time_total
            calls[event.key] += event.count
    steps, whole = len(profiles), times.total() or 1
    what = "kernel" if cuda else "operator"
    lines = [f"{'ms a step':>10}  {'share':>5}  {'calls a step':>12}  {what}"]
    for name, own in times.most_common(LARGEST):
        share, count = own / whole, calls[name] / steps
        lines.append(f"{own / steps / 1e3:10.2f}  {share:5.1%}  {count:12.1f}  {name[:80]}")
    return lines
