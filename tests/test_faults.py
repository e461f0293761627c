"""What can go wrong with a run: kills, damage, signals, full disks, bad numbers, bad data.

The short forms are part of `make test`; `make test-faults` runs the long ones as well.
"""

import fcntl
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    RUN,
    all_files,
    command,
    flags,
    losses,
    read_metrics,
    run_command_line,
    run_ranks,
    run_train,
    write_shards,
)

import train_gpt2
from common.checkpoint import read_checkpoint
from common.cli import explain
from common.files import locked
from common.shards import open_shards
from train_gpt2 import GPT, load_model

LONG = dict(max_steps=60, checkpoint_every=3, eval_every=20, optimizer="muon")


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A test that fails must not leave its command behind to slow down the others."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(data_dir: Path, out_dir: Path, ranks: int = 0, launcher: tuple = (), **changes):
    """Start the real training command; its output comes line by line."""
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": out_dir, **changes})
    process = subprocess.Popen(
        command("train_gpt2.py", *settings, ranks=ranks, launcher=launcher),
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    STARTED.append(process)
    return process


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the command's output until a line holds `text`; return all of it."""
    output = ""
    for line in process.stdout:
        output += line
        if text in line:
            return output
    raise AssertionError(f"ended without {text!r}:\n{output}")


def workers(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, in order."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


# -----------------------------------------------------------------------------
# stopped, killed, damaged


def kill_until_finished(data_dir, out_dir, kills: int, settings: dict) -> None:
    """Kill -9 the command so many times, each at a random moment, then let it finish."""
    rng = random.Random(kills)
    for kill in range(kills):
        process = start(data_dir, out_dir, resume=True, **settings)
        wait_for(process, "parameters on")
        if kill % 2:  # in the middle of writing a checkpoint
            while process.poll() is None and not any(out_dir.glob(".ckpt_*")):
                pass
        else:
            time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
    process = start(data_dir, out_dir, resume=True, **settings)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "the run is finished" not in output, "it must have been killed in time"


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_continues_and_logs_every_step_once(data_dir, tmp_path, kills):
    settings = dict(max_steps=100 + 40 * kills, checkpoint_every=5, eval_every=50)
    undisturbed = run_train(
        data_dir, tmp_path / "undisturbed", **{**settings, "checkpoint_every": 0}
    )
    kill_until_finished(data_dir, tmp_path / "killed", kills, settings)
    metrics = read_metrics(tmp_path / "killed")
    assert losses(metrics) == losses(undisturbed)
    validations = [(m["step"], m["loss"]) for m in metrics if m["event"] == "val"]
    assert validations == [(m["step"], m["loss"]) for m in undisturbed if m["event"] == "val"]
    assert not list(tmp_path.glob("killed/.ckpt_*")), "partial files must not pile up"


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, zero, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(data_dir, tmp_path, capsys, damage):
    whole = run_train(data_dir, tmp_path, checkpoint_every=4, keep_checkpoints=0)
    newest = tmp_path / "ckpt_000010.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    resumed = run_train(data_dir, tmp_path, resume=True)
    output = capsys.readouterr().out
    assert "ckpt_000010.pt: not a whole checkpoint" in output and "after step 8" in output
    assert losses(resumed) == losses(whole)


def test_if_every_checkpoint_is_damaged_nothing_is_deleted(data_dir, tmp_path):
    run_train(data_dir, tmp_path, checkpoint_every=5)
    for path in tmp_path.glob("ckpt_*.pt"):
        path.write_bytes(flip(path.read_bytes()))
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        run_train(data_dir, tmp_path, resume=True)
    assert before == all_files(tmp_path)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(data_dir, tmp_path, number):
    process = start(data_dir, tmp_path, max_steps=100_000)
    wait_for(process, "step 5: validation loss")
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + number
    assert "--resume" in output
    steps = [m["step"] for m in read_metrics(tmp_path, "train")]
    assert (tmp_path / f"ckpt_{len(steps):06d}.pt").exists() and steps == list(range(len(steps)))


def test_a_second_interrupt_stops_at_once(tmp_path):
    # a step of minutes: the first Ctrl-C waits for its end, the second does not
    data = write_shards(tmp_path / "data", {"a_val_0.npy": 400, "a_train_1.npy": 400_000})
    process = start(data, tmp_path / "log", total_batch_size=16 * 20_000, n_embd=512,
                    micro_batch_size=1, eval_every=0)  # fmt: skip
    wait_for(process, "parameters on")
    time.sleep(0.3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(timeout=5) == -signal.SIGINT


# -----------------------------------------------------------------------------
# the console goes away


def start_on_terminal(
    data_dir: Path, out_dir: Path, on_hangup: signal.Handlers, **changes
) -> tuple[subprocess.Popen, int]:
    """Start training as the leader of a terminal's session; also return our end of the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))

    def lead() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, on_hangup)

    env = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTHONUNBUFFERED")}
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": out_dir, **changes})
    process = subprocess.Popen(
        command("train_gpt2.py", *settings), cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=lead,
    )  # fmt: skip
    os.close(theirs)
    STARTED.append(process)
    return process, ours


def close_terminal(terminal: int) -> None:
    """Close our end after some steps. The kernel sends SIGHUP; from then on writing gives EIO."""
    shown = b""
    while b"step 3, " not in shown:  # the status line
        shown += os.read(terminal, 4096)
    os.close(terminal)


def test_a_closed_terminal_saves_and_the_run_can_be_continued(data_dir, tmp_path):
    settings = dict(max_steps=60, eval_every=20)
    process, terminal = start_on_terminal(data_dir, tmp_path / "log", signal.SIG_DFL, **settings)
    close_terminal(terminal)
    assert process.wait(timeout=20) == 128 + signal.SIGHUP
    steps = [m["step"] for m in read_metrics(tmp_path / "log", "train")]
    assert steps == list(range(len(steps))) and len(steps) < 60
    assert (tmp_path / "log" / f"ckpt_{len(steps):06d}.pt").exists()
    resumed = run_train(data_dir, tmp_path / "log", resume=True, **settings)
    assert losses(resumed) == losses(run_train(data_dir, tmp_path / "undisturbed", **settings))


def test_under_nohup_a_run_outlives_its_terminal(data_dir, tmp_path):
    process, terminal = start_on_terminal(data_dir, tmp_path, signal.SIG_IGN, max_steps=60)
    close_terminal(terminal)
    assert process.wait(timeout=60) == 0
    assert len(read_metrics(tmp_path, "train")) == 60 and (tmp_path / "hf").exists()


@pytest.mark.slow  # test_cli.py has the short form
def test_a_run_outlives_the_reader_of_its_output(data_dir, tmp_path):
    process = start(data_dir, tmp_path, max_steps=60)
    wait_for(process, "step 5: validation loss")
    process.stdout.close()  # as when tee is killed
    assert process.wait(timeout=60) == 0
    assert len(read_metrics(tmp_path, "train")) == 60 and (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_terminal_that_torchrun_loses_saves_and_leaves_no_rank(data_dir, tmp_path):
    process = start(data_dir, tmp_path, ranks=2, max_steps=100_000)
    wait_for(process, "step 5: validation loss")
    ranks = workers(process)
    for _ in range(2):  # the shell sends it, and the kernel
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    process.communicate(timeout=60)
    steps = [m["step"] for m in read_metrics(tmp_path, "train")]
    assert [path.name for path in tmp_path.glob("ckpt_*.pt")] == [f"ckpt_{len(steps):06d}.pt"]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


# -----------------------------------------------------------------------------
# ranks


@pytest.fixture(scope="module")
def two_ranks(data_dir, tmp_path_factory) -> Path:
    """The folder of an undisturbed run of two ranks, with Muon: its state is spread over them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    process = start(data_dir, folder, ranks=2, keep_checkpoints=0, **LONG)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    return folder


def test_two_ranks_resume_bit_for_bit_and_one_continues_from_two(data_dir, two_ranks, tmp_path):
    whole, end = losses(read_metrics(two_ranks)), read_checkpoint(two_ranks / "ckpt_000060.pt")
    shutil.copy(two_ranks / "ckpt_000054.pt", tmp_path)
    shutil.copy(two_ranks / "metrics.jsonl", tmp_path)
    output = start(data_dir, tmp_path, ranks=2, resume=True, **LONG).communicate(timeout=100)[0]
    assert "continuing after step 54" in output
    assert losses(read_metrics(tmp_path)) == whole
    resumed = read_checkpoint(tmp_path / "ckpt_000060.pt")
    assert all(torch.equal(end["model"][name], w) for name, w in resumed["model"].items())
    (tmp_path / "ckpt_000060.pt").unlink()
    one = losses(run_train(data_dir, tmp_path, resume=True, **LONG))
    assert one[-3:] != whole[-3:], "the steps after the checkpoint before it must be new"
    for x, y in zip(whole, one, strict=True):
        assert x == pytest.approx(y, abs=1e-4)


def test_a_signal_to_one_rank_stops_all_and_is_no_failure(data_dir, tmp_path):
    process = start(data_dir, tmp_path, ranks=2, launcher=("--max-restarts=3",), max_steps=100_000)
    wait_for(process, "step 5: validation loss")
    os.kill(workers(process)[1], signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("ckpt_*.pt"))) == 1
    assert output.count("parameters on") == 0, "it must not be started again"


@pytest.mark.slow  # the test before it is its short form
def test_a_batch_system_stops_a_run_through_torchrun(data_dir, tmp_path):
    # what Slurm does with `#SBATCH --signal=B:USR1@120` and the README's trap
    launcher = ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",)
    process = start(data_dir, tmp_path, ranks=2, launcher=launcher, max_steps=100_000)
    wait_for(process, "step 5: validation loss")
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "continue with the same command and --resume" in output
    steps = [m["step"] for m in read_metrics(tmp_path, "train")]
    assert [path.name for path in tmp_path.glob("ckpt_*.pt")] == [f"ckpt_{len(steps):06d}.pt"]


def test_a_rank_that_dies_is_replaced_and_the_result_is_the_same(data_dir, two_ranks, tmp_path):
    process = start(data_dir, tmp_path, 2, ("--max-restarts=3",), resume=True, **LONG)
    wait_for(process, "saved")
    os.kill(workers(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert "continuing after step" in output
    assert losses(read_metrics(tmp_path)) == losses(read_metrics(two_ranks))


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_by_the_time_out(data_dir, tmp_path):
    process = start(data_dir, tmp_path, ranks=2, max_steps=100_000, timeout_minutes=0.1)
    wait_for(process, "step 5: validation loss")
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not Path(f"/proc/{hung}").exists()


# -----------------------------------------------------------------------------
# disk and numbers


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(data_dir, tmp_path):
    process = start(data_dir, tmp_path, max_steps=100_000, checkpoint_every=2, eval_every=0)
    wait_for(process, "saved")
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, hard))  # no room for a whole one
    wait_for(process, "could not be written")
    assert not list(tmp_path.glob(".ckpt_*")), "the partial file must go"
    kept = sorted(tmp_path.glob("ckpt_*.pt"))
    assert kept and all(read_checkpoint(path) for path in kept)
    wait_for(process, "could not be written")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    wait_for(process, "saved")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, hard))
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, "a failed last checkpoint is an error"
    assert "train_gpt2.py: error" in output and "--resume" in output


