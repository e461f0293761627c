"""RunLog: metrics.jsonl, the lines on the console, the status line, the dashboards."""

import dataclasses
import io
import itertools
import json
import math
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, RUN, command, flags, read_metrics, run_command_line

from common import runlog
from common.cli import run_command
from common.profiling import StepProfiler
from common.runlog import RunLog

ABOUT = dict(
    config={"data_dir": "nowhere", "max_steps": 40, "total_batch_size": 1000}, n_params=1234567,
    flops_per_token=7_000_000, peak_flops=None,
    micro_batch_size=4, world_size=2, compile=False, device="cpu", dtype="bfloat16", passes=1.234,
    startup_seconds=0.0,
)  # fmt: skip
STEP = dict(
    loss=4.81234, lr=1.5e-3, grad_norm=0.98765, dt=2.0, batch_tokens=1000, tokens_seen=1000,
    data_wait=0.0,
)  # fmt: skip
SPEED = {"tokens_per_sec": 500.0, "mfu": None}
SCORE = dict(style="completion", acc=0.28591, acc_norm=0.29549, acc_norm_stderr=0.00455)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A command without flags."""


def start_log(out_dir: Path, monkeypatch: pytest.MonkeyPatch, on_terminal: bool) -> RunLog:
    """Open a log on a terminal or a pipe, and write its run event."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    log = RunLog(out_dir, 0, is_main=True)
    log.write("run", 0, **ABOUT)
    return log


# -----------------------------------------------------------------------------
# metrics.jsonl


def test_a_line_of_metrics_has_event_step_and_time_before_the_values(tmp_path):
    log = RunLog(tmp_path, 0, is_main=True)
    log.write("run", 0, **ABOUT)
    log.write("train", 3, **STEP)
    log.close()
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    about = ["event", "step", "time", *ABOUT, "git_hash", "versions", "data_source"]
    assert list(json.loads(first)) == about
    assert list(json.loads(second)) == ["event", "step", "time", *STEP, *SPEED]
    assert second == json.dumps(json.loads(second))
    assert json.loads(second).items() >= {"event": "train", "step": 3, **STEP, **SPEED}.items()


def test_mfu_is_the_part_of_all_gpus_peak(tmp_path):
    log = RunLog(tmp_path, 0, is_main=True)
    log.write("run", 0, **{**ABOUT, "peak_flops": 8 * 312e12})
    log.write("train", 3, **STEP)
    log.close()
    mfu = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["mfu"]
    assert mfu == pytest.approx(500 * 7_000_000 / (8 * 312e12))


def test_a_resumed_log_drops_the_lines_that_it_will_write_again(tmp_path):
    events = ["train", "skip", "stats", "val", "sample", "checkpoint"]
    lines = [{"event": event, "step": step} for step in (4, 5, 6) for event in events]
    lines[3]["loss"] = lines[9]["loss"] = lines[15]["loss"] = 1.0
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = RunLog(tmp_path, 5, is_main=True)
    log.close()
    kept = {(m["event"], m["step"]) for m in read_metrics(tmp_path)}
    by_update = {(event, 4) for event in ("train", "skip", "stats")}
    assert kept == by_update | {(e, s) for e in ("val", "sample", "checkpoint") for s in (4, 5)}
    assert log.kept == kept


# -----------------------------------------------------------------------------
# what a run adds up to


def test_the_time_between_two_events_is_that_of_the_second_without_the_compiler(
    tmp_path, monkeypatch
):
    laps = iter([(9.0, 0.0), (5.0, 1.0), (3.0, 0.5), (2.0, 0.0), (0.5, 0.0)])
    log = RunLog(tmp_path, 0, is_main=True)
    monkeypatch.setattr(log.clock, "lap", lambda: next(laps))
    log.write("run", 0, **ABOUT)
    log.write("val", 0, loss=5.0)
    log.write("train", 0, **{**STEP, "dt": 2.5})
    log.write("checkpoint", 1, path="c.pt")
    log.write("stats", 1, update_ratio=[1.0])
    log.close()
    run, val, train, checkpoint, stats = read_metrics(tmp_path)
    assert (val["seconds"], val["compile_seconds"]) == (4.0, 1.0)
    assert (train["dt"], train["compile_seconds"], train["tokens_per_sec"]) == (2.0, 0.5, 500)
    assert checkpoint["seconds"] == 2.0 and "compile_seconds" not in checkpoint
    assert "seconds" not in {**run, **stats}


