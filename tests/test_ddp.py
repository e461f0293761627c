"""Several processes do what one process does, and agree on what they start from."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    RUN,
    Ended,
    error_lines,
    flags,
    losses,
    read_metrics,
    run_command_line,
    run_ranks,
    run_train,
    write_shards,
)

import train_gpt2
from common import checkpoint, ranks
from common.checkpoint import read_checkpoint


def be_command(rank: int, settings: list[dict]) -> None:
    """Be `python train_gpt2.py`, with the settings of this rank."""
    ranks.PATIENCE = 0.4
    sys.argv = ["train_gpt2.py", *flags(**{**RUN, **settings[rank]})]
    train_gpt2.main()


def train_ranks(tmp_path: Path, *settings: dict) -> list[Ended]:
    return run_ranks(tmp_path, be_command, len(settings), list(settings))


def ended_well(ended: list[Ended]) -> bool:
    assert [rank.code for rank in ended] == [0] * len(ended), ended
    return True


# Muon's bfloat16 makes more of the ranks' other order of summing
@pytest.mark.parametrize(("optimizer", "within"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_two_ranks_equal_one_process(data_dir, tmp_path, optimizer, within):
    run_train(data_dir, tmp_path / "one", optimizer=optimizer)
    settings = dict(data_dir=data_dir, out_dir=tmp_path / "two", optimizer=optimizer)
    ended = train_ranks(tmp_path, settings, settings)
    assert ended_well(ended)
    assert ended[0].out.count("step 5: validation loss") == 1
    assert ended[1].out == "", "rank 0 alone prints"
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(losses(one)) == 10
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, abs=within)
    validation = [[m["loss"] for m in run if m["event"] == "val"] for run in (one, two)]
    assert validation[0] == pytest.approx(validation[1], abs=within)


def test_two_ranks_branch_off_and_end_together_at_the_target(data_dir, tmp_path):
    run_train(data_dir, tmp_path / "trunk", max_steps=4, schedule="wsd", warmup_steps=1)
    whole = run_train(
        data_dir, tmp_path / "one", max_steps=20, schedule="wsd", warmup_steps=1, eval_every=2
    )
    target = next(m["loss"] for m in whole if m["event"] == "val" and m["step"] == 8)
    settings = dict(data_dir=data_dir, out_dir=tmp_path / "two", max_steps=20, schedule="wsd")
    settings |= dict(
        warmup_steps=1, branch_from=tmp_path / "trunk", target_loss=target + 1e-3, eval_every=2
    )
    assert ended_well(train_ranks(tmp_path, settings, settings))
    two = read_metrics(tmp_path / "two")
    assert [(m["step"], m["why"]) for m in two if m["event"] == "end"] == [(8, "target")]
    for a, b in zip(losses(whole), losses(two), strict=False):
        assert a == pytest.approx(b, abs=1e-5)
    again = train_ranks(tmp_path, *[{**settings, "resume": True}] * 2)
    assert ended_well(again) and "the run is finished after 8 steps" in again[0].out


def test_under_torchrun_a_mistake_is_printed_once(data_dir, tmp_path):
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": tmp_path, "micro_batch_size": 3})
    result = run_command_line("train_gpt2.py", *settings, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("train_gpt2.py: error: micro_batch_size 3") == 1
    assert 'train_gpt2.py", line' not in result.stderr, "torchrun has a traceback of its own"


# -----------------------------------------------------------------------------
# agreement


@pytest.mark.parametrize("others_see", ["nothing", "an older checkpoint"])
def test_all_ranks_continue_from_the_checkpoint_that_rank_0_sees(data_dir, tmp_path, others_see):
    # a network file system may show the newest file to the node that wrote it alone
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    settings = dict(optimizer="muon", max_steps=8, checkpoint_every=2, keep_checkpoints=0)
    run_train(data_dir, whole, **settings)
    for folder, steps in ((first, 6), (second, 4)):
        folder.mkdir()
        shutil.copy(whole / f"ckpt_{steps:06d}.pt", folder)
    if others_see == "nothing":
        shutil.rmtree(second)
    settings |= dict(data_dir=data_dir, resume=True)
    ended = train_ranks(tmp_path, *({**settings, "out_dir": out} for out in (first, second)))
    assert ended_well(ended) and "continuing after step 6" in ended[0].out
    expected = [line for line in losses(read_metrics(whole)) if line[0] >= 6]
    for a, b in zip(expected, losses(read_metrics(first)), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    end, resumed = (read_checkpoint(folder / "ckpt_000008.pt") for folder in (whole, first))
    for kind in ("optimizer", "muon"):
        for number, state in end[kind]["state"].items():
            for name, value in state.items():
                other = resumed[kind]["state"][number][name]
                assert torch.allclose(torch.as_tensor(value), torch.as_tensor(other), atol=1e-4)


def test_ranks_with_other_data_are_refused_with_both_fingerprints(data_dir, tmp_path):
    other = write_shards(tmp_path / "other", {"a_val_0.npy": 1000, "a_train_1.npy": 1700})
    one, two = dict(data_dir=data_dir, out_dir=tmp_path / "log"), dict(data_dir=other)
    ended = train_ranks(tmp_path, one, {**one, **two})
    (line,) = error_lines(ended)
    marks = [train_gpt2.fingerprint(folder) for folder in (other, data_dir)]
    assert f"error: data is {marks[0]} on rank 1 and {marks[1]} on rank 0: start all" in line
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_lr": 1e-3}, "max_lr is 0.001 on rank 1 and 0.003 on rank 0"),
        ({"dtype": "bfloat16"}, "dtype is torch.bfloat16 on rank 1 and torch.float32 on rank 0"),
    ],
)
def test_ranks_with_other_settings_are_refused(data_dir, tmp_path, change, message):
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log")
    (line,) = error_lines(train_ranks(tmp_path, same, {**same, **change}))
    assert message in line


def test_a_rank_that_cannot_read_the_data_ends_all_at_once(data_dir, tmp_path):
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log")
    ended = train_ranks(tmp_path, same, {**same, "data_dir": tmp_path / "nothing"})
    (line,) = error_lines(ended)
    assert line.startswith("train_gpt2.py: error: rank 1: ") and "nothing: no such folder" in line
    assert [rank.code for rank in ended] == [2, 2]


def run_out_of_memory(rank: int, settings: list[dict], place: str) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        owner = torch.nn.parallel if place == "DistributedDataParallel" else train_gpt2
        setattr(owner, place, full)
    be_command(rank, settings)


@pytest.mark.parametrize(
    ("place", "what_to_do"),
    [
        (
            "DistributedDataParallel",
            "give more GPUs, --recompute on, or a smaller --block_size or --preset",
        ),
        ("train_step", "start again with another --out_dir and --micro_batch_size 2"),
    ],
)
def test_a_rank_that_runs_out_of_memory_says_so_and_no_other_rank_adds_to_it(
    data_dir, tmp_path, place, what_to_do
):
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log")
    ended = run_ranks(tmp_path, run_out_of_memory, 2, [same, same], place)
    expected = f"rank 1: out of memory: {what_to_do}"
    assert error_lines(ended) == [f"train_gpt2.py: error: {expected}"]
    assert [rank.code for rank in ended] == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give --total_batch_size 192 or 288"),
        (
            {"total_batch_size": 384, "batch_ramp_tokens": 1000, "batch_ramp_start": 64},
            "give --batch_ramp_start 48 or 96",
        ),
    ],
)
def test_three_ranks_are_told_which_batches_they_can_share(data_dir, tmp_path, change, message):
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log", micro_batch_size=1) | change
    (line,) = error_lines(train_ranks(tmp_path, same, same, same))
    assert line.endswith(f"is not a multiple of block_size 16 * 3 ranks: {message}"), line


def test_a_run_that_is_there_already_is_refused_once_by_all(data_dir, tmp_path):
    run_train(data_dir, tmp_path / "log", max_steps=1)
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log")
    (line,) = error_lines(train_ranks(tmp_path, same, same))
    assert line.startswith(f"train_gpt2.py: error: {tmp_path / 'log'} holds a run: use --resume")


# -----------------------------------------------------------------------------
# rank 0 works, the others wait


def slow_once(work: Callable) -> Callable:
    """Return the same function; its first call takes longer than the time limit of the test."""
    calls = iter([3.5])  # seconds

    def slow(*args):
        time.sleep(next(calls, 0))
        return work(*args)

    return slow


def work_slowly(rank: int, settings: list[dict]) -> None:
    train_gpt2.sample_text = slow_once(train_gpt2.sample_text)
    train_gpt2.write_huggingface = slow_once(train_gpt2.write_huggingface)
    checkpoint.write_checkpoint = slow_once(checkpoint.write_checkpoint)
    be_command(rank, settings)


@pytest.mark.slow  # test_ranks.py has the short form
def test_work_of_rank_0_alone_may_take_longer_than_the_time_limit(data_dir, tmp_path):
    same = dict(data_dir=data_dir, out_dir=tmp_path / "log", timeout_minutes=0.05, max_steps=2)
    same |= dict(eval_every=0, sample_every=5, vocab_size=50257, n_embd=16)
    assert ended_well(run_ranks(tmp_path, work_slowly, 2, [same, same]))
    assert (tmp_path / "log" / "hf" / "config.json").exists()


# -----------------------------------------------------------------------------
# two GPUs

ON_GPUS = dict(device="cuda", dtype="float32", compile="auto")


@pytest.mark.gpus
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_gpus_equal_one(data_dir, tmp_path, optimizer):
    run_train(data_dir, tmp_path / "one", optimizer=optimizer, **ON_GPUS)
    settings = {**RUN, **ON_GPUS, "data_dir": data_dir, "out_dir": tmp_path / "two"}
    settings |= dict(optimizer=optimizer)
    result = run_command_line("train_gpt2.py", *flags(**settings), ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (losses(read_metrics(tmp_path / name)) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


FAILING = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt2
step = train_gpt2.train_step
def fail(*args, **kwargs):
    if os.environ["RANK"] == "1":
        raise ValueError("its own")
    return step(*args, **kwargs)
train_gpt2.train_step = fail
train_gpt2.main()
"""


@pytest.mark.gpus
def test_with_nccl_an_error_of_one_rank_ends_all_in_seconds(data_dir, tmp_path):
    script = tmp_path / "train_gpt2.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    settings = {**RUN, **ON_GPUS, "data_dir": data_dir, "out_dir": tmp_path / "log"}
    start = time.monotonic()
    result = run_command_line(str(script), *flags(**settings, timeout_minutes=10), ranks=2)
    assert result.returncode != 0 and time.monotonic() - start < 100
    assert result.stderr.count("train_gpt2.py: error: rank 1: its own") == 1


@pytest.mark.gpus
def test_more_ranks_than_gpus_are_one_line(data_dir, tmp_path):
    settings = {**RUN, **ON_GPUS, "data_dir": data_dir, "out_dir": tmp_path / "log"}
    count = torch.cuda.device_count()
    result = run_command_line("train_gpt2.py", *flags(**settings), ranks=count + 1)
    line = f"train_gpt2.py: error: {count + 1} ranks on this machine, but torch sees {count} GPUs"
    assert result.stderr.count(line) == 1
