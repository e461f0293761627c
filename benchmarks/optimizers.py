"""
Compare AdamW and Muon, each at its best learning rate, on the text of --source pydocs:

    python benchmarks/optimizers.py 4x128 log/optimizers     # on bytes, 400 steps of 4,096
    python benchmarks/optimizers.py tiny log/optimizers      # the demo: --preset tiny, GPT-2 tokens

It runs train_gpt2.py for every optimizer and rate, with the same data in the same order, and then
the best rate of each with several seeds. It prints how the final losses differ, and how many tokens
Muon needs for AdamW's mean final loss, with 95% intervals. It does not repeat finished runs.
plot.py can draw the runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.compare import grouped, interval, seed_lines  # noqa: E402
from common.corpus import read_pydocs  # noqa: E402
from common.metrics import Curves  # noqa: E402
from common.significance import summary  # noqa: E402

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


def train(folder: Path, size: str, optimizer: str, rate: float, schedule: str, seed: int) -> Curves:
    """Train one model, or continue its run; return its numbers."""
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
    return Curves(out_dir)


def final_loss(run: Curves) -> float:
    return list(run.validation_losses().values())[-1]


def compare(size: str, adamw: list[Curves], muon: list[Curves]) -> None:
    """Print Welch's test of the final losses, and Muon's tokens to AdamW's mean final loss.

    The interval of the tokens is that of Muon's seeds: AdamW's mean counts as exact.
    """
    for line in seed_lines(grouped([*adamw, *muon])):
        print(line)
    # The tokens of a crossing: Muon keeps the schedule of its whole run, which is not over there.
    target = summary([final_loss(run) for run in adamw]).mean
    budget = summary([run.tokens_at(max(run.validation_losses())) for run in adamw]).mean
    crossings = [run.crossing(target) for run in muon]
    if None in crossings:
        reached = len(crossings) - crossings.count(None)
        print(f"{size}: {reached} of {len(muon)} seeds of Muon reach AdamW's {target:.4f}")
        return
    found = summary([crossing.tokens / budget for crossing in crossings])
    print(
        f"{size}: tokens to the same loss: Muon reaches AdamW's {target:.4f} with {found.mean:.3f} "
        f"of AdamW's {budget:,.0f} tokens, 95% interval {interval(found, '.3f')}, n = {found.n}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", help="layers x width (4x128), or tiny")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each best rate, with seeds from 1337"
    )
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
            run = train(args.folder, args.size, optimizer, rate, "cosine", 1337)
            losses[rate] = final_loss(run)
            ms = np.median(run.series("train", "dt", "steps")[1]) * 1e3
            print(f"{args.size} {optimizer} {rate:g}: {losses[rate]:.4f}, {ms:.0f} ms", flush=True)
            low = min(losses, key=losses.get)
            if not rates and low in (min(losses), max(losses)):
                rates = [low / 2 if low == min(losses) else low * 2]
        best[optimizer] = low
    runs = {}
    for optimizer, rate in best.items():
        run = train(args.folder, args.size, optimizer, rate, "linear", 1337)
        print(f"{args.size} {optimizer} {rate:g} linear: {final_loss(run):.4f}", flush=True)
        runs[optimizer] = [
            train(args.folder, args.size, optimizer, rate, "cosine", seed)
            for seed in range(1337, 1337 + args.seeds)
        ]
        ends = ", ".join(f"{final_loss(run):.4f}" for run in runs[optimizer])
        print(f"{args.size} {optimizer} {rate:g}, seeds from 1337: {ends}", flush=True)
    compare(args.size, **runs)


if __name__ == "__main__":
    main()