END = dict(why="budget", tokens_seen=2000, peak_memory=5_000_000)


def test_the_end_adds_up_the_run_and_the_console_shows_it_for_scripts(
    tmp_path, monkeypatch, capsys
):
    log = start_log(tmp_path, monkeypatch, on_terminal=False)
    log.about["peak_flops"] = 400 * 7_000_000 / 0.25
    times = dict(startup_seconds=7.0, eval_seconds=3.0, save_seconds=2.0, compile_seconds=1.0)
    vars(log.totals).update(times)
    monkeypatch.setattr(log.clock, "lap", lambda: (0.5, 0.0))
    log.write("val", 0, loss=4.5)
    log.write("train", 0, **STEP)
    log.write_step(
        1, SimpleNamespace(applied=False, loss=math.nan, grad_norm=math.nan), 1000, 2000, 10, dt=3.0
    )
    capsys.readouterr()
    log.write("end", 2, **END)
    end = read_metrics(tmp_path, "end")[0]
    expected = {**times, "eval_seconds": 3.5, "save_seconds": 2.5, "train_seconds": 5.0}
    expected |= {"tokens_per_sec": 400.0, "mfu": 0.25, "val_loss": 4.5, "n_params": 1234567, **END}
    assert {name: end[name] for name in expected} == expected
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [
        "why", "val_loss", "train_seconds", "eval_seconds", "save_seconds", "compile_seconds",
        "startup_seconds", "steps", "tokens_seen", "tokens_per_sec", "peak_memory", "mfu",
        "n_params",
    ]  # fmt: skip
    assert lines.pop("why") == "budget" and lines.pop("steps") == "2"
    assert {name: float(value) for name, value in lines.items()} == {n: end[n] for n in lines}


def test_totals_go_on_when_a_run_is_resumed_and_count_each_step_once(tmp_path, monkeypatch):
    for resumed in False, True:
        log = RunLog(tmp_path, 2 * resumed, is_main=True)
        monkeypatch.setattr(log.clock, "lap", lambda: (0.5, 0.25))
        log.write("run", 2 * resumed, **{**ABOUT, "startup_seconds": 2.5})
        if not resumed:
            log.write("val", 0, loss=5.0)
        for step in (2, 3) if resumed else (0, 1, 2, 3):  # 2 and 3 are lost in a crash
            log.write("train", step, **{**STEP, "dt": 1.25})
    log.write("end", 4, **END)
    end = read_metrics(tmp_path, "end")[0]
    assert end["train_seconds"] == 4.0 and end["tokens_per_sec"] == 1000
    assert (end["startup_seconds"], end["eval_seconds"], end["save_seconds"]) == (6.0, 0.25, 0.25)
    assert end["compile_seconds"] == 0.25 * 7, "two starts, one validation, four steps"
    log = RunLog(tmp_path, 4, is_main=True)  # a longer budget: the end is no step, and stays
    assert log.totals.compile_seconds == 0.25 * 7 and log.totals.save_seconds == 0.25
    assert log.totals.peak_memory == 5_000_000


def test_a_branch_begins_with_the_lines_of_its_trunk_but_not_with_its_dashboard(tmp_path):
    lines = [{"event": "run", "step": 0, "wandb_id": "trunk"}]
    lines += [{"event": "val", "step": 0, "loss": 3.0}, {"event": "train", "step": 4, "dt": 1.0}]
    (tmp_path / "trunk").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"event": "train", "step": 5}])
    (tmp_path / "trunk" / "metrics.jsonl").write_text(text)
    log = RunLog(tmp_path / "branch", 5, is_main=True, trunk=tmp_path / "trunk")
    log.write("run", 5, **ABOUT)
    log.write("val", 5, loss=2.0)
    log.close()
    assert read_metrics(tmp_path / "branch")[:3] == lines and log.totals.train_seconds == 1.0
    assert runlog.read_earlier(tmp_path / "branch" / "metrics.jsonl", 5).wandb_id is None
    # killed before its first checkpoint, and the trunk has a newer one: no line of the first try
    with open(tmp_path / "trunk" / "metrics.jsonl", "a") as file:
        print(json.dumps({"event": "val", "step": 6, "loss": 2.5}), file=file)
    again = RunLog(tmp_path / "branch", 6, is_main=True, trunk=tmp_path / "trunk")
    assert again.kept == {("run", 0), ("val", 0), ("train", 4), ("train", 5), ("val", 6)}


