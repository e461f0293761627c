"""Worker processes: how many, how they start, and how they end."""

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path, PurePosixPath


def count_cores() -> int:
    """Return the number of cores that this process may use: a container may have less than all."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, math.ceil(min(cores, cgroup_cores())))


def cgroup_cores(root: Path = Path("/")) -> float:
    """Return the cores that the CPU limit of this process's cgroup is worth; infinity without one.

    `docker run --cpus=2` and Kubernetes set such a limit: microseconds of work in each period. That
    of a parent holds too. A container may see its own cgroup as the root, under another path than
    /proc says, so all levels up to the root are looked at, and those that are missing are left out.
    Source: the kernel's cgroup-v2.rst and, for version 1, sched-bwc.rst.
    """

    def numbers(*paths: Path) -> list[int]:
        try:
            return [int(word) for path in paths for word in path.read_text("utf-8").split()]
        except (OSError, ValueError):  # no such file, or "max"
            return []

    limit = math.inf
    try:
        groups = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, ValueError):  # not Linux
        return limit
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            names, mounts = ("cpu.max",), {""}
        elif "cpu" in controllers.split(","):  # version 1 has a mount for each, or for a few
            names, mounts = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), {controllers, "cpu"}
        else:
            continue
        for mount in mounts:
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                folder = root / "sys/fs/cgroup" / mount / str(group).lstrip("/")
                match numbers(*(folder / name for name in names)):
                    case [quota, period] if quota > 0 and period > 0:
                        limit = min(limit, quota / period)
    return limit


@contextlib.contextmanager
def worker_pool(num_proc: int) -> Iterator[Executor]:
    """Run worker processes, started with `spawn`, which works on every system.

    If a worker dies, the results that are missing raise BrokenProcessPool.
    """
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, spawn, initializer=start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Ignore Ctrl-C, which the main process handles. End when it ends, even if it is killed."""
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
