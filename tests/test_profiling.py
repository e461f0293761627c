"""common/profiling.py: the compiler's time, and three steps through torch.profiler."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import full_disk, losses, read_metrics, run_train

import train_gpt2
from common import checkpoint, profiling
from common.profiling import Clock, StepProfiler, largest

# -----------------------------------------------------------------------------
# the clock


def test_the_compiler_is_counted_once_and_only_until_the_clock_is_closed():
    def slow_backend(graph, inputs):
        time.sleep(0.3)
        return graph.forward

    @torch.compile(backend=slow_backend, dynamic=False)
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    sizes = iter(range(3, 9))

    def compile_it() -> tuple[float, float]:
        function(torch.ones(next(sizes)))  # another shape is compiled again
        return clock.lap()

    clock = Clock()
    assert compile_it()[1] == 0.0, "nobody has asked"
    clock.watch_compiler()
    seconds, compiling = compile_it()
    assert 0.3 <= compiling <= seconds
    assert clock.lap()[1] == 0.0, "counted once"
    clock.close()
    assert compile_it()[1] == 0.0


def test_the_parts_of_a_run_add_up_to_its_time(data_dir, tmp_path, monkeypatch):
    def slow(function, seconds):
        def later(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)

        return later

    monkeypatch.setattr(train_gpt2, "train_step", slow(train_gpt2.train_step, 0.1))
    monkeypatch.setattr(train_gpt2, "validation_loss", slow(train_gpt2.validation_loss, 0.2))
    monkeypatch.setattr(checkpoint, "write_checkpoint", slow(checkpoint.write_checkpoint, 0.3))
    start = time.perf_counter()
    run_train(data_dir, tmp_path, max_steps=4, eval_every=2, checkpoint_every=2)
    whole = time.perf_counter() - start
    (end,) = read_metrics(tmp_path, "end")
    parts = {name: value for name, value in end.items() if name.endswith("_seconds")}
    assert 0.8 * whole < sum(parts.values()) <= whole, parts
    assert parts["train_seconds"] >= 0.4 and parts["eval_seconds"] >= 0.6
    assert parts["save_seconds"] >= 0.6 and parts["compile_seconds"] == 0


# -----------------------------------------------------------------------------
# the profiler


def test_three_steps_are_profiled_and_compute_what_they_did(data_dir, tmp_path, capsys):
    plain = run_train(data_dir, tmp_path / "plain")
    capsys.readouterr()
    profiled = run_train(data_dir, tmp_path / "log", profile_step=4)
    assert losses(plain) == losses(profiled)
    shown = capsys.readouterr().out
    assert "aten::" in shown and "step 4" not in shown.split("operator")[1].split("profile:")[0]
    path = tmp_path / "log" / "profile_000004.json.gz"
    assert f"profile: {path}" in shown
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 4", "step 5", "step 6"} <= names and not {"step 3", "step 7"} & names
    assert not list((tmp_path / "plain").glob("profile*"))


def test_a_run_that_ends_early_leaves_what_it_has_and_one_that_never_came_there_says_so(tmp_path):
    said = []
    profiler = StepProfiler(4, tmp_path, "cpu", said.append)
    for step in range(6):  # two of the three
        with profiler.step(step):
            torch.ones(3).sin()
    profiler.finish()
    profiler.finish()
    assert (tmp_path / "profile_000004.json.gz").exists()
    assert sum("operator" in line for line in said) == 1
    said.clear()
    StepProfiler(40, tmp_path, "cpu", said.append).finish()
    assert said == ["note: steps 40 to 42 were not run: nothing was profiled"]


def test_what_happens_between_the_steps_is_not_profiled(tmp_path):
    said = []
    profiler = StepProfiler(0, tmp_path, "cpu", said.append)
    x = torch.rand(100, 100)
    for step in range(3):
        with profiler.step(step):
            x @ x
        for _ in range(50):  # an evaluation
            x.sin()
    assert [line.split()[2:] for line in said if "aten::mm" in line] == [["1.0", "aten::mm"]]
    assert not any("sin" in line for line in said)


def test_an_error_of_the_profiler_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("kineto")

    said = []
    profiler = StepProfiler(0, tmp_path, "cpu", said.append)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    for step in range(3):
        with profiler.step(step):
            torch.ones(3).sin()
    assert said[-1] == "warning: the profile could not be written (kineto)"


def test_a_full_disk_costs_the_profile_but_not_the_run(tmp_path):
    said = []
    profiler = StepProfiler(0, tmp_path, "cpu", said.append)
    with profiler.step(0):
        for _ in range(2000):
            torch.ones(3).sin()
    with full_disk():
        profiler.finish()
    assert said[-1].startswith("warning: the profile could not be written")
    assert not list(tmp_path.iterdir())


def test_on_cuda_the_table_has_kernels_and_the_memory_is_recorded(tmp_path, monkeypatch):
    """Stands in for a GPU: torch.profiler's events and the three calls of torch.cuda."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key, device, time, note=False):
        return SimpleNamespace(
            key=key, device_type=device, self_device_time_total=time, self_cpu_time_total=time,
            count=2, is_user_annotation=note,
        )  # fmt: skip

    events = [event("gemm", cuda, 3000), event("gelu", cuda, 1000), event("aten::mm", cpu, 9000)]
    events.append(event("step 3", cuda, 4000, note=True))

    class Profile:
        def __init__(self, activities, acc_events):
            calls.append(activities)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

        def export_chrome_trace(self, path):
            Path(path).write_text('{"traceEvents": []}')

        key_averages = staticmethod(lambda: events)

    calls, said = [], []
    monkeypatch.setattr(profiling.torch.profiler, "profile", Profile)
    memory = profiling.torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(memory, "_dump_snapshot", calls.append)
    profiler = StepProfiler(3, tmp_path, "cuda", said.append)
    for step in range(8):
        with profiler.step(step):
            pass
    on, activities, *_, snapshot, off = calls
    assert on["max_entries"] and off == {"enabled": None}
    assert activities == [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    assert snapshot == str(tmp_path / "memory_000003.pickle")
    assert [line.split() for line in said[:3]] == [
        ["ms", "a", "step", "share", "calls", "a", "step", "kernel"],
        ["3.00", "75.0%", "2.0", "gemm"],
        ["1.00", "25.0%", "2.0", "gelu"],
    ]


def test_the_table_has_the_fifteen_largest():
    with torch.profiler.profile() as profile:
        x = torch.rand(300, 300)
        for name in (
            "sin", "cos", "tan", "exp", "log", "abs", "neg", "sqrt", "ceil", "floor", "round",
            "sign", "tanh", "erf", "relu",
        ):  # fmt: skip
            getattr(torch, name)(x)
        for _ in range(30):
            x @ x
    lines = largest([profile], False)
    assert len(lines) == 16 and lines[1].split()[-1] == "aten::mm"
    times = [float(line.split()[0]) for line in lines[1:]]
    assert times == sorted(times, reverse=True)


@pytest.mark.gpu
def test_a_gpu_leaves_a_trace_with_kernels_and_a_picture_of_its_memory(tmp_path):
    said = []
    profiler = StepProfiler(0, tmp_path, "cuda", said.append)
    x = torch.rand(512, 512, device="cuda")
    for step in range(3):
        with profiler.step(step):
            (x @ x).sin().sum().item()
    assert "kernel" in said[0] and len(said) > 3
    assert (tmp_path / "memory_000000.pickle").stat().st_size > 100
