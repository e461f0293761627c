"""
Time variants of the default training step on a GPU, one after the other, in one process:

    python benchmarks/gpu/variants.py --out variants.json [--only NAME ...] [--profile NAME ...]

A variant changes one thing. The step is that of train_gpt2.py: GPT-2 124M, T = 1024, the largest
micro-batch that fits, 524,288 tokens. A step is timed from an idle device to an idle device. The
default is measured first and last, so that drift shows.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import statistics
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch._inductor.config as inductor
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2  # noqa: E402
from common import hardware  # noqa: E402
from common.runlog import software  # noqa: E402
from train_gpt2 import GPT, TrainConfig  # noqa: E402

BATCH = 524_288  # tokens a step

# -----------------------------------------------------------------------------
# variants: what to change in the process, in the model, and in how it is compiled


def float32_stream(model: GPT) -> None:
    """Keep the residual stream in float32, as autocast alone does."""
    model.residual_dtype = None


def sigmoid_gelu(model: GPT) -> None:
    """The same function with one exponential: 0.5 x (1 + tanh u) = x sigmoid(2 u)."""

    class Gelu(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    for block in model.transformer.h:
        block.mlp.gelu = Gelu()


def compile_whole(model: GPT) -> None:
    """One graph for all blocks: the end of a block and the start of the next one are fused."""
    train_gpt2.compile_model(model)
    for block in model.transformer.h:
        block._compiled_call_impl = None
    model.hidden = torch.compile(model.hidden, dynamic=False)


def compile_all(model: GPT) -> None:
    """Compile the embeddings and the last norm too, each in its own graph."""
    train_gpt2.compile_model(model)
    model.transformer.ln_f.compile(dynamic=False)
    model.transformer.wte.compile(dynamic=False)


def compile_loss(**options: bool) -> Callable[[GPT], None]:
    """Compile the loss with these options of Inductor."""

    def compile_model(model: GPT) -> None:
        train_gpt2.compile_model(model)
        model.loss = torch.compile(
            types.MethodType(GPT.loss, model), dynamic=False, options=options
        )

    return compile_model


def loss_in_parts(self: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """The loss from the log-sum-exp of parts of the vocabulary, each short enough for one read."""
    logits = self.lm_head(x).flatten(0, 1).float()  # (B*T, V)
    total = logits.view(len(logits), 48, -1).logsumexp(-1).logsumexp(-1)
    return (total - logits.gather(1, targets.view(-1, 1)).squeeze(1)).sum()


def compile_parts(model: GPT) -> None:
    train_gpt2.compile_model(model)
    model.loss = torch.compile(types.MethodType(loss_in_parts, model), dynamic=False)


@contextlib.contextmanager
def blas(name: str) -> Iterator[None]:
    """Take matrix products from another library."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def no_cudnn() -> contextlib.AbstractContextManager:
    """Take attention from flash-attention 2 instead of cuDNN."""
    return hardware.attention_for_any_shape()


def tuned(**settings: bool) -> Callable:
    return lambda: inductor.patch(settings)


class Variant(NamedTuple):
    context: Callable | None = None  # of the process
    change: Callable | None = None  # of the model
    compile: Callable = train_gpt2.compile_model
    rows: int | None = None  # of a micro-batch
    loader: bool = False  # read the tokens as train_gpt2.py does


VARIANTS = {
    "default": Variant(),
    "default, read from shards": Variant(loader=True),
    "float32 stream": Variant(change=float32_stream),
    "cublasLt for all products": Variant(context=lambda: blas("cublaslt")),
    "flash-attention 2": Variant(context=no_cudnn),
    "embedding and ln_f compiled": Variant(compile=compile_all),
    "all blocks in one graph": Variant(compile=compile_whole),
    "loss: two passes": Variant(compile=compile_loss(online_softmax=False)),
    "loss: fast exp": Variant(compile=compile_loss(use_fast_math=True)),
    "loss: coordinate descent": Variant(compile=compile_loss(coordinate_descent_tuning=True)),
    "loss: tuned loops": Variant(compile=compile_loss(max_autotune_pointwise=True)),
    "loss: vocabulary in 48 parts": Variant(compile=compile_parts),
    "GELU with a sigmoid": Variant(change=sigmoid_gelu),
    "combo kernels": Variant(context=tuned(combo_kernels=True)),
    "coordinate descent": Variant(context=tuned(coordinate_descent_tuning=True)),
    "max-autotune": Variant(context=tuned(max_autotune=True, coordinate_descent_tuning=True)),
    "32 rows": Variant(rows=32),
    "16 rows": Variant(rows=16),
}

# -----------------------------------------------------------------------------
# measuring


