"""
Measure the peak memory of a command's processes, from /proc (Linux), ten times a second:

    python benchmarks/data_memory.py fineweb.py --source 'corpus/*.parquet' --out_dir DIR
"""

import subprocess
import sys
import time
from pathlib import Path


def peak_of(pid: int) -> int:
    """Return the peak resident memory of a process in kB, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def main() -> None:
    process = subprocess.Popen([sys.executable, *sys.argv[1:]])
    peak, workers = 0, {}
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        for pid in children(process.pid):
            workers[pid] = max(workers.get(pid, 0), peak_of(pid))
        time.sleep(0.1)
    sizes = ", ".join(f"{size / 1024:.0f}" for size in sorted(workers.values(), reverse=True))
    print(f"main process {peak / 1024:.0f} MB; other processes {sizes} MB")


if __name__ == "__main__":
    main()
