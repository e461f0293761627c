"""Two nodes on one Linux machine, joined by a switch, for tests of runs on several machines.

A node is a set of namespaces: its network, host name, hosts file and process ids are its own. The
kernel kills every process of a node and removes its network as soon as process 1 of it ends. So
nothing is left behind, and nodes of other tests cannot get in the way.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT, RUN, flags

NAMESPACES = ("--net", "--uts", "--mount", "--pid")
# Process 1 is a `cat`: it ends when its input closes, which happens even if pytest is killed.
SET_UP = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && exec cat'


def why_not_here() -> str:
    """Return why this machine cannot hold two nodes, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    missing = [t for t in ("ip", "unshare", "nsenter", "pgrep") if not shutil.which(t)]
    return f"needs {', '.join(missing)}" if missing else ""


def wait_until(done: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Wait until `done()` is true; AssertionError with `what` if it takes too long."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Return the ids of a process's children, oldest first."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class Node:
    """One machine: what runs on it sees only its own network, host name and processes."""

    def __init__(self, name: str, hosts: Path):
        """Make the node. Raises OSError if the kernel does not allow it."""
        self.name, self.log = name, hosts.with_name(f"{name}.log")
        self.launcher: subprocess.Popen | None = None  # what start() has started last
        make = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child", "sh", "-c"]
        self.process = subprocess.Popen(
            [*make, SET_UP, "sh", name, str(hosts)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("ready\n")
            self.process.stdin.flush()
        if self.process.stdout.readline() != "ready\n":
            raise OSError(f"a node cannot be made: {self.process.communicate()[1].strip()}")
        self.log.touch()

    def popen(self, *words: str, **settings) -> subprocess.Popen:
        """Start a command on this node, in the project's folder."""
        pid = self.process.pid  # of `unshare`: process 1 of the node is its child
        enter = ["nsenter", "--target", str(pid), "--net", "--uts", "--mount"]
        enter.append(f"--pid=/proc/{pid}/ns/pid_for_children")
        go = ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT)]
        return subprocess.Popen([*enter, *go, *words], **settings)

    def run(self, words: str) -> None:
        """Run a command on this node to its end. Raises OSError if it fails."""
        process = self.popen(*words.split(), stderr=subprocess.PIPE, text=True)
        error = process.communicate(timeout=30)[1]
        if process.returncode:
            raise OSError(f"{words}: {error.strip()}")

    @property
    def agent(self) -> int:
        """The process id of torchrun."""
        return children(self.launcher.pid)[0]

    @property
    def workers(self) -> list[int]:
        """The process ids of the ranks."""
        return children(self.agent)

    @property
    def output(self) -> str:
        """All that torchrun and the ranks have printed on this node."""
        return self.log.read_text(errors="replace")

    @property
    def rounds(self) -> int:
        """How often the ranks of this node were started."""
        return self.output.count("Rendezvous complete for workers")

    @property
    def restarts(self) -> int:
        """How many of `--max-restarts` torchrun has used up."""
        return max(map(int, re.findall(r"restart_count=(\d+)", self.output)), default=0)

    def power_off(self) -> None:
        """Kill all processes of the node at once. Its network stays."""
        self.popen("sh", "-c", "kill -9 -1").wait(timeout=30)  # -1: all but process 1
        self.launcher.wait(timeout=30)

    def remove(self) -> None:
        """End the node, whatever state it is in."""
        self.process.communicate(timeout=30)  # closes the input of process 1
        if self.launcher:
            self.launcher.wait(timeout=30)


class Cluster:
    """Two nodes, a switch between them, and the command for several nodes."""

    def __init__(self, nodes: list[Node], switch: Node, data_dir: Path, out_dir: Path):
        """Connect the nodes. Raises OSError if the kernel does not allow it."""
        self.nodes, self.switch, self.data_dir, self.out_dir = nodes, switch, data_dir, out_dir
        switch.run("ip link add bridge type bridge")
        switch.run("ip link set bridge up")
        for i, node in enumerate(nodes, 1):
            switch.run(f"ip link add port{i} type veth peer cable{i}")
            switch.run(f"ip link set port{i} master bridge up")
            # not on the switch, which does not know the node's process id
            move = ["nsenter", "--target", str(switch.process.pid), "--net", "ip", "link", "set"]
            move += [f"cable{i}", "netns", str(node.process.pid), "name", "eth0"]
            moved = subprocess.run(move, capture_output=True, text=True)
            if moved.returncode:
                raise OSError(moved.stderr.strip())
            node.run(f"ip address add 10.77.0.{i}/24 dev eth0")
            node.run("ip link set eth0 up")

    def start(self, node: Node, *launcher: str, ranks: int = 1, **changes) -> None:
        """Give the README's command for several nodes on one of them."""
        settings = {**RUN, "data_dir": self.data_dir, "out_dir": self.out_dir, **changes}
        words = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
            f"--rdzv_endpoint={self.nodes[0].name}:29500", "--rdzv_id=gpt2", "--max-restarts=3",
            *launcher, "train_gpt2.py", "--resume", *flags(**settings),
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"}  # it logs its restarts
        with node.log.open("a") as log:
            node.launcher = node.popen(*words, env=env, stdout=log, stderr=subprocess.STDOUT)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, or 0."""
        paths = self.out_dir.glob("ckpt_*.pt")
        return max((int(path.stem.removeprefix("ckpt_")) for path in paths), default=0)

    def is_running(self) -> bool:
        """Return true. AssertionError if the command has ended on a node."""
        ended = [node.name for node in self.nodes if node.launcher.poll() is not None]
        assert not ended, f"the command has ended on {ended}\n{self.outputs()}"
        return True

    def wait_for_progress(self, round: int = 1) -> None:
        """Wait until the ranks of this round, counted from 1, have written a checkpoint."""
        # a rank may still write one after another rank was killed: first wait for the new ranks
        wait_until(
            lambda: self.is_running() and min(node.rounds for node in self.nodes) >= round,
            f"round {round}",
        )
        step = self.newest_step()
        wait_until(
            lambda: self.is_running() and self.newest_step() > step,
            f"a checkpoint after step {step}",
        )

    def exit_codes(self, seconds: float = 120) -> list[int]:
        """Wait until the command has ended on both nodes; return the exit codes."""
        end = time.monotonic() + seconds
        return [node.launcher.wait(max(0, end - time.monotonic())) for node in self.nodes]

    def set_cable(self, node: Node, state: str) -> None:
        """Plug the cable of a node into the switch ("up"), or pull it out ("down")."""
        self.switch.run(f"ip link set port{self.nodes.index(node) + 1} {state}")

    def outputs(self) -> str:
        """Return the end of what every node has printed."""
        return "\n".join(f"{node.name}:\n{node.output[-3000:]}" for node in self.nodes)


@contextlib.contextmanager
def two_nodes(folder: Path, data_dir: Path, names: tuple[str, str]) -> Iterator[Cluster]:
    """Yield two connected nodes of these names. At the end all their processes are gone.

    Raises OSError if the kernel does not allow it.
    """
    hosts = folder / "hosts"
    lines = [f"10.77.0.{i} {name}\n" for i, name in enumerate(names, 1)]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("switch", *names):
            nodes.append(Node(name, hosts))
            stack.callback(nodes[-1].remove)
        yield Cluster(nodes[1:], nodes[0], data_dir, folder / "log")
