"""A run on two nodes survives the loss of a rank, of a node and of the network between them.

The nodes are network namespaces of this machine (two_nodes.py). `make test-faults` runs this file.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import RUN, flags, losses, read_metrics, run_command_line
from two_nodes import Cluster, kill, two_nodes, wait_until, why_not_here

from common.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "two nodes"),
]

# Muon, because its state is spread over the ranks
LONG = dict(max_steps=100, checkpoint_every=3, eval_every=20, optimizer="muon")
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@pytest.fixture
def cluster(tmp_path, data_dir, request) -> Iterator[Cluster]:
    """Two nodes; a test may choose their names. The first of them holds torchrun's rendezvous."""
    names = getattr(request, "param", ("node1", "node2"))
    with contextlib.ExitStack() as stack:
        try:
            nodes = stack.enter_context(two_nodes(tmp_path, data_dir, names))
        except OSError as error:
            pytest.skip(str(error))
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory) -> Path:
    """The folder of a run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = flags(**{**RUN, "data_dir": data_dir, "out_dir": folder, **LONG})
    result = run_command_line("train_gpt2.py", *settings, ranks=2)
    assert result.returncode == 0, result.stderr
    return folder


def assert_finished_like(undisturbed: Path, cluster: Cluster) -> None:
    """Both commands must succeed, with the numbers and weights of the undisturbed run."""
    assert cluster.exit_codes() == [0, 0], cluster.outputs()
    folders = (undisturbed, cluster.out_dir)
    expected, found = (losses(read_metrics(folder)) for folder in folders)
    assert found == expected
    expected, found = (read_checkpoint(folder / "ckpt_000100.pt")["model"] for folder in folders)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_three_killed_ranks_cost_three_restarts_and_no_step(cluster, undisturbed):
    for node in cluster.nodes:
        cluster.start(node, **LONG)
    for kills in range(3):
        cluster.wait_for_progress(round=kills + 1)
        kill(cluster.nodes[kills % 2].workers[0])
    assert_finished_like(undisturbed, cluster)
    assert [node.rounds for node in cluster.nodes] == [4, 4], "a failure cost two restarts"
    assert all(node.restarts <= 3 for node in cluster.nodes)


def test_a_node_that_is_cut_off_for_20_seconds_goes_on_and_can_still_restart(cluster, undisturbed):
    for node in cluster.nodes:
        cluster.start(node, **LONG)
    cluster.wait_for_progress()
    node = cluster.nodes[1]
    cluster.set_cable(node, "down")
    time.sleep(20)  # torchrun counts a node as dead after 15
    stopped = cluster.newest_step()
    cluster.set_cable(node, "up")
    wait_until(lambda: cluster.newest_step() > stopped, "a step after the cut")
    assert [node.rounds for node in cluster.nodes] == [1, 1], "the cut must not cost a restart"
    kill(node.workers[0])
    assert_finished_like(undisturbed, cluster)
    assert [node.rounds for node in cluster.nodes] == [2, 2]


# The node whose name comes first in the alphabet has rank 0, whichever holds the rendezvous.
@pytest.mark.parametrize("cluster", [("node1", "node2"), ("node2", "node1")], indirect=True)
def test_a_node_that_is_lost_comes_back_without_touching_the_first_one(
    cluster, undisturbed, monkeypatch
):
    monkeypatch.setenv(OWN_STORE, "1")
    for node in cluster.nodes:
        cluster.start(node, **LONG)
    cluster.wait_for_progress()
    lost = cluster.nodes[1]
    lost.power_off()
    cluster.start(lost, **LONG)
    assert_finished_like(undisturbed, cluster)
    assert [node.rounds for node in cluster.nodes] == [2, 2]


def test_after_the_loss_of_the_first_node_the_same_commands_continue_the_run(cluster, undisturbed):
    for node in cluster.nodes:
        cluster.start(node, **LONG)
    cluster.wait_for_progress()
    first, second = cluster.nodes
    kill(first.agent)  # the rendezvous ends with it
    codes = cluster.exit_codes(seconds=60)
    assert codes[1] != 0, "torchrun cannot go on without the rendezvous, and must not wait for it"
    for node in (second, first):
        cluster.start(node, **LONG)
    assert_finished_like(undisturbed, cluster)
    assert "continuing after step" in first.output
