"""
What a sharded model needs on each rank, at full size and without the hardware:

    python benchmarks/sharding.py           # the tables of benchmarks/scaling.md
    python benchmarks/sharding.py --check   # the same count, compared with two real ranks

It builds the model as training does, on one of 8 or 64 simulated ranks (torch's fake process
group), with tensors that have shapes but no memory (torch's fake tensors). Then it runs two
micro-steps and counts the bytes that are in use (torch's tracker for FSDP2). Moments are added: 8
bytes a parameter. Nothing is compiled.
"""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parallel  # noqa: E402
from common.hardware import TOO_MANY_LOGITS as MOST  # noqa: E402
from train_gpt2 import GPT, PRESETS, GPTConfig  # noqa: E402

PRINTED = ("gpt2-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b")
CPU, NODE = torch.device("cpu"), 8  # ranks of a node
USABLE = parallel.USABLE * 80e9  # bytes of a GPU
PEAK, MFU = 989e12, 0.45  # an H100's FLOP/s in bfloat16; what a model is expected to reach
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and direction, for each GPU


class Count(NamedTuple):
    """Bytes of one rank when most are in use: in the second micro-step."""

    weights: float
    gradients: float
    moments: float
    gathered: float  # whole weights of the rest and of blocks, and the buffers of collectives
    activations: float  # and whole gradients, logits, copies in bfloat16

    @property
    def total(self) -> float:
        return sum(self)


def config_of(preset: str, **changes: int) -> GPTConfig:
    names = ("n_layer", "n_head", "n_embd", "block_size")
    return GPTConfig(**{name: getattr(PRESETS[preset], name) for name in names} | changes)


def count(
    config: GPTConfig, rows: int, recompute: bool, dtype: torch.dtype = torch.bfloat16
) -> Count:
    """Count the bytes of a simulated rank; a process group must be there."""
    mesh = parallel.make_mesh(CPU)  # it needs real tensors, so it is made before
    make_mesh, parallel.make_mesh = parallel.make_mesh, lambda device: mesh
    with FakeTensorMode():
        with torch.device("meta"):
            model = GPT(config)
        model = parallel.spread(model, CPU, shard=True).train()
        parallel.make_mesh = make_mesh
        model.recompute = recompute
        tracker = FSDPMemTracker(model)
        with tracker:
            x = torch.zeros(rows, config.block_size, dtype=torch.long)
            for micro_step in range(2):
                model.set_requires_all_reduce(micro_step == 1)
                tracker.reset_mod_stats()  # it counts each module once; the peak stays
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(x, x)
                loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    found = {str(kind).rpartition(".")[2]: size for kind, size in peak.items()}
    parts = mesh.shape[-1]
    gathered = sum(found[kind] for kind in ("UNSHARDED_PARAM", "ALL_GATHER", "REDUCE_SCATTER"))
    weights, gradients = found["SHARDED_PARAM"], found["SHARDED_GRAD"]
    rest = found["Total"] - weights - gradients - gathered
    return Count(weights, gradients, 8 * model.n_params / parts, gathered, rest)


