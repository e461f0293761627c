"""common/workers.py: the pool reports a dead worker and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from common.workers import count_cores, worker_pool

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal
from common.workers import worker_pool
with worker_pool(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_dies_raises_broken_process_pool():
    with worker_pool(1) as pool:
        with pytest.raises(BrokenProcessPool):
            pool.submit(os._exit, 1).result(timeout=30)
        with pytest.raises(BrokenProcessPool):
            pool.submit(os.getpid)  # and no later task hangs


def test_workers_ignore_ctrl_c():
    with worker_pool(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert pool.submit(os.getpid).result() != os.getpid()


def test_an_error_in_the_main_process_cancels_the_tasks_that_wait():
    start = time.monotonic()
    with pytest.raises(ValueError, match="stop"), worker_pool(1) as pool:
        tasks = [pool.submit(time.sleep, 0.1) for _ in range(1000)]
        raise ValueError("stop")
    assert time.monotonic() - start < 30
    assert sum(task.cancelled() for task in tasks) > 900


def test_workers_end_when_the_main_process_is_killed():
    words = [sys.executable, "-c", KILLED]
    # a worker that lived on would hold stdout open, and `run` would wait for it
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == -signal.SIGKILL
    assert int(result.stdout)


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert count_cores() == 7
