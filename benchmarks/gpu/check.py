"""
Do on a GPU what the README shows, and time it:

    python benchmarks/gpu/check.py DATA_DIR OUT_DIR [--steps 40]

DATA_DIR has token shards. It trains GPT-2 124M with the defaults, alone on the GPU: compile,
evaluate, score, sample, SIGTERM, --resume. Then, several at a time: float16, the largest GPT-2, the
same run twice and interrupted, Muon, scoring, sampling, export. Last, and alone, out of memory on
purpose. Every command's output goes to OUT_DIR. The table is printed at the end.
"""

import argparse
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from common.metrics import METRICS, Curves  # noqa: E402

QUIET = "--eval_every 0 --sample_every 0 --hellaswag_every 0 --checkpoint_every 0"


def events(folder: Path, kind: str) -> list[dict]:
    """Return the events of a kind that a run has logged so far."""
    return Curves(folder).events.get(kind, []) if (folder / METRICS).exists() else []


class Check:
    """Runs commands, keeps what they print, and collects the rows of the table."""

    def __init__(self, out: Path):
        self.out, self.rows = out, []
        out.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, command: str, code: int = 0, limit: int = 300, until: tuple | None = None
    ) -> str:
        """Run a command; `until` (folder, steps): send SIGTERM once that many steps are logged."""
        words, start = [sys.executable, *shlex.split(command)], time.perf_counter()
        log = self.out / (re.sub(r"\W+", "_", name) + ".log")
        with log.open("w") as file:
            process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                time.sleep(0.2)
                seconds = time.perf_counter() - start
                if until and len(events(until[0], "train")) >= until[1]:
                    process.send_signal(signal.SIGTERM)
                    until = None
                if seconds > limit:
                    process.kill()
        text = log.read_text()
        lines = [line for line in text.splitlines() if line.strip()]
        good = process.returncode == code
        self.rows.append((
            "ok" if good else f"FAILED: {process.returncode}, not {code}",
            f"{time.perf_counter() - start:.1f} s", name, (lines or [""])[-1][:150],
        ))  # fmt: skip
        print(*self.rows[-1], sep=" | ", flush=True)
        if not good:
            print("\n".join(lines[-15:]), flush=True)
        return text

    def note(self, name: str, value: object) -> None:
        self.rows.append(("", "", name, value))
        print(name, value, sep=": ", flush=True)


def speed(folder: Path, first: int = 5) -> str:
    """Return the median of tokens a second, without the first steps, and what else was logged."""
    steps, run = events(folder, "train"), events(folder, "run")[:1]
    if len(steps) <= first:
        return f"{len(steps)} steps only"
    rates, wait, mfu = (
        [step[name] for step in steps[first:]] for name in ("tokens_per_sec", "data_wait", "mfu")
    )
    used = f"{statistics.median(mfu):.1%}" if None not in mfu else "unknown"
    return (
        f"{statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}), MFU "
        f"{used}, B {run[0]['micro_batch_size']}, {run[0]['dtype']}, first step "
        f"{steps[0]['dt']:.1f} s, waited {statistics.median(wait) * 1e3:.2f} ms for data, losses "
        f"{steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}, {len(events(folder, 'skip'))} skipped"
    )


def losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(folder, "train")}


def alone(check: Check, data: str, steps: int) -> None:
    """The default command, stopped and continued: nothing else runs on the GPU."""
    folder = check.out / "default"
    train = f"train_gpt2.py --data_dir {data} --out_dir {folder}"
    check.run("default, then SIGTERM", train, 143, 400, until=(folder, steps))
    check.note("default", speed(folder))
    check.run("default, --resume", f"{train} --resume", 143, until=(folder, steps + 12))
    check.note("default, continued", speed(folder, steps + 3))
    for kind, key in (("val", "loss"), ("hellaswag", "acc_norm")):
        check.note(kind, [(event["step"], event[key]) for event in events(folder, kind)])
    check.run("hellaswag.py, alone", f"hellaswag.py --model {folder}")


def together(check: Check, data: str, jobs: int) -> None:
    """Commands whose speed does not matter, several at a time."""
    out, train = check.out, f"train_gpt2.py --data_dir {data} {QUIET}"
    short = f"{train} --total_batch_size 65536 --micro_batch_size 16"

    def float16() -> None:
        folder = out / "float16"
        check.run(
            "float16, as on a T4", f"{short} --max_steps 40 --dtype float16 --out_dir {folder}"
        )
        check.note("float16", speed(folder))

    def xl() -> None:
        folder = out / "xl"
        words = "--preset gpt2-xl --total_batch_size 65536 --max_steps 6 --micro_batch_size 8"
        check.run("gpt2-xl", f"{train} {words} --out_dir {folder}", limit=400)
        check.note("gpt2-xl", speed(folder, 2))

    def too_large() -> None:
        words = f"--micro_batch_size 512 --max_steps 2 --out_dir {out / 'oom'}"
        check.run("out of memory on purpose", f"{train} {words}", 2)

    def repeat() -> None:
        words = f"{short} --max_steps 16 --seed 1"
        for name in ("once", "twice"):
            check.run(f"16 steps, {name}", f"{words} --out_dir {out / name}")
        cut = out / "interrupted"
        check.run("interrupted", f"{words} --out_dir {cut}", 143, until=(cut, 8))
        check.run("interrupted, --resume", f"{words} --out_dir {cut} --resume")
        a, b, c = (losses(out / name) for name in ("once", "twice", "interrupted"))
        for name, other in (("twice", b), ("interrupted", c)):
            most = max(abs(a[step] - other[step]) for step in a)
            check.note(f"largest difference of a loss, {name} against once", most)

    def muon() -> None:
        folder = out / "muon"
        check.run("muon", f"{short} --max_steps 40 --optimizer muon --out_dir {folder}")
        check.note("muon", speed(folder))

    def use() -> None:
        model = out / "default"
        check.run("sample.py", f"sample.py --model {model} --prompt 'The protocol' --seed 1")
        check.run("export.py", f"export.py {model} {out / 'exported'}")
        check.run("plot.py", f"plot.py {model}")
        check.run("hellaswag.py, exported", f"hellaswag.py --model {out / 'exported'} --limit 2000")
        check.run(
            "hellaswag.py, harness", f"hellaswag.py --model {model} --style harness --limit 2000"
        )

    def demo() -> None:
        check.run("fineweb.py", f"fineweb.py --source pydocs --out_dir {out / 'pydocs'}")
        words = f"--data_dir {out / 'pydocs'} --out_dir {out / 'tiny'} --eval_every 190"
        check.run("tiny", f"train_gpt2.py --preset tiny --optimizer muon {words}")
        check.note("tiny", speed(out / "tiny"))

    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(job) for job in (xl, repeat, use, float16, demo, muon)]
        for each in done:
            try:
                each.result()
            except Exception as error:  # the others still count
                check.note("check.py itself failed", repr(error))
    too_large()  # alone: it takes all memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--only", choices=("alone", "together"))
    args = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    check = Check(args.out_dir.resolve())
    data = shlex.quote(str(args.data_dir.resolve()))
    if args.only != "together":
        alone(check, data, args.steps)
    if args.only != "alone":  # after `alone`, whose model it uses
        together(check, data, args.jobs)
    print("\n".join(" | ".join(map(str, row)) for row in check.rows), flush=True)


if __name__ == "__main__":
    main()
