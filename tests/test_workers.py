"""common/workers.py: the pool reports a dead worker and leaves no process behind."""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from common import workers
from common.workers import cgroup_cores, count_cores, worker_pool

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal
from common.workers import worker_pool
with worker_pool(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


WAITS = """
import signal, time
from common.workers import worker_pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored
with worker_pool(2) as pool:
    pool.submit(print, 'ready', flush=True)
    time.sleep(60)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_does_not_reach_a_worker_that_starts():
    """It would print a traceback in the middle of its imports."""
    with worker_pool(1) as pool:
        status = pool.submit(Path("/proc/self/status").read_text).result()
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert int(blocked, 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "here it arrives"


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


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_no_folder_behind(tmp_path, stop):
    words, env = [sys.executable, "-c", WAITS], {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=-1, stderr=-1, start_new_session=True
    )
    assert process.stdout.readline() == b"ready\n"
    assert list(tmp_path.iterdir())
    os.killpg(process.pid, stop)
    process.communicate(timeout=30)  # until the last of them has ended
    assert not list(tmp_path.iterdir())


def fake_root(root: Path, files: dict[str, str]) -> Path:
    """Write files as they are in /proc and /sys of a container."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CPU, MAX = "sys/fs/cgroup/cpu,cpuacct/", "sys/fs/cgroup/"
V1 = {"proc/self/cgroup": "9:memory:/m\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"}
V2 = {"proc/self/cgroup": "0::/kubepods/pod:1/abc\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),  # no Linux
        (V2, math.inf),
        ({**V2, MAX + "kubepods/pod:1/abc/cpu.max": "150000 100000\n"}, 1.5),
        ({**V2, MAX + "kubepods/pod:1/abc/cpu.max": "max 100000\n"}, math.inf),
        ({**V2, MAX + "kubepods/pod:1/abc/cpu.max": "damaged\n"}, math.inf),
        ({**V2, MAX + "kubepods/cpu.max": "50000 100000\n", MAX + "cpu.max": "max 100000\n"}, 0.5),
        ({**V2, MAX + "cpu.max": "400000 100000\n"}, 4),  # the container's own group is the root
        (
            {**V2, MAX + "kubepods/pod:1/abc/cpu.max": "3 1\n", MAX + "kubepods/cpu.max": "2 1\n"},
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", MAX + "cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/../other\n", MAX + "cpu.max": "200000 100000\n"}, 2),
        (V1, math.inf),
        (
            {
                **V1,
                CPU + "docker/abc/cpu.cfs_quota_us": "250000\n",
                CPU + "docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        ({**V1, CPU + "cpu.cfs_quota_us": "-1\n", CPU + "cpu.cfs_period_us": "100000\n"}, math.inf),
        (
            {
                **V1,
                MAX + "cpu/cpu.cfs_quota_us": "50000\n",
                MAX + "cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({**V1, MAX + "memory/m/cpu.cfs_quota_us": "1\n"}, math.inf),
    ],
)
def test_the_cpu_limit_of_a_container_is_found_at_every_level(tmp_path, files, cores):
    assert cgroup_cores(fake_root(tmp_path, files)) == cores


@pytest.mark.parametrize(("limit", "cores"), [(0.1, 1), (1.5, 2), (2, 2), (7.5, 4), (math.inf, 4)])
def test_a_part_of_a_core_counts_as_one_and_the_affinity_is_the_most(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(workers, "cgroup_cores", lambda: limit)
    assert (count_cores(), type(count_cores())) == (cores, int)


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(workers, "cgroup_cores", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert count_cores() == 7


def test_workers_that_take_turns_get_every_nth_task():
    with worker_pool(3, in_turn=True) as pool:
        pids = [task.result() for task in [pool.submit(os.getpid) for _ in range(9)]]
        assert pids == pids[:3] * 3 and len(set(pids)) == 3
        with pytest.raises(BrokenProcessPool):
            pool.submit(os._exit, 1).result(timeout=30)


# -----------------------------------------------------------------------------
# large results


def packed_ones(count: int) -> workers.Packed:
    return workers.pack(np.ones(count, np.uint16))


def packed_on_a_full_disk(count: int) -> tuple[workers.Packed, list[str]]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return packed_ones(count), os.listdir(workers.scratch)


def packed_without_a_folder(count: int) -> workers.Packed:
    workers.scratch += "/there is no such folder"
    return packed_ones(count)


def test_a_large_result_comes_through_a_file_that_is_deleted():
    for count in (0, 5, 1_000_000):
        with worker_pool(1) as pool:
            path, dtype = pool.submit(packed_ones, count).result()
            assert Path(path).stat().st_size == 2 * count
            array = workers.unpack((path, dtype))
            assert array.dtype == np.uint16 and array.tolist() == [1] * count
            assert not Path(path).exists() and Path(path).parent.exists()
        assert not Path(path).parent.exists()


def test_without_room_for_a_file_a_result_comes_through_the_pipe():
    with worker_pool(1) as pool:
        array = pool.submit(packed_without_a_folder, 5).result()
    assert workers.unpack(array).tolist() == [1] * 5
    with worker_pool(1) as pool:
        array, left = pool.submit(packed_on_a_full_disk, 500).result()
    assert workers.unpack(array).tolist() == [1] * 500
    assert not left, "it would take the last room"
    assert workers.pack(array) is array, "only a worker packs"


def test_files_of_results_are_deleted_when_the_main_process_is_killed(tmp_path):
    code = (
        "import os, signal\n"
        "from test_workers import packed_ones, worker_pool\n"
        "with worker_pool(2) as pool:\n"
        "    print(pool.submit(packed_ones, 5).result()[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert result.stdout.startswith(str(tmp_path)), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_this_process_is_known_on_linux():
    before = workers.resident_memory()
    if not Path("/proc/self/statm").exists():
        assert before is None
        return
    array = np.ones(100 << 20, np.uint8)
    assert 90 << 20 < workers.resident_memory() - before < 200 << 20
    del array
