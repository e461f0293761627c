"""Ranks join each other, agree, wait for rank 0, report an error once, and leave together."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Ended, error_lines, run_ranks

from common import cli, parallel, ranks
from common.ranks import Round, enter_round

CPU = torch.device("cpu")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Each test starts like a process that no launcher has started."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_round", None)


# -----------------------------------------------------------------------------
# real ranks


def join(rank: int, body: Callable, minutes: float) -> None:
    """Join the other ranks and run `body` as a command does."""
    ranks.PATIENCE = 0.4
    try:
        with ranks.join_ranks(minutes) as (rank, world_size), ranks.process_group("cpu"):
            body(rank, world_size)
    except (ValueError, OSError) as error:
        ranks.fail("test.py", cli.explain(error))


def run(
    folder: Path,
    body: Callable,
    world_size: int = 2,
    minutes: float = 0.5,
    killed: int | None = None,
) -> list[Ended]:
    return run_ranks(folder, join, world_size, body, minutes, killed=killed)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> dict[Callable, list[Ended]]:
    """Runs of two ranks that mostly wait, all at the same time; what their ranks have left."""
    with ThreadPoolExecutor() as pool:
        runs = {
            body: pool.submit(run, tmp_path_factory.mktemp("run"), body, 2, 0.05, killed)
            for body, killed in ((second_is_silent, None), (first_is_frozen, 0), (long_work, None))
        }
        return {body: ended.result() for body, ended in runs.items()}


def codes(ended: list[Ended]) -> list[int]:
    return [rank.code for rank in ended]


def second_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("out of memory")
    ranks.all_sum(1, CPU)


def test_an_error_of_one_rank_is_printed_once_with_the_rank(tmp_path):
    # the other rank is in an all-reduce, and must not add a message of its own
    results = run(tmp_path, second_fails)
    assert error_lines(results) == ["test.py: error: rank 1: out of memory"]
    assert codes(results) == [2, 2]


def first_fails(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("out of memory")
    ranks.all_sum(1, CPU)


def test_an_error_of_the_rank_that_holds_the_store_is_printed_once_too(tmp_path):
    # without torchrun the store is in rank 0: if it left at once, the others could not ask it why
    results = run(tmp_path, first_fails)
    assert error_lines(results) == ["test.py: error: rank 0: out of memory"]
    assert codes(results) == [2, 2]


def all_fail(rank: int, world_size: int) -> None:
    time.sleep(0.05 * rank)
    raise OSError("no such folder")


def test_an_error_of_all_ranks_is_printed_once_without_a_rank(tmp_path):
    results = run(tmp_path, all_fail, world_size=3)
    assert error_lines(results) == ["test.py: error: no such folder"]
    assert codes(results) == [2, 2, 2]


def some_fail(rank: int, world_size: int) -> None:
    if rank:
        raise OSError("no driver")
    ranks.all_sum(1, CPU)


def test_an_error_of_some_ranks_is_printed_once_with_one_of_them(tmp_path):
    (line,) = error_lines(run(tmp_path, some_fail, world_size=3))
    assert line in ("test.py: error: rank 1: no driver", "test.py: error: rank 2: no driver")


def each_fails(rank: int, world_size: int) -> None:
    raise ValueError(f"number {rank}")


def test_different_errors_are_all_printed(tmp_path):
    results = run(tmp_path, each_fails)
    assert sorted(error_lines(results)) == [f"test.py: error: rank {n}: number {n}" for n in (0, 1)]


def second_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(9)
    ranks.all_sum(1, CPU)


def test_a_rank_that_dies_is_an_error_of_one_line(tmp_path):
    results = run(tmp_path, second_dies)
    assert error_lines(results) == ["test.py: error: rank 0: another rank has ended"]
    assert codes(results) == [2, 9]


def second_is_silent(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(7)
        os._exit(0)
    ranks.all_sum(1, CPU)


def test_a_rank_that_is_silent_is_an_error_of_one_line(waiting):
    results = waiting[second_is_silent]
    expected = "test.py: error: rank 0: another rank has been silent for 0.05 minutes"
    assert error_lines(results) == [expected]


def long_work(rank: int, world_size: int) -> None:
    def work() -> dict:
        assert rank == 0
        time.sleep(4.5)
        return {"step": 3, "moments": [torch.arange(6).view(2, 3).t(), torch.tensor(1.5)]}

    value = ranks.on_rank_0(work)
    assert ranks.on_rank_0(lambda: None) is None
    assert [t.device.type for t in value["moments"]] == 2 * [["cpu", "meta"][rank]]
    matrix, number = (parallel.from_rank_0(t, torch.empty(1)) for t in value["moments"])
    assert torch.equal(matrix, torch.arange(6).view(2, 3).t())
    assert (value["step"], number.item(), number.shape) == (3, 1.5, ())
    print("equal")


def test_work_of_rank_0_may_take_longer_than_the_time_limit_and_its_result_reaches_all(waiting):
    results = waiting[long_work]
    assert [rank.out for rank in results] == ["equal\n"] * 2, results
    assert error_lines(results) == []


def first_has_no_room(rank: int, world_size: int) -> None:
    def work() -> None:
        with cli.advice("make room"):
            raise OSError("disk full")

    with cli.advice("wrong kind", ValueError), cli.advice("then resume", OSError):
        ranks.on_rank_0(work)


def test_an_error_of_rank_0_alone_reaches_all_ranks_with_its_kind_and_is_printed_once(tmp_path):
    results = run(tmp_path, first_has_no_room)
    assert error_lines(results) == ["test.py: error: disk full: make room: then resume"]
    assert codes(results) == [2, 2]


def first_is_frozen(rank: int, world_size: int) -> None:
    ranks.all_sum(1, CPU)
    time.sleep(0.5)  # the other rank must be done with the store, as in a step
    if rank == 0:  # it holds the store, which has no time limit of its own
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.all_sum(1, CPU)


def test_a_frozen_rank_that_holds_the_store_does_not_hang_the_others(waiting):
    results = waiting[first_is_frozen]
    (line,) = error_lines(results[1:])
    assert line.startswith("test.py: error: rank 1: ") and results[1].code == 2


def test_a_bug_on_one_rank_ends_the_others_without_a_message_of_their_own(tmp_path):
    results = run(tmp_path, second_has_a_bug)
    assert "KeyError: 'a bug'" in results[1].err and results[1].code == 1
    assert results[0] == (2, "", "")


def second_has_a_bug(rank: int, world_size: int) -> None:
    if rank:
        raise KeyError("a bug")
    ranks.check_equal({"step": 1})


def third_differs(rank: int, world_size: int) -> None:
    ranks.check_equal({"step": 4, "data": "ab"})
    print("equal")
    ranks.check_equal({"step": 4, "data": "ab" if rank < 2 else "cd"})


def test_a_fact_that_differs_names_the_rank_and_both_values(tmp_path):
    results = run(tmp_path, third_differs, world_size=3)
    assert error_lines(results) == ["test.py: error: data is cd on rank 2 and ab on rank 0"]
    assert [rank.out for rank in results] == ["equal\n"] * 3


def first_is_late(rank: int) -> None:
    join(rank, lambda rank, world_size: time.sleep(1.5 * (rank == 0)), 0.5)
    print(time.time())


def test_no_rank_leaves_before_the_others_are_done(tmp_path):
    # else gloo's threads may still hold a tensor when Python ends, and abort the rank and the job
    left = [float(rank.out) for rank in run_ranks(tmp_path, first_is_late, 2)]
    assert abs(left[0] - left[1]) < 0.7


# -----------------------------------------------------------------------------
# joining


def enter_all(store: dist.Store, world_size: int) -> list[dist.Store]:
    """Let all ranks of a round join at the same time; return the store of each."""
    entered: dict[int, dist.Store] = {}

    def enter(rank: int) -> None:
        entered[rank] = enter_round(store, Round(rank, world_size, limit=20))

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(world_size)]
    for thread in threads[::-1]:  # rank 0 last: what it reads first is old
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return [entered[rank] for rank in range(world_size)]


def test_a_round_reads_nothing_that_an_earlier_round_has_left():
    # torchrun keeps one store: a restarted rank would connect to the address of a dead rank
    store = dist.HashStore()
    first = enter_all(store, 3)
    first[0].set("address of rank 0", "old")
    assert all(s.get("address of rank 0") == b"old" for s in first)
    store.set("note/1", "from a rank that was killed while it joined")
    second = enter_all(store, 3)
    assert not any(s.check(["address of rank 0"]) for s in second)
    second[0].set("address of rank 0", "new")
    assert all(s.get("address of rank 0") == b"new" for s in second)


def test_a_rank_that_does_not_join_is_named():
    store = dist.HashStore()
    with pytest.raises(OSError, match="these ranks did not join: 1, 2: start all ranks"):
        enter_round(store, Round(0, 3, limit=0.1))
    with pytest.raises(OSError, match="rank 0 did not join"):
        enter_round(dist.HashStore(), Round(1, 3, limit=0.1))


def test_a_process_alone_is_rank_0_of_1_and_joins_nothing():
    with ranks.join_ranks(3) as found, ranks.process_group("cpu"):
        assert found == (0, 1)
        assert not dist.is_initialized()
        assert ranks.on_rank_0(lambda: 7) == 7 and ranks.all_sum(2.5, torch.device("cpu")) == 2.5
        ranks.check_equal({"step": 1})


ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR: start with torchrun, set"),
        ({"WORLD_SIZE": "", "MASTER_PORT": ""}, "but not WORLD_SIZE and MASTER_PORT: start"),
        ({"RANK": "one"}, "RANK, WORLD_SIZE or MASTER_PORT is no number"),
        ({"MASTER_PORT": "abc"}, "RANK, WORLD_SIZE or MASTER_PORT is no number"),
        ({"RANK": "5"}, "RANK is 5, but WORLD_SIZE is 2"),
    ],
)
def test_an_incomplete_environment_is_refused_by_every_rank(monkeypatch, capsys, change, message):
    for name, value in {**ENVIRONMENT, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught, ranks.join_ranks(1):
        raise AssertionError("must not be reached")
    with pytest.raises(SystemExit):  # rank 1 prints it: rank 0 may not have the error
        ranks.fail("test.py", str(caught.value))
    assert message in capsys.readouterr().err


def test_a_first_node_that_cannot_be_reached_is_named(monkeypatch):
    for name, value in {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)

    def refuse(url, timeout):
        raise dist.DistNetworkError("The client socket has timed out")

    monkeypatch.setattr(dist, "rendezvous", refuse)
    with (
        pytest.raises(OSError, match=r"do not meet at 127.0.0.1:9 \(The client"),
        ranks.join_ranks(1),
    ):
        pass


# -----------------------------------------------------------------------------
# devices


@pytest.fixture
def gpus(monkeypatch) -> list[str]:
    """Four GPUs that torch can use; what happens to them is recorded."""
    calls = []
    monkeypatch.setattr(ranks.hardware, "choose_device", lambda kind: kind.replace("auto", "cuda"))
    monkeypatch.setattr(ranks.hardware, "check_gpu", lambda device: calls.append(f"check {device}"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"use {device}"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return calls


def test_each_rank_takes_the_gpu_with_its_local_number(gpus, monkeypatch):
    assert ranks.local_device("auto") == torch.device("cuda")
    assert gpus == ["check cuda"], "a process alone leaves the choice to torch"
    monkeypatch.setattr(ranks, "_round", Round(11, 16))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks.local_device("cuda") == torch.device("cuda", 3)
    assert gpus[1:] == ["check cuda:3", "use cuda:3"]
    assert ranks.local_device("cpu") == CPU


def test_without_a_local_rank_a_process_takes_the_first_gpu(gpus, monkeypatch):
    # Kubernetes starts one process in a pod and sets RANK alone
    monkeypatch.setattr(ranks, "_round", Round(5, 16))
    assert ranks.local_device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "local", [{"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "2"}, {"LOCAL_RANK": "7"}]
)
def test_more_ranks_than_gpus_are_refused_by_all_ranks_of_the_machine(gpus, monkeypatch, local):
    monkeypatch.setattr(ranks, "_round", Round(2, 8))
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"8 ranks .* sees only 4 GPUs: start with --nproc_per_node=4"
    ):
        ranks.local_device("cuda")
    assert gpus == []


def test_a_process_that_sees_only_its_own_gpu_takes_it(gpus, monkeypatch):
    # srun --gpus-per-task=1: LOCAL_RANK counts tasks, not the GPUs that one of them sees
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "_round", Round(3, 8))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.local_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ValueError, match=r"sees only 1 GPU: start with --nproc_per_node=1"):
        ranks.local_device("cuda")


def test_several_ranks_on_a_mac_use_the_cpu(monkeypatch):
    monkeypatch.setattr(ranks.hardware, "choose_device", lambda kind: "mps")
    assert ranks.local_device("auto") == torch.device("mps")
    monkeypatch.setattr(ranks, "_round", Round(0, 2))
    assert ranks.local_device("auto") == CPU
    with pytest.raises(ValueError, match=r"device mps: several ranks .*--device cpu"):
        ranks.local_device("mps")


def test_a_gpu_that_fails_while_it_is_chosen_is_one_line(gpus, monkeypatch):
    def busy(device):
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy")

    monkeypatch.setattr(ranks.hardware, "check_gpu", busy)
    with pytest.raises(OSError, match=r"device cuda: CUDA error: .* busy"):
        ranks.local_device("cuda")


def test_a_gpu_that_is_not_used_is_reported_once_on_a_machine(monkeypatch):
    told = []
    monkeypatch.setattr(ranks.hardware, "choose_device", lambda kind: "cpu")
    monkeypatch.setattr(ranks.hardware, "warn_of_unused_gpu", lambda: told.append(1))
    ranks.local_device("cpu")
    assert told == [], "the CPU was asked for"
    for local_rank in "0123":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        ranks.local_device("auto")
    assert told == [1]


# -----------------------------------------------------------------------------
# leaving


class FakeDist:
    """Stands in for torch.distributed and records what is asked of it, in order."""

    DistError, DistBackendError = dist.DistError, dist.DistBackendError

    def __init__(self, backend: str):
        self.backend, self.calls = backend, []

    def init_process_group(self, backend, store, rank, world_size, timeout):
        assert (rank, world_size, timeout) == (1, 4, timedelta(minutes=3))
        self.calls.append(f"init {backend}")

    def all_reduce(self, tensor):
        self.calls.append("all_reduce")

    def barrier(self):
        self.calls.append("barrier")

    def destroy_process_group(self):
        self.calls.append("destroy")

    def is_initialized(self):
        return True

    def is_nccl_available(self):
        return self.backend == "nccl"

    def get_backend(self):
        return self.backend


@pytest.fixture
def fake(monkeypatch, request) -> FakeDist:
    fake = FakeDist(request.param)
    monkeypatch.setattr(ranks, "dist", fake)
    monkeypatch.setattr(ranks, "_round", Round(1, 4, limit=180, store=dist.HashStore()))
    monkeypatch.setattr(ranks, "check_equal", lambda facts: fake.calls.append(facts["device"]))
    monkeypatch.setattr(ranks.signal, "signal", lambda number, what: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: device)
    monkeypatch.setattr(ranks.cli, "print_error", lambda *words: fake.calls.append(words[1]))
    return fake


@pytest.mark.parametrize(
    ("fake", "kind", "expected"),
    [
        ("gloo", "cpu", ["cpu", "init gloo", "barrier", "destroy"]),
        ("nccl", "cuda", ["cuda", "init nccl", "all_reduce", "destroy"]),
        ("gloo", "cuda", ["cuda", "init gloo", "barrier", "destroy"]),  # Windows
    ],
    indirect=["fake"],
)
def test_gpus_use_nccl_and_ranks_on_cpus_wait_for_each_other_at_the_end(fake, kind, expected):
    with ranks.process_group(kind):
        pass
    assert fake.calls == expected


@pytest.mark.parametrize(
    ("fake", "kind", "after"),
    [("gloo", "cpu", ["destroy"]), ("nccl", "cuda", [])],
    indirect=["fake"],
)
def test_an_error_is_printed_first_and_nccl_does_not_wait_for_the_other_ranks(fake, kind, after):
    # NCCL's destroy waits for an all-reduce that the other ranks are in: --timeout_minutes long
    with pytest.raises(ValueError, match="its own"), ranks.process_group(kind):
        raise ValueError("its own")
    before = list(fake.calls)
    assert not {"barrier", "destroy"} & set(before), "the error must be printed before"
    with pytest.raises(SystemExit) as end:
        ranks.fail("test.py", "its own")
    assert end.value.code == 2
    assert fake.calls == [*before, "rank 1: its own", *after]


@pytest.mark.parametrize("fake", ["nccl"], indirect=True)
def test_an_error_is_printed_also_if_the_store_is_gone(fake, monkeypatch):
    def gone(*args):
        raise dist.DistNetworkError("connection reset")

    monkeypatch.setattr(ranks, "claim", gone)
    with pytest.raises(SystemExit):
        ranks.fail("test.py", "its own")
    assert fake.calls == ["rank 1: its own"]


def test_an_error_of_the_command_line_is_printed_once_on_each_node(monkeypatch, capsys):
    # it is typed on each node, and may be wrong on one of them alone
    line = "test.py: error: no such flag\n"
    for rank, local_rank, printed in (("8", "0", line), ("9", "1", ""), ("", "", line)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            ranks.fail("test.py", "no such flag")
        assert capsys.readouterr().err == printed