def be_poisoned(rank: int, bad_rank: int, bad_call: int, settings: list[str]) -> None:
    """Train; on one rank, one forward pass of the third step gives NaN."""
    loss, calls = GPT.loss, [0]

    def poisoned(self, x, targets):
        calls[0] += self.training
        bad = self.training and rank == bad_rank and calls[0] == bad_call
        return loss(self, x, targets) * (float("nan") if bad else 1)

    GPT.loss = poisoned
    sys.argv = ["train_gpt2.py", *settings]
    train_gpt2.main()


@pytest.mark.parametrize(("world_size", "bad_rank", "bad_call"), [(1, 0, 10), (2, 1, 5)])
def test_a_step_that_is_not_finite_is_skipped_by_all(
    data_dir, tmp_path, world_size, bad_rank, bad_call
):
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": tmp_path / "log"})
    ended = run_ranks(tmp_path, be_poisoned, world_size, bad_rank, bad_call, settings)
    assert [rank.code for rank in ended] == [0] * world_size, ended
    (skip,) = read_metrics(tmp_path / "log", "skip")
    assert skip["step"] == 2 and skip["windows"] == [32, 48] and "nan" in skip["why"]
    steps = [m["step"] for m in read_metrics(tmp_path / "log", "train")]
    assert steps == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    state = read_checkpoint(tmp_path / "log" / "ckpt_000010.pt")
    assert all(w.isfinite().all() for w in state["model"].values())


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(
    data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(GPT, "loss", lambda self, x, targets: x.sum() * float("inf"))
    settings = dict(max_skipped=3, checkpoint_every=2, eval_every=0)
    with pytest.raises(ValueError, match=r"3 steps in a row.*: start again with a lower --max_lr"):
        run_train(data_dir, tmp_path, **settings)
    assert [m["step"] for m in read_metrics(tmp_path, "skip")] == [0, 1, 2]
    assert read_checkpoint(tmp_path / "ckpt_000002.pt")


def test_skipped_steps_with_good_ones_between_them_do_not_end_the_run(
    data_dir, tmp_path, monkeypatch
):
    whole_loss, calls = GPT.loss, iter(range(1000))

    def poisoned(self, x, targets):  # 4 micro-steps a step: steps 2, 4 and 6
        bad = self.training and next(calls) in (8, 16, 24)
        return whole_loss(self, x, targets) * (float("nan") if bad else 1)

    monkeypatch.setattr(GPT, "loss", poisoned)
    metrics = run_train(data_dir, tmp_path, max_skipped=2)
    assert [m["step"] for m in metrics if m["event"] == "skip"] == [2, 4, 6]
    assert [m["step"] for m in metrics if m["event"] == "train"] == [0, 1, 3, 5, 7, 8, 9]


AGAIN = r"\nstart again with another --out_dir"


def test_running_out_of_memory_in_a_step_names_a_smaller_micro_batch(
    data_dir, tmp_path, four_rows_fit
):
    settings = dict(micro_batch_size=8, eval_every=0)
    with pytest.raises(ValueError, match=AGAIN + r" and --micro_batch_size 4$"):
        run_train(data_dir, tmp_path / "new", **settings)
    run_train(data_dir, tmp_path / "old", max_steps=1, eval_every=0)
    with pytest.raises(ValueError, match=r"\nuse --resume and --micro_batch_size 4$"):
        run_train(data_dir, tmp_path / "old", resume=True, **settings)


ONE_ROW = "give more GPUs, --recompute on, or a smaller --block_size or --preset"
OUTSIDE = {  # where memory runs out: the settings, and what to do
    "GPT.to": ({}, ONE_ROW),
    "make_optimizers": ({}, ONE_ROW),
    "validation_loss": ({}, f"{AGAIN[2:]} and --micro_batch_size 2"),
    "validation_loss with one row": ({"micro_batch_size": 1}, ONE_ROW),
    "score": ({"hellaswag_every": 1, "vocab_size": 50257}, f"{AGAIN[2:]} and --micro_batch_size 2"),
    "sample_text": (
        {"sample_every": 1, "vocab_size": 50257},
        f"{AGAIN[2:]} and --micro_batch_size 2",
    ),
    "train_step": ({}, f"{AGAIN[2:]} and --micro_batch_size 2"),
}
TORCH_SAYS = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ..."): True,
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"): True,  # no kind of its own
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel"): False,
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_running_out_of_memory_anywhere_is_one_line_with_what_to_do(
    data_dir, tmp_path, monkeypatch, place
):
    settings, what_to_do = OUTSIDE[place]
    monkeypatch.setattr(train_gpt2, "questions_for_training", lambda machine: ["a question"])
    for number, (error, is_memory) in enumerate(TORCH_SAYS.items()):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(f"train_gpt2.{place.split()[0]}", fail)
        with pytest.raises((ValueError, OSError)) as caught:
            run_train(data_dir, tmp_path / str(number), eval_every=1, **settings)
        line = explain(caught.value)
        assert "\n" not in line
        if is_memory:
            assert line.startswith(f"out of memory: {what_to_do}")
        else:
            fault = "CUDA error: an illegal memory access was encountered"
            assert line.startswith(f"device cpu: {fault}: start again")


# -----------------------------------------------------------------------------
# bad data


def cut(folder):
    path = folder / "a_train_1.npy"
    path.write_bytes(path.read_bytes()[:-100])


def changed(folder):
    np.save(folder / "a_train_1.npy", np.zeros(400, dtype=np.float32))


BAD_DATA = {
    "truncated": (cut, r"a_train_1\.npy: not a whole token shard"),
    "dtype": (changed, r"a_train_1\.npy: not a whole token shard \(1-dimensional float32"),
    "empty file": (
        lambda d: (d / "a_train_1.npy").write_bytes(b""),
        r"a_train_1\.npy: not a whole",
    ),
    "no val": (lambda d: (d / "a_val_0.npy").unlink(), r"no \*_val_\* shards"),
    "no train": (lambda d: (d / "a_train_1.npy").unlink(), r"no \*_train_\* shards"),
    "short": (lambda d: write_shards(d, {"a_train_1.npy": 200}), "12 training"),
    "short val": (lambda d: write_shards(d, {"a_val_0.npy": 16}), "0 validation windows"),
    "bin": (lambda d: (d / "b_train_2.bin").write_bytes(b"x" * 3000), r"b_train_2\.bin"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_named_before_the_first_step(tmp_path, what):
    spoil, message = BAD_DATA[what]
    data = write_shards(tmp_path / "data", {"a_val_0.npy": 400, "a_train_1.npy": 400})
    spoil(data)
    with pytest.raises((ValueError, OSError), match=message):
        run_train(data, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_data_that_changed_since_the_checkpoint_is_refused(tmp_path):
    data = write_shards(tmp_path / "data", {"a_val_0.npy": 400, "a_train_1.npy": 400})
    run_train(data, tmp_path / "log", max_steps=2)
    write_shards(data, {"a_train_2.npy": 400})
    with pytest.raises(ValueError, match="data was"):
        run_train(data, tmp_path / "log", max_steps=3, resume=True)


def test_two_runs_do_not_share_a_folder_and_a_crash_leaves_no_lock(data_dir, tmp_path):
    process = start(data_dir, tmp_path, max_steps=100_000, checkpoint_every=2)
    wait_for(process, "saved")
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": tmp_path}, resume=True)
    second = run_command_line("train_gpt2.py", *settings)
    assert second.returncode == 2 and "in use" in second.stderr
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass


def test_what_a_run_runs_on_may_change(data_dir, tmp_path):
    run_train(data_dir, tmp_path, max_steps=4)
    resumed = run_train(
        data_dir, tmp_path, max_steps=5, resume=True, dtype="bfloat16", micro_batch_size=8,
        eval_every=1, checkpoint_every=1, keep_checkpoints=1,
    )  # fmt: skip
    runs = [m for m in resumed if m["event"] == "run"]
    assert [m["dtype"] for m in runs] == ["float32", "bfloat16"]
    assert [m["micro_batch_size"] for m in runs] == [4, 8]


# -----------------------------------------------------------------------------
# hostile files


def mutations(data: bytes, count: int, seed: int):
    """Yield damaged copies: bytes changed, cut off, put in, repeated."""
    rng = random.Random(seed)
    for _ in range(count):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(max(1, len(bad)))
            match rng.randrange(4):
                case 0:
                    bad[place : place + 1] = bytes([rng.randrange(256)])
                case 1:
                    del bad[place : place + rng.randrange(1, 50)]
                case 2:
                    bad[place:place] = rng.randbytes(rng.randrange(1, 20))
                case 3:
                    bad[place : place + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"9" * 8))
        yield bytes(bad)


@pytest.mark.parametrize("kind", ["shard.npy", "shard.bin", "manifest", "checkpoint"])
def test_mutated_files_never_raise_anything_but_the_one_line(data_dir, tmp_path, kind):
    folder = write_shards(tmp_path / "data", {"a_train_1.npy": 300})
    path, read = folder / "a_train_1.npy", lambda: open_shards(folder, "train")
    if kind == "shard.bin":
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 300
        data = header.tobytes() + np.load(path).tobytes()
        path.unlink()
        path = folder / "a_train_1.bin"
    elif kind == "manifest":
        path = folder / "manifest.json"
        shards = [{"name": "a_train_1.npy", "tokens": 300, "sha256": "0" * 64}]
        data = json.dumps({"source": "local", "shards": shards}).encode()
    elif kind == "checkpoint":
        run_train(data_dir, tmp_path / "log", max_steps=1, n_layer=1, n_embd=8, vocab_size=300)
        path = tmp_path / "log" / "ckpt_000001.pt"
        read = lambda: load_model(path)  # noqa: E731
        data = path.read_bytes()
    else:
        data = path.read_bytes()
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bad in mutations(data, 300, seed=1):
        path.write_bytes(bad)
        try:
            read()
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path.name) in str(error) or "a_train_1" in str(error)
    assert refused > 20, "the mutations must do some harm"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KB more memory for files of {len(data)} bytes"


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Evil(), "model_config": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_huge_model_in_a_small_checkpoint_is_not_built(data_dir, tmp_path):
    run_train(data_dir, tmp_path, max_steps=1)
    state = read_checkpoint(tmp_path / "ckpt_000001.pt")
    for name in ("n_layer", "n_embd", "block_size", "vocab_size"):
        lie = {**state, "model_config": {**state["model_config"], name: 1 << 30}}
        torch.save(lie, tmp_path / "lie.pt")
        with pytest.raises(ValueError, match="another architecture"):
            load_model(tmp_path / "lie.pt")