def test_only_the_first_rank_writes(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"event": "val", "step": 0, "loss": 1.0}\n')
    log = RunLog(tmp_path, 5, is_main=False)
    log.write("run", 5, **ABOUT)
    log.write("val", 5, loss=2.0)
    log.say("a line")
    log.close()
    assert log.kept == set()
    assert capsys.readouterr().out == ""
    assert len(read_metrics(tmp_path)) == 1
    RunLog(tmp_path / "other", 0, is_main=False).close()
    assert not (tmp_path / "other").exists()


def test_a_closed_log_writes_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, 0, is_main=True)
    log.close()
    log.write("val", 5, loss=2.0)
    log.say("a line")
    log.close()
    assert read_metrics(tmp_path) == [] and capsys.readouterr().out == ""


def test_a_log_is_closed_on_the_way_out_whatever_the_error(tmp_path, monkeypatch, capsys):
    log = start_log(tmp_path, monkeypatch, on_terminal=True)
    with pytest.raises(KeyboardInterrupt), log:
        log.write("train", 0, **STEP)
        assert "left" in capsys.readouterr().out, "the status line"
        raise KeyboardInterrupt
    assert log.file is None
    assert capsys.readouterr().out.strip(" \r") == "", "the status line must go"


NOT_WRITTEN = r"metrics\.jsonl cannot be written \({}\): make room .* --resume$"


def fill_disk(log: RunLog) -> None:
    """Put a file on a full disk in the place of metrics.jsonl."""
    log.file.close()
    log.file = open("/dev/full", "a")  # noqa: SIM115


def test_metrics_that_cannot_be_written_are_an_error_that_names_the_file(tmp_path):
    full = NOT_WRITTEN.format("No space left on device")
    with pytest.raises(OSError, match=full), RunLog(tmp_path, 0, is_main=True) as log:
        fill_disk(log)
        log.write("val", 5, loss=2.0)
    with pytest.raises(OSError, match=full), RunLog(tmp_path, 0, is_main=True) as log:
        fill_disk(log)
        log.file.write("what a network file system reports when the file is closed")
    (tmp_path / ".metrics.jsonl.unfinished").mkdir()
    with pytest.raises(OSError, match=NOT_WRITTEN.format("Is a directory")):
        RunLog(tmp_path, 0, is_main=True)


def test_an_error_of_the_run_is_not_hidden_by_one_from_closing_the_log(tmp_path):
    log = RunLog(tmp_path, 0, is_main=True)
    with pytest.raises(ZeroDivisionError), log:
        fill_disk(log)
        log.file.write("cannot be flushed")
        raise ZeroDivisionError


# -----------------------------------------------------------------------------
# the console


