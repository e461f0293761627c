"""
The optimisation ladder: measure what each speed-up buys. docs/ladder.md explains the rungs.

    python bench.py                                     GPT-2 124M on this machine's device
    python bench.py --preset tiny --block_size 64       a minute or two on two CPU cores
    python bench.py --out ladder.json --plot ladder.png

All rungs start from the same weights and train on the same tokens, with the model, optimizer and
step of train_gpt2.py. For slower rungs, small subclasses here replace parts of its model. Each rung
runs in a fresh process, so it inherits no memory and no compiled code. The first round goes up the
ladder, the next one down.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch

import train_gpt2
from common import hardware
from common.cli import advice, explain, outlive_console, plain, quiet_interrupt, run_command
from common.files import write_atomically
from common.hardware import Device
from common.runlog import software
from common.workers import count_cores
from train_gpt2 import GPT, GPTConfig, TrainConfig

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure what each speed-up buys: the optimisation ladder, on this machine."""

    preset: Literal[tuple(train_gpt2.PRESETS)] = "gpt2"  # size of the model
    block_size: int | None = None  # context length in tokens, instead of the preset's
    micro_batch_size: int | None = None  # rows at a time (16 on CUDA, else 2)
    grad_accum_steps: int | None = None  # micro-batches a step (2; on CUDA, the preset's batch)
    steps: int = 3  # timed steps of a rung in a round, after one step to warm up and compile
    rounds: int = 2  # how many times to run each rung
    device: Device = "auto"  # where to run
    compile: Literal["auto", "off"] = "auto"  # off: skip the rungs that use torch.compile
    seed: int = 1337  # for weights and tokens
    out: Path | None = None  # JSON file for the results
    plot: Path | None = None  # .png or .svg file for a bar chart

    def __post_init__(self) -> None:
        for name in ("block_size", "micro_batch_size", "grad_accum_steps", "steps", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: give a number of 1 or more")
        for name in ("out", "plot"):
            path = getattr(self, name)
            if path and not path.absolute().parent.is_dir():
                raise ValueError(f"{name} {path}: no such folder: create it first")
            if path and path.is_dir():
                raise ValueError(f"{name} {path}: a folder: give a file")
        if self.plot and self.plot.suffix not in (".png", ".svg"):
            raise ValueError(f"plot {self.plot}: give a name that ends in .png or .svg")

    def train_config(self) -> TrainConfig:
        """Return the same settings as a configuration of train_gpt2.py."""
        given = {name: getattr(self, name) for name in ("preset", "block_size", "device", "seed")}
        return TrainConfig(**given)


# -----------------------------------------------------------------------------
# the rungs


class NaiveAttention(train_gpt2.CausalSelfAttention):
    """Attention as in the formula: scores, mask and weights are T x T matrices in memory."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        B, T, C = x.shape
        # each of q, k, v: (B, nh, T, hs)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)  # (B, nh, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = F.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class PlainGPT(GPT):
    """The loss as it is usually written. Autocast turns the logits into float32."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(x)  # (B, T, V)
        targets = targets.reshape(-1)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets, reduction="sum")


