"""Ranks join each other and leave together."""

from datetime import timedelta

import pytest
import torch
from conftest import ROOT, run_command_line

from common import ranks


class FakeDist:
    """Stands in for torch.distributed and records what is asked of it, in order."""

    PrefixStore = staticmethod(lambda prefix, store: f"{prefix}/{store}")

    def __init__(self):
        self.calls: list[str] = []

    def rendezvous(self, url, timeout):
        assert (url, timeout) == ("env://", timedelta(minutes=3))
        return iter([("store", 1, 4)])

    def init_process_group(self, backend, store, rank, world_size, timeout):
        assert (rank, world_size, timeout) == (1, 4, timedelta(minutes=3))
        self.calls.append(f"init {backend} {store}")

    def barrier(self):
        self.calls.append("barrier")

    def destroy_process_group(self):
        self.calls.append("destroy")


@pytest.fixture
def fake(monkeypatch) -> FakeDist:
    fake = FakeDist()
    monkeypatch.setattr(ranks, "dist", fake)
    for name in ("RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_a_process_alone_is_rank_0_of_1_and_joins_nothing(fake):
    with ranks.join_ranks("cpu", 3) as found:
        assert found == (0, 1)
    assert fake.calls == []
    assert ranks.local_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cpu", ["init gloo store", "barrier", "destroy"]), ("cuda", ["init nccl store", "destroy"])],
)
def test_gpus_use_nccl_and_ranks_on_cpus_wait_for_each_other_at_the_end(
    fake, monkeypatch, kind, expected
):
    monkeypatch.setenv("RANK", "1")
    with ranks.join_ranks(kind, 3) as found:
        assert found == (1, 4)
    assert fake.calls == expected


def test_a_restart_on_one_node_does_not_meet_the_addresses_of_the_ranks_before(fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with ranks.join_ranks("cpu", 3):
        pass
    assert fake.calls[0] == "init gloo 2/store"


def test_a_rank_with_an_error_does_not_wait_for_the_others(fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="its own"), ranks.join_ranks("cpu", 3):
        raise ValueError("its own")
    assert fake.calls == ["init gloo store", "destroy"]


def test_each_rank_takes_the_gpu_with_its_local_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.local_device("cuda") == torch.device("cuda", 3) == chosen[0]
    assert ranks.local_device("cpu") == torch.device("cpu")


LATE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from train_gpt2 import TrainConfig, set_up_machine
with set_up_machine(TrainConfig(device="cpu")) as machine:
    time.sleep(2 * machine.is_main)
Path(__file__).with_suffix(f".{{machine.rank}}").write_text(str(time.time()))
"""


def test_no_rank_leaves_before_the_others_are_done(tmp_path):
    # else gloo's threads may still hold a tensor when Python ends, and abort the rank and the job
    script = tmp_path / "late.py"
    script.write_text(LATE.format(root=str(ROOT)))
    result = run_command_line(str(script), ranks=2)
    assert result.returncode == 0, result.stderr
    left = [float(script.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    assert abs(left[0] - left[1]) < 1
