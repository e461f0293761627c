"""
The cost of a checkpoint of GPT-2 124M with AdamW's moments, compared with torch.save and fsync:

    python benchmarks/checkpoint_cost.py FOLDER

The two ways take turns. Each keeps its two newest files, so both write to new blocks of the disk.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoint import checkpoint_paths, write_checkpoint
from train_gpt2 import GPT, GPTConfig


def plain(path: Path, state: dict) -> None:
    """Write a file and wait for the disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    for old in checkpoint_paths(path.parent)[2:]:
        old.unlink()


def main() -> None:
    weights = dict(GPT(GPTConfig()).named_parameters())
    model = {name: p.detach() for name, p in weights.items()}
    moments = {i: {k: torch.rand_like(p) for k in ("exp_avg", "exp_avg_sq")}
               for i, p in enumerate(model.values())}  # fmt: skip
    state = {"model": model, "optimizer": {"state": moments}}
    seconds = {"plain": [], "ours": []}
    for name in seconds:
        (Path(sys.argv[1]) / name).mkdir(parents=True)
    for turn in range(10):
        for name in sorted(seconds, reverse=turn % 2):
            path = Path(sys.argv[1]) / name / f"ckpt_{turn:06d}.pt"
            os.sync()
            start = time.perf_counter()
            plain(path, state) if name == "plain" else write_checkpoint(path, state, keep=2)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(name, " ".join(f"{s:.2f}" for s in values), f"median {statistics.median(values):.2f}")
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    print("ratios", " ".join(f"{r:.2f}" for r in ratios), f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