class UnpaddedConfig(GPTConfig):
    """A vocabulary of 50257: an odd number, and no tile size divides it."""

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to train the same model."""

    name: str
    tf32: bool = False
    autocast: bool = False
    compile: Literal["no", "whole", "blocks"] = "no"
    flash: bool = False
    padded: bool = False
    fused: bool = False
    own_model: bool = False  # train_gpt2.GPT itself
    stream: bool = False  # a bfloat16 residual stream, if products are bfloat16
    recompute: bool = False  # on a CPU, compute again in backward instead of storing
    largest_batch: bool = False  # the micro-batch that train_gpt2.py would choose


FIRST = Rung(name="float32, naive attention, vocabulary 50257")
CHANGES = {  # each rung keeps the changes of the rungs below it
    "TF32": dict(tf32=True),
    "bfloat16 autocast": dict(autocast=True),
    "torch.compile": dict(compile="whole"),
    "flash attention": dict(flash=True),
    "vocabulary 50304": dict(padded=True),
    "fused AdamW": dict(fused=True),
    "compiled by block, loss in one graph": dict(compile="blocks", own_model=True),
    "bfloat16 residual stream": dict(stream=True),
    "less kept for the backward pass": dict(recompute=True),
    "largest micro-batch": dict(largest_batch=True),
}
RECIPE = "the lecture's recipe"


def ladder(facts: dict[str, Any]) -> tuple[list[Rung], dict[str, str]]:
    """Return the rungs that this machine can run, the recipe last, and why others are left out."""
    device, no_compile = facts["device_type"], facts["no_compile"]
    cuda = device == "cuda"
    why_not = {
        "TF32": "" if cuda else "a format of NVIDIA GPUs",
        "bfloat16 autocast": "this device is no faster with it" * (facts["dtype"] == "float32"),
        "torch.compile": no_compile,
        "compiled by block, loss in one graph": no_compile,
        "bfloat16 residual stream": "float32 here" * (facts["dtype"] != "bfloat16"),
        "less kept for the backward pass": no_compile or "done on CPUs only" * (device != "cpu"),
        "largest micro-batch": "" if cuda else "memory is probed on CUDA only",
    }
    rungs, left_out = [FIRST], {}
    for name, change in CHANGES.items():
        if why_not.get(name):
            left_out[name] = why_not[name]
        else:
            rungs.append(dataclasses.replace(rungs[-1], name=name, **change))
    compiled = "whole" if cuda and not no_compile else "no"
    shared = dict(tf32=True, autocast=True, flash=True, padded=True, largest_batch=cuda)
    return [*rungs, Rung(name=RECIPE, compile=compiled, fused=cuda, **shared)], left_out


def make_rung_model(rung: Rung, config: TrainConfig) -> GPT:
    """Return the rung's model on the CPU; all rungs have the same weights."""
    torch.manual_seed(config.seed)
    weights = GPT(config.model_config()).state_dict()
    shape = config.model_config() if rung.padded else UnpaddedConfig(**vars(config.model_config()))
    model = (GPT if rung.own_model else PlainGPT)(shape)
    if not rung.stream:
        model.residual_dtype = None  # float32, as autocast alone does
    if not rung.flash:
        for block in model.transformer.h:
            block.attn = NaiveAttention(shape)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][: shape.padded_vocab_size]
    model.load_state_dict(weights)
    return model


def token_stream(config: BenchConfig, T: int, B: int, device: torch.device) -> Iterator:
    """Yield inputs and targets (B, T) without end. Ids are as frequent as words (Zipf's law)."""
    generator = torch.Generator().manual_seed(config.seed)
    frequency = 1 / torch.arange(1.0, 50258)
    while True:  # one row after the other, so that the tokens do not depend on B
        rows = [torch.multinomial(frequency, T + 1, True, generator=generator) for _ in range(B)]
        rows = torch.stack(rows).to(device)
        yield rows[:, :-1], rows[:, 1:]


# -----------------------------------------------------------------------------
# measuring