def simulate(world_size: int, here: int) -> None:
    """Be rank 1 of so many ranks, `here` of them on this node."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["LOCAL_WORLD_SIZE"] = str(here)
    dist.init_process_group("fake", rank=1, world_size=world_size, store=FakeStore())


def logits_of(config: GPTConfig) -> int:
    return config.block_size * config.padded_vocab_size


def row(values: list) -> str:
    return "| " + " | ".join(v if isinstance(v, str) else f"{v / 1e9:.1f}" for v in values) + " |"


def tables() -> None:
    header = ["preset", "ranks", "recompute", "weights", "gradients", "moments", "gathered"]
    header += ["activations of 1 row", "of 2", "total, 1 row", "rows in 80 GB", "their total"]
    header += ["planned", "rows, compiled", "planned"]
    print(row(header), row(["---"] * len(header)), sep="\n")
    for preset in PRINTED:
        config = config_of(preset)
        with torch.device("meta"):
            model = GPT(config)
        for world_size in (8, 64):
            simulate(world_size, NODE)
            for recompute in (False, True):
                settings = {"parts": NODE, "dtype": torch.bfloat16, "recompute": recompute}
                plan = partial(parallel.bytes_of_step, model, **settings)
                possible = [n for n in (1, 2, 4, 8, 16, 32, 64) if n * logits_of(config) < MOST]
                start = max(
                    (n for n in possible if plan(rows=n, compiled=False) <= USABLE), default=1
                )
                counts = {n: count(config, n, recompute) for n in {1, 2, start}}
                while max(counts) < max(possible) and counts[max(counts)].total <= USABLE:
                    counts[2 * max(counts)] = count(config, 2 * max(counts), recompute)
                most = max(n for n, counted in counts.items() if counted.total <= USABLE)
                compiled = max(n for n in possible if plan(rows=n, compiled=True) <= USABLE)
                cells = [preset, str(world_size), "on" if recompute else "off", *counts[1][:4]]
                cells += [counts[1].activations, counts[2].activations, counts[1].total, str(most)]
                cells += [counts[most].total, plan(rows=most, compiled=False), str(compiled)]
                print(row([*cells, plan(rows=compiled, compiled=True)]), flush=True)
    print()
    header = [
        "preset",
        "tokens",
        "computation",
        "gathering, NVLink",
        "reduce-scatter",
        "all-reduce",
    ]
    print(row(header), row(["---"] * len(header)), sep="\n")
    for preset in PRINTED:
        config = config_of(preset)
        with torch.device("meta"):
            model = GPT(config)
        tokens, whole = 4096, 4 * model.n_params  # of a micro-step; bytes of all float32 weights
        flops = 6 * model.n_params + 12 * config.n_layer * config.n_embd * config.block_size
        gathered, scattered = (passes * whole * (NODE - 1) / NODE for passes in (2, 1))
        between = 2 * whole / NODE * 7 / 8  # a ring over eight nodes
        cells = [preset, f"{tokens:,}", f"{tokens * flops / PEAK / MFU * 1e3:.0f} ms"]
        for size, speed in ((gathered, NVLINK), (scattered, NVLINK), (between, NETWORK)):
            cells.append(f"{size / 1e9:.1f} GB: {size / speed * 1e3:.0f} ms")
        print(row(cells))


def be_real_rank() -> None:
    """Be one of two ranks that train for two steps; print the most memory that was in use."""
    import train_gpt2

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

    step, before = train_gpt2.train_step, []

    def measured_step(*args, **kwargs):
        result = step(*args, **kwargs)
        if dist.get_rank() == 1:  # rank 0 prints the log
            print(f"\nbytes {peak() - before[0]}", flush=True)
        return result

    before.append(peak())  # Python and torch
    train_gpt2.train_step = measured_step
    sys.argv = ["train_gpt2.py", *sys.argv[2:]]
    train_gpt2.main()


def check() -> None:
    changes = {"block_size": 64}
    simulate(2, 2)
    for preset, rows, recompute in (("gpt2-medium", 2, False), ("gpt2-medium", 32, False),
                                    ("gpt2-medium", 32, True)):  # fmt: skip
        counted = count(config_of(preset, **changes), rows, recompute, torch.float32).total
        with tempfile.TemporaryDirectory() as folder:
            for name in ("x_train_0.npy", "x_val_0.npy"):
                np.save(Path(folder, name), np.arange(40000, dtype=np.uint16))
            words = f"--preset {preset} --block_size 64 --total_batch_size {rows * 64 * 4} "
            words += f"--micro_batch_size {rows} --max_steps 2 --data_dir {folder} --eval_every 0 "
            words += "--sample_every 0 --compile off --dtype float32 --shard on --device cpu "
            words += f"--recompute {'on' if recompute else 'off'} --out_dir {folder}/log"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc_per_node=2", __file__, "--rank", *words.split()]
            # freed memory returns to the system at once, so that the peak is what is in use
            env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(torchrun, env=env, capture_output=True, text=True, check=True)
        real = max(int(number) for number in re.findall(r"\bbytes (\d+)\b", output.stdout))
        print(f"{preset}, {rows} rows, recompute {recompute}: counted {counted / 1e9:.2f} GB, "
              f"real {real / 1e9:.2f} GB, {counted / real:.2f}")  # fmt: skip


if __name__ == "__main__":
    if "--rank" in sys.argv:
        be_real_rank()
    else:
        check() if "--check" in sys.argv else tables()
