"""
Compare AdamW and Muon, each at its best learning rate, on the text of --source pydocs:

    python benchmarks/optimizers.py 4x128 log/optimizers     # on bytes, 400 steps of 4,096
    python benchmarks/optimizers.py tiny log/optimizers      # the demo: --preset tiny, GPT-2 tokens

It runs train_gpt2.py for every optimizer and rate, with the same data in the same order. It does
not repeat finished runs. plot.py can draw the runs.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.corpus import read_pydocs  # noqa: E402

RATES = (2e-3, 4e-3, 8e-3, 16e-3)  # continued below or above, until the best is between others


def make_data(folder: Path) -> None:
    """Write the pydocs documents as one token per byte, with a zero before each document."""
    if (folder / "bytes_train_000001.npy").exists():
        return
    folder.mkdir(parents=True)
    texts = [json.loads(line)["text"] for line in read_pydocs().splitlines()]
    tokens = np.frombuffer(b"".join(b"\0" + text.encode() for text in texts), np.uint8)
    cut = len(tokens) // 10
    np.save(folder / "bytes_val_000000.npy", tokens[:cut].astype(np.uint16))
    np.save(folder / "bytes_train_000001.npy", tokens[cut:].astype(np.uint16))


def run(folder: Path, size: str, optimizer: str, rate: float, schedule: str, seed: int) -> Path:
    """Train one model, or continue its run; return its folder."""
    out_dir = folder / f"{size}-{optimizer}-{rate:g}-{schedule}-{seed}"
    settings = {
        "out_dir": out_dir, "optimizer": optimizer, "max_lr": rate, "schedule": schedule,
        "seed": seed, "sample_every": 0, "checkpoint_every": 0, "device": "cpu",
    }  # fmt: skip
    if size == "tiny":
        settings |= {"preset": "tiny", "data_dir": "data/pydocs", "eval_every": 50}
        settings |= {"val_tokens": 32768}
    else:
        n_layer, n_embd = size.split("x")
        settings |= {
            "data_dir": folder / "bytes", "vocab_size": 256, "n_layer": n_layer, "n_embd": n_embd,
            "n_head": int(n_embd) // 64, "block_size": 256, "max_steps": 400,
            "total_batch_size": 4096, "micro_batch_size": 16, "eval_every": 20,
            "val_tokens": 65536,
        }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "--resume", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out_dir


def curve(out_dir: Path) -> list[tuple[int, float]]:
    """Return the points (updates, validation loss) of a run."""
    events = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [(e["step"], e["loss"]) for e in events if e["event"] == "val"]


def step_time(out_dir: Path) -> float:
    """Return the median time of a step in seconds."""
    events = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return statistics.median(e["dt"] for e in events if e["event"] == "train")


def steps_to(points: list[tuple[int, float]], loss: float) -> float | None:
    """Return the updates that a curve, interpolated between its points, needs to reach `loss`."""
    for (a, high), (b, low) in itertools.pairwise(points):
        if low <= loss:
            return a + (b - a) * (high - loss) / (high - low)
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", help="layers x width (4x128), or tiny")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="more seeds after 1337, at best rates")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.size == "tiny":
        subprocess.run([sys.executable, "fineweb.py", "--source", "pydocs"], check=True)
    else:
        make_data(args.folder / "bytes")
    best = {}
    for optimizer in "adamw", "muon":
        rates, losses = list(RATES), {}
        while rates:
            rate = rates.pop(0)
            out_dir = run(args.folder, args.size, optimizer, rate, "cosine", 1337)
            losses[rate] = curve(out_dir)[-1][1]
            ms = step_time(out_dir) * 1e3
            print(f"{args.size} {optimizer} {rate:g}: {losses[rate]:.4f}, {ms:.0f} ms", flush=True)
            low = min(losses, key=losses.get)
            if not rates and low in (min(losses), max(losses)):
                rates = [low / 2 if low == min(losses) else low * 2]
        best[optimizer] = losses[low], low
    for optimizer, (_, rate) in list(best.items()):
        out_dir = run(args.folder, args.size, optimizer, rate, "linear", 1337)
        print(f"{args.size} {optimizer} {rate:g} linear: {curve(out_dir)[-1][1]:.4f}", flush=True)
        seeds = range(1337, 1338 + args.seeds)
        dirs = [run(args.folder, args.size, optimizer, rate, "cosine", seed) for seed in seeds]
        ends = [curve(path)[-1][1] for path in dirs]
        spread = f"{min(ends):.4f} to {max(ends):.4f}"
        print(f"{args.size} {optimizer} {rate:g}, seeds {list(seeds)}: {spread}", flush=True)
        best[optimizer] = statistics.mean(ends), dirs
    # Muon's steps to AdamW's final loss. Each keeps the schedule of its whole run.
    target = best["adamw"][0]
    needed = [steps_to(curve(path), target) for path in best["muon"][1]]
    steps = curve(best["adamw"][1][0])[-1][0]
    print(f"{args.size}: Muon reaches AdamW's {target:.4f} after {needed} of {steps} steps")


if __name__ == "__main__":
    main()