RUN_LINE = (
    "1,234,567 parameters on 2 x cpu, bfloat16, not compiled; 40,000 tokens (1.23 passes over the "
    "data) in steps of 1,000, 4 rows at a time"
)
ROW = "     7  loss 4.8123  lr 1.50e-03  norm  0.988   2000 ms        500 tok/s"
LINE = "step 7: loss 4.8123, lr 1.50e-03, norm 0.988, 2000 ms, 500 tokens/s"


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize(
    ("event", "values", "lines"),  # the line, or those for a terminal and for a pipe
    [
        ("run", ABOUT, [RUN_LINE]),
        ("train", STEP, [ROW, f"{LINE}, 0:01:18 left"]),
        (
            "train",
            {**STEP, "data_wait": 0.5},
            [
                f"{ROW}  mfu 43%  waited 25%",
                f"{LINE}, mfu 43.2%, waited 25% for data, 0:01:18 left",
            ],
        ),
        ("val", dict(loss=4.81234, bpb=None), ["step 7: validation loss 4.8123"]),
        (
            "val",
            dict(loss=4.81234, bpb=1.23456),
            ["step 7: validation loss 4.8123 (1.2346 bits per byte)"],
        ),
        (
            "hellaswag",
            SCORE,
            ["step 7: HellaSwag (completion): acc 0.2859, acc_norm 0.2955 ± 0.0046"],
        ),
        ("sample", dict(text="Hello,\nI'm"), ['step 7: sample: "Hello,\\nI\'m"']),
        ("skip", dict(why="loss nan", windows=[0, 4]), ["step 7: not applied: loss nan"]),
        ("checkpoint", dict(path="log/c.pt"), ["step 7: saved log/c.pt"]),
        ("stats", dict(update_ratio=[1e-3, 2e-3]), [""]),
    ],
)
def test_each_event_has_its_console_line(
    tmp_path, monkeypatch, capsys, on_terminal, event, values, lines
):
    log = start_log(tmp_path, monkeypatch, on_terminal)
    if values.get("data_wait"):  # a GPU whose peak is known
        log.about["peak_flops"] = 500 * 7_000_000 / 0.4321
    capsys.readouterr()
    log.write(event, 7, **values)
    line, end, status = capsys.readouterr().out.partition("\n")
    log.close()
    assert line == (lines[0] if on_terminal else lines[-1])
    assert bool(end) == bool(line)
    assert bool(status) == (on_terminal and event == "train")


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
def test_a_sample_that_the_console_cannot_print_does_not_end_a_run(
    tmp_path, monkeypatch, on_terminal
):
    """Windows redirects into cp1252, which has neither the characters nor the bar of the status."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py"])

    def run(_: Options) -> None:
        with start_log(tmp_path, monkeypatch, on_terminal) as log:
            log.write("train", 0, **STEP)
            log.write("sample", 1, text="Hello, \u6771\u4eac \U0001f642")
            log.say("a line with \u6771")

    run_command(Options, run)
    stdout.flush()
    shown = stdout.buffer.getvalue().decode("cp1252")
    assert "step 1: sample: 'Hello, \\u6771\\u4eac \\U0001f642'" in shown
    assert "a line with \\u6771" in shown
    assert read_metrics(tmp_path, "sample")[0]["text"] == "Hello, \u6771\u4eac \U0001f642"


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
def test_short_steps_print_a_line_a_second_and_the_first_and_last_step_always(
    tmp_path, monkeypatch, capsys, on_terminal
):
    monkeypatch.setitem(ABOUT["config"], "target_loss", 2.0)
    log = start_log(tmp_path, monkeypatch, on_terminal)
    now = itertools.count(100, 0.3)
    monkeypatch.setattr(runlog.time, "monotonic", lambda: next(now))
    for step in range(12):
        log.write("train", step, **{**STEP, "tokens_seen": 1000 * (step + 1)})
    name = "{:6d}  loss" if on_terminal else "step {}: loss"

    def shown() -> list[int]:
        text = capsys.readouterr().out
        return [step for step in range(40) if name.format(step) in text]

    first = shown()
    assert first[0] == 0 and 3 <= len(first) <= 4 and first[-1] < 11, "0.3 s apart"
    log.write("checkpoint", 12, path="log/c.pt")
    log.write("val", 12, loss=2.1)
    assert not shown()
    log.write("val", 12, loss=2.0)
    assert shown() == [11], "the target ends the run"
    result = SimpleNamespace(applied=True, stop=True, loss=5.0, grad_norm=1.0, data_wait=0.0)
    for step in 12, 13:
        log.write_step(step, result, 1000, 1000, 10, lr=1.0, dt=1.0)
    assert shown() == [12, 13], "a signal ends the run"
    log.write("train", 38, **{**STEP, "tokens_seen": 39_000})
    log.write("train", 39, **{**STEP, "tokens_seen": 40_000})
    assert shown()[-1] == 39, "the last step of the budget"
    log.write("train", 39, **{**STEP, "tokens_seen": 39_500})
    log.close()
    assert shown() == [39], "after an error nothing follows"


def test_a_loss_that_is_no_number_leaves_lines_of_strict_json(tmp_path, capsys):
    with RunLog(tmp_path, 0, is_main=True) as log:
        log.write("val", 3, loss=math.nan, bpb=math.inf)
    assert "validation loss nan" in capsys.readouterr().out
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=pytest.fail)
    assert entry["loss"] is None and entry["bpb"] is None
    with RunLog(tmp_path, 3, is_main=True) as log:
        assert log.kept == {("val", 3)} and math.isnan(log.totals.val_loss)


@pytest.mark.parametrize("last", ["train", "skip"])
def test_the_closing_block_comes_last(tmp_path, monkeypatch, capsys, last):
    log = start_log(tmp_path, monkeypatch, on_terminal=False)
    log.profiler = StepProfiler(50, tmp_path, "cpu", log.say)
    for step in 0, 1:
        log.write("train", step, **STEP)
    if last == "skip":
        log.write("skip", 2, why="loss nan", windows=[0, 4], dt=1.0)
    log.write("end", 3, **END)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    block = next(i for i, line in enumerate(lines) if line.startswith("why: "))
    assert lines[-1].startswith("n_params: ") and len(lines) - block > 9
    order = [line for line in lines[1:block] if line.startswith(("step", "note"))]
    assert [line[:7] for line in order[-3:-1]] == (
        ["step 1:", "step 2:"] if last == "skip" else ["step 0:", "step 1:"]
    )
    assert order[-1].startswith("note: steps 50 to 52")


def test_a_step_that_takes_longer_than_a_second_has_its_line(tmp_path, monkeypatch, capsys):
    log = start_log(tmp_path, monkeypatch, on_terminal=False)
    monkeypatch.setattr(runlog.time, "monotonic", itertools.count(100, 1.1).__next__)
    for step in range(5):
        log.write("train", step, **STEP)
    assert capsys.readouterr().out.count("loss 4.8123") == 5


LEFT = ("0:01:18", "0:00:38", "0:01:14")  # 39 steps of 2 s, 38 of 1 s, 37 of 0.9 * 1 + 0.1 * 11 s


@pytest.mark.parametrize("on_terminal", [True, False], ids=["terminal", "pipe"])
def test_the_time_left_takes_a_shorter_step_in_full_and_a_longer_one_by_a_tenth(
    tmp_path, monkeypatch, capsys, on_terminal
):
    log = start_log(tmp_path, monkeypatch, on_terminal)
    monkeypatch.setattr(runlog.time, "monotonic", itertools.count(step=10).__next__)
    for step, dt in enumerate((2.0, 1.0, 11.0)):
        capsys.readouterr()
        log.write("train", step, **{**STEP, "dt": dt, "tokens_seen": 1000 * (step + 1)})
        shown = capsys.readouterr().out
        end = f"step {step}, {LEFT[step]} left" if on_terminal else f", {LEFT[step]} left\n"
        assert shown.rstrip(" ").endswith(end)
    log.close()


def test_the_status_line_has_the_best_validation_loss_of_the_run_and_its_earlier_part(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "metrics.jsonl").write_text('{"event": "val", "step": 0, "loss": 3.5}\n')
    log = start_log(tmp_path, monkeypatch, on_terminal=True)
    for step, (loss, best) in enumerate(((4.0, 3.5), (3.0, 3.0), (5.0, 3.0))):
        log.write("val", step, loss=loss)
        capsys.readouterr()
        log.write("train", step, **STEP)
        assert f"left, best validation loss {best:.4f}" in capsys.readouterr().out
    log.say("a line")
    shown = capsys.readouterr().out
    assert 0 <= shown.index("a line\n") < shown.rindex("left, best"), "above the status line"
    log.close()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_status_line_and_a_pipe_gets_plain_lines(data_dir, tmp_path):
    settings = {**RUN, "data_dir": data_dir, "checkpoint_every": 0}
    plain = run_command_line("train_gpt2.py", *flags(**settings, out_dir=tmp_path / "plain"))
    assert "step 9: loss " in plain.stdout and "\r" not in plain.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    process = subprocess.Popen(
        command("train_gpt2.py", *flags(**settings, out_dir=tmp_path / "terminal")),
        cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1"}, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not data:
            break
        shown += data
    assert process.wait() == 0
    shown = shown.decode()
    assert "left, best validation loss" in shown, shown
    assert "tok/s" in shown and "\r" in shown
    assert "step 9: loss" not in shown and "step 10: validation loss" in shown