def look_around(config: BenchConfig) -> dict[str, Any]:
    """Return the facts about this machine that the ladder needs and that the results record."""
    with train_gpt2.set_up_machine(config.train_config(), alone=True) as machine:
        cuda = machine.device.type == "cuda"
        cpu = hardware.cpu_name()
        compiling, missing = hardware.choose_compile(config.compile, machine.device)
        no_compile = "" if compiling else " ".join(missing) or f"--compile {config.compile}"
        return {
            "device_type": machine.device.type,
            "device": hardware.device_name(machine.device) if cuda else cpu,
            "dtype": str(machine.dtype).removeprefix("torch."),
            "no_compile": no_compile,
            "cpu": cpu,
            "cores": count_cores(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "cuda": torch.version.cuda if cuda else None,
            **software(),
        }


def measure(rung: Rung, config: BenchConfig, cache_dir: str | None = None) -> dict[str, Any]:
    """Take the steps of one rung in this process; return times in seconds, bytes and nats.

    A step is timed from an idle device to an idle device. The compiler caches in `cache_dir`.
    """
    if cache_dir:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
    train_config = config.train_config()
    with train_gpt2.set_up_machine(train_config, alone=True) as machine:
        device, cuda = machine.device, machine.device.type == "cuda"
        torch.set_float32_matmul_precision("high" if rung.tf32 else "highest")
        if not rung.autocast:
            machine = dataclasses.replace(machine, dtype=torch.float32)
        model = make_rung_model(rung, train_config).to(device).train()
        T = model.config.block_size
        B = config.micro_batch_size or (16 if cuda else 2)
        batch = train_gpt2.PRESETS[config.preset].total_batch_size
        accum = config.grad_accum_steps or (max(1, batch // (B * T)) if cuda else 2)
        if rung.largest_batch:
            rows = B * accum
            B = hardware.largest_that_fits(
                rows, lambda n: hardware.fits_in_memory(model, n, machine.autocast)
            )
            accum = rows // B
        if rung.compile == "blocks":
            train_gpt2.compile_model(model)
            # compile_model lets a CPU compute again: without `recompute`, store as on a GPU
            functorch.ban_recompute_materialized_backward |= not rung.recompute
        elif rung.compile == "whole":
            model.compile(dynamic=False)
        optimizers = train_gpt2.make_optimizers(model, train_config, machine)
        if not rung.fused:  # torch chooses: one kernel for many tensors, or one for each
            groups = [{**group, "fused": None} for group in optimizers["optimizer"].param_groups]
            optimizers["optimizer"] = torch.optim.AdamW(groups)
        scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
        batches, seconds, cpu_seconds = token_stream(config, T, B, device), [], []
        for _ in range(config.steps + 1):
            if cuda and len(seconds) == 1:  # the first step compiles: its memory does not count
                torch.cuda.reset_peak_memory_stats()
            ready = list(itertools.islice(batches, accum))  # drawing tokens is not timed
            hardware.wait_for(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            result = train_gpt2.train_step(
                model, optimizers, scaler, iter(ready), accum, train_config.grad_clip, machine
            )
            hardware.wait_for(device)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        flops, peak = hardware.flops_of_run(model, device, world_size=1).values()
        return {
            "compiled": rung.compile != "no",
            "first_step": seconds[0],
            "seconds": seconds[1:],
            "cpu_seconds": cpu_seconds[1:],  # of all threads: other work disturbs it less
            "loss": result.loss,
            "peak_memory": hardware.peak_memory(device),
            "micro_batch_size": B,
            "batch_tokens": B * T * accum,
            "mfu_seconds": flops / peak * B * T * accum if peak else None,
        }


def attempt(rung: Rung, config: BenchConfig, cache_dir: str) -> dict[str, Any] | str:
    """Return what `measure` returns or, in one line, why it failed.

    In the rung's own process, because not every exception can be sent to another one.
    """
    try:
        return measure(rung, config, cache_dir)
    except Exception as error:  # one rung that fails must not lose the others
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return " ".join(f"{kind}{explain(error)}".split())[:200]


def apart(function: Callable, *args: Any) -> Any:
    """Call a function in a fresh process and return its result."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *args).result()


def climb(config: BenchConfig) -> dict[str, Any]:
    """Measure every rung in every round; return the machine, the settings and a row for each."""
    facts = apart(look_around, config)
    # the device is chosen once, so that not every rung says why it runs on the CPU
    fixed = dataclasses.replace(config, device=facts["device_type"])
    rungs, left_out = ladder(facts)
    runs: dict[str, list[dict]] = {rung.name: [] for rung in rungs}
    with tempfile.TemporaryDirectory() as caches:
        for n in range(config.rounds):
            for i, rung in list(enumerate(rungs))[:: -1 if n % 2 else 1]:
                if rung.name in left_out:  # it failed in an earlier round
                    continue
                print(f"round {n + 1}/{config.rounds}: {rung.name}", file=sys.stderr, flush=True)
                try:
                    run = apart(attempt, rung, fixed, str(Path(caches, str(i))))
                except BrokenProcessPool:
                    run = "its process was killed, probably because memory ran out"
                if isinstance(run, str):
                    left_out[rung.name] = said = run
                else:
                    runs[rung.name].append(run)
                    rate = run["batch_tokens"] / statistics.median(run["seconds"])
                    said = f"{rate:,.0f} tokens/s, loss {run['loss']:.4f}"
                print(f"    {said}", file=sys.stderr, flush=True)
    names = [FIRST.name, *CHANGES, RECIPE]
    rows = [summary(name, runs.get(name), left_out.get(name, "")) for name in names]
    if all("left_out" in row for row in rows):
        raise ValueError(f"no rung could be measured: {rows[0]['left_out']}: try --preset tiny")
    compare(rows)
    settings = {name: v for name, v in plain(config).items() if name not in ("out", "plot")}
    return {"machine": facts, "settings": settings, "rows": rows}


def summary(name: str, runs: list[dict] | None, why_not: str) -> dict[str, Any]:
    """Return a rung's row of the results: medians over the steps of all its rounds."""
    if why_not or not runs:
        return {"name": name, "left_out": why_not}
    seconds = [s for run in runs for s in run["seconds"]]
    median = statistics.median(seconds)
    flops_time = runs[0]["mfu_seconds"]
    return {
        "name": name,
        "ms_per_step": median * 1e3,
        "ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
        "tokens_per_sec": runs[0]["batch_tokens"] / median,
        "mfu": flops_time / median if flops_time else None,
        "peak_memory": max(run["peak_memory"] or 0 for run in runs) or None,
        "loss": runs[0]["loss"],
        "compile_seconds": runs[0]["first_step"] - median if runs[0]["compiled"] else None,
        "micro_batch_size": runs[0]["micro_batch_size"],
        "batch_tokens": runs[0]["batch_tokens"],
        "ms_steps": [s * 1e3 for s in seconds],
        "cpu_ms_per_step": statistics.median(s for run in runs for s in run["cpu_seconds"]) * 1e3,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its gain over the rung before it, over the first, and over the recipe."""
    measured = [row for row in rows if "ms_per_step" in row]
    recipe = next((row for row in measured if row["name"] == RECIPE), None)
    for before, row in zip([None, *measured], measured, strict=False):
        if row is not recipe and before:
            row["gain"] = before["ms_per_step"] / row["ms_per_step"]
        row["gain_over_first"] = measured[0]["ms_per_step"] / row["ms_per_step"]
        if recipe:
            row["gain_over_recipe"] = recipe["ms_per_step"] / row["ms_per_step"]
            if recipe["peak_memory"]:
                row["memory_over_recipe"] = row["peak_memory"] / recipe["peak_memory"]


# -----------------------------------------------------------------------------
# results


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    head = ["rung", "ms/step", "tokens/s", "MFU", "gain", "over first", "over recipe", "memory, GB"]
    lines = [[*head, "loss", "compile, s"], ["---", *["---:"] * 9]]
    for row in results["rows"]:
        if "left_out" in row:
            reason = row["left_out"].replace("|", "/")  # | ends a cell
            lines.append([row["name"], f"left out: {reason}", *[""] * 8])
            continue
        gains = [row.get(key) for key in ("gain", "gain_over_first", "gain_over_recipe")]
        lines.append([
            row["name"],
            f"{row['ms_per_step']:,.0f}",
            f"{row['tokens_per_sec']:,.0f}",
            f"{row['mfu']:.1%}" if row["mfu"] else "",
            *[f"{gain:.2f}" if gain else "" for gain in gains],
            f"{row['peak_memory'] / 1e9:.2f}" if row["peak_memory"] else "",
            f"{row['loss']:.4f}",
            f"{row['compile_seconds']:.0f}" if row["compile_seconds"] else "",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a bar chart of tokens a second, the first rung on top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "ms_per_step" in row]
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:orange" if row["name"] == RECIPE else "tab:blue" for row in rows]
    speeds = [row["tokens_per_sec"] for row in rows]
    bars = axes.barh([row["name"] for row in rows], speeds, color=colours)
    labels = [f"{s:,.0f} ({r['gain_over_first']:.2f}x)" for s, r in zip(speeds, rows, strict=True)]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(speeds) * 1.35)
    axes.set_xlabel("tokens a second")
    settings, facts = results["settings"], results["machine"]
    versions = f"{facts['threads']} threads, torch {facts['versions']['torch']}"
    axes.set_title(f"{settings['preset']} on {facts['device']}, {versions}")
    figure.savefig(path, dpi=120)


def bench(config: BenchConfig) -> None:
    """Run the ladder, print the table, and write the files that were asked for."""
    results = climb(config)
    print(table(results))
    with advice("make room, or give another --out or --plot"):
        if config.out:
            write_atomically(config.out, json.dumps(results, indent=1).encode() + b"\n")
        if config.plot:
            draw(results, config.plot)


def main() -> None:
    outlive_console("stderr")  # stdout is the result: it must not get lost
    with quiet_interrupt():
        run_command(BenchConfig, bench)


if __name__ == "__main__":
    main()