def tokens(B: int, T: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, T) without end: words as frequent as in Zipf's law."""
    generator = torch.Generator(device).manual_seed(1337)
    frequency = 1 / torch.arange(1.0, 50258, device=device)
    while True:
        rows = torch.multinomial(frequency.expand(B, -1), T + 1, True, generator=generator)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def measure(
    name: str, steps: int, profile: bool, machine: train_gpt2.Machine, data_dir: Path | None
) -> dict:
    """Return seconds of each step, the loss of the last, memory and time of the first step."""
    variant = VARIANTS[name]
    torch._dynamo.reset()
    gc.collect()  # the model before, with its graphs
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config, T = TrainConfig(), 1024
    torch.manual_seed(config.seed)
    model = GPT(config.model_config()).to(machine.device).train()
    B = variant.rows or hardware.largest_that_fits(
        BATCH // T, lambda n: hardware.fits_in_memory(model, n, machine.autocast)
    )
    if variant.change:
        variant.change(model)
    variant.compile(model)
    optimizers = train_gpt2.make_optimizers(model, config, machine)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    if variant.loader:
        config = TrainConfig(data_dir=data_dir)
        windows = train_gpt2.Windows(data_dir, "train", T, config.vocab_size)
        batches = train_gpt2.micro_batches(windows, config, B, machine, 0, 0)
    else:
        batches = tokens(B, T, machine.device)
    seconds, kernels = [], []
    with variant.context() if variant.context else contextlib.nullcontext():
        for step in range(steps + 1 + profile):
            accum = BATCH // (B * T) if step <= steps else 2
            if step == 1:  # the first step compiles
                torch.cuda.reset_peak_memory_stats()
            ready = batches
            if not variant.loader:
                ready = iter(list(itertools.islice(batches, accum)))
            watch = contextlib.nullcontext()
            if step > steps:
                watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            torch.cuda.synchronize()
            start = time.perf_counter()
            with watch as record:
                step_result = train_gpt2.train_step(
                    model, optimizers, scaler, ready, accum, 1.0, machine
                )
                torch.cuda.synchronize()
            if step <= steps:
                result = step_result
                seconds.append(time.perf_counter() - start)
            else:
                kernels = kernel_times(record)
    median = statistics.median(seconds[1:])
    return {
        "name": name,
        "micro_batch_size": B,
        "tokens_per_sec": BATCH / median,
        "seconds": seconds[1:],
        "first_step": seconds[0],
        "loss": result.loss,
        "peak_memory": torch.cuda.max_memory_allocated(),
        "kernels": kernels,  # of two micro-batches and the optimizer
    }


def kernel_times(record: torch.profiler.profile) -> list[tuple[str, float, int]]:
    """Return name, total ms and count of each kernel, the longest first."""
    total, count = Counter(), Counter()
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time_total / 1e3
            count[event.name] += 1
    return [(name, ms, count[name]) for name, ms in total.most_common()]


def ceilings(device: torch.device) -> dict[str, float]:
    """Return the speed of a large copy (GB/s, read and written) and of products (TFLOP/s)."""

    def median_seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[5:])

    big = torch.empty(1 << 32, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    copy = median_seconds(lambda: other.copy_(big))
    results = {"copy, GB/s": 2 * big.numel() / copy / 1e9}
    big = other = None
    rows = 32 * 1024
    shapes = {
        "8192 cubed": (8192, 8192, 8192),
        "c_attn": (rows, 768, 2304),
        "c_proj": (rows, 768, 768),
        "c_fc": (rows, 768, 3072),
        "c_fc, gradient of the weight": (768, rows, 3072),
        "mlp.c_proj": (rows, 3072, 768),
        "head": (rows, 768, 50304),
        "head, gradient of the input": (rows, 50304, 768),
        "head, gradient of the weight": (50304, rows, 768),
    }
    for library in ("cublas", "cublaslt"):
        with blas(library):
            for name, (m, k, n) in shapes.items():
                a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
                b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
                if "gradient of the weight" in name:
                    a = torch.randn(k, m, device=device, dtype=torch.bfloat16).t()
                elif "gradient" not in name:
                    b = torch.randn(n, k, device=device, dtype=torch.bfloat16).t()
                seconds = median_seconds(lambda a=a, b=b: a @ b)
                results[f"{name}, TFLOP/s, {library}"] = 2 * m * k * n / seconds / 1e12
                del a, b
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--ceilings", action="store_true")
    parser.add_argument("--profile", nargs="*", default=[])
    args = parser.parse_args()
    rows = []
    with train_gpt2.set_up_machine(TrainConfig(), alone=True) as machine:
        assert isinstance(machine.device, torch.device) and machine.device.type == "cuda"
        results = {
            "device": torch.cuda.get_device_name(), **software(),
            "ceilings": ceilings(machine.device) if args.ceilings else {}, "rows": rows,
        }  # fmt: skip
        for name, value in results["ceilings"].items():
            print(f"{value:10,.0f}  {name}", flush=True)
        for name in [*args.only, args.only[0]]:
            try:
                rows.append(measure(name, args.steps, name in args.profile, machine, args.data_dir))
            except Exception as error:  # the other variants still count
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            row = rows[-1]
            print(
                f"{row['tokens_per_sec']:10,.0f} tokens/s  B {row['micro_batch_size']:2}  "
                f"{row['peak_memory'] / 1e9:6.1f} GB  first step {row['first_step']:5.1f} s  "
                f"loss {row['loss']}  {name}",
                flush=True,
            )
            for kernel, ms, count in row["kernels"][:25]:
                print(f"    {ms:8.2f} ms {count:5} x {kernel[:110]}", flush=True)
            args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
