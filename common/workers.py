"""Worker processes: how many, how they start, and how they end."""

import contextlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np


def count_cores() -> int:
    """Return the number of cores that this process may use: a container may have less than all."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, math.ceil(min(cores, cgroup_cores())))


def cgroup_cores(root: Path = Path("/")) -> float:
    """Return the cores that the CPU limit of this process's cgroup is worth; infinity without one.

    `docker run --cpus=2` and Kubernetes set such a limit: microseconds of work in each period. A
    parent's counts too. A container may see its own cgroup as the root, under another path than
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


def resident_memory() -> int | None:
    """Return the bytes of memory that this process has now; None on other systems than Linux."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


class InTurn(Executor):
    """Executors that get the tasks in turns: task k goes to executor k modulo their number."""

    def __init__(self, executors: list[Executor]):
        self.executors = executors
        self.turns = itertools.cycle(executors)

    def submit(self, *task: Any, **settings: Any) -> Future:
        return next(self.turns).submit(*task, **settings)

    def shutdown(self, *args: Any, **settings: Any) -> None:
        for executor in self.executors:
            executor.shutdown(*args, **settings)


class Worker(SpawnProcess):
    """A process that Ctrl-C never reaches: while it starts, it would print a traceback."""

    def start(self) -> None:
        if os.name == "nt":
            return super().start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerContext(SpawnContext):
    """How workers start: `spawn` works on every system."""

    Process = Worker


@contextlib.contextmanager
def worker_pool(num_proc: int, in_turn: bool = False) -> Iterator[Executor]:
    """Run worker processes.

    If a worker dies, the results that are missing raise BrokenProcessPool. With `in_turn` worker k
    gets the tasks k, k + num_proc, …; else the next task goes to the worker that is free first.
    """
    if os.name == "nt":
        num_proc = min(num_proc, 61)  # the most that Python can wait for there
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        settings = dict(mp_context=WorkerContext(), initializer=start_worker, initargs=(scratch,))
        if in_turn:
            pool = InTurn([ProcessPoolExecutor(1, **settings) for _ in range(num_proc)])
        else:
            pool = ProcessPoolExecutor(num_proc, **settings)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(scratch_folder: str) -> None:
    """Ignore Ctrl-C, which the main process handles. End when it ends, even if it is killed.

    The files that nobody has read are deleted then.
    """
    global scratch

    def follow() -> None:
        parent.join()
        shutil.rmtree(scratch_folder, ignore_errors=True)
        os._exit(1)

    def terminate(*_: object) -> None:
        time.sleep(1)  # if the main process ends too, `follow` cleans up meanwhile
        os._exit(1)

    scratch = scratch_folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
    parent = multiprocessing.parent_process()
    threading.Thread(target=follow, daemon=True).start()


# -----------------------------------------------------------------------------
# large results

scratch: str | None = None  # a worker's folder for results that the main process has not read yet
Packed = np.ndarray | tuple[str, str]  # an array, or the path and dtype of one


def pack(array: np.ndarray) -> Packed:
    """Return what a worker should return for a large array; `unpack` makes it an array again.

    The array goes through a file, which is mostly deleted before the system writes it to disk. A
    pool may have one pipe for all its workers, and shared memory is 64 MB in many containers.
    """
    if scratch is None:  # not in a worker process
        return array
    try:
        file, path = tempfile.mkstemp(dir=scratch)
        try:
            with open(file, "wb") as out:
                out.write(array.data)
        except OSError:
            os.unlink(path)
            raise
        return path, array.dtype.str
    except OSError:  # the disk is full: then through the pipe
        return array


def unpack(packed: Packed) -> np.ndarray:
    """Return the array that a worker has packed. Its file is deleted."""
    if isinstance(packed, np.ndarray):
        return packed
    path, dtype = packed
    array = np.fromfile(path, dtype)
    os.unlink(path)
    return array
