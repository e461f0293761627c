"""What the machine can do: devices and their errors, precision, compiler, micro-batch, speed."""

import contextlib
import gc
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from common.nvidia import missing_kernels, unused_gpu, why_no_gpu
from common.workers import count_cores

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# -----------------------------------------------------------------------------
# facts: name, speed, memory, sizes that suit the hardware

# Dense bfloat16 products with float32 sums (float16 on GPUs without bfloat16), from NVIDIA's data
# sheets. A pattern must match the whole name: a laptop GPU with the same number is slower, and so
# is a part of a GPU ("A100-SXM4-40GB MIG 1g.5gb", "A100-10C").
PEAK_TFLOPS = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312,
    r"H100 80GB HBM3|H200|GH200 \d+GB?( HBM3e)?": 989,
    r"H100 PCIe": 756,
    r"H100 NVL|H200 NVL": 835,
    r"B200": 2250,
    r"L4": 121,
    r"L40S": 362,
    r"Tesla T4|T4": 65,
    r"Tesla V100-SXM[23]-\d+GB": 125,
    r"Tesla V100-PCIE-\d+GB": 112,
    r"GeForce RTX 3080": 59.5,
    r"GeForce RTX 3090": 71,
    r"GeForce RTX 4080": 97.5,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5080": 112.6,
    r"GeForce RTX 5090": 209.5,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s on the GPU's data sheet, or None if the table has no such GPU."""
    name = device_name(device).removeprefix("NVIDIA ")
    found = [peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return found[0] * 1e12 if found else None


def flops_per_token(n_params: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Return the FLOPs of the forward and backward pass for one token (PaLM paper, appendix B).

    6 for each parameter (2 forward, 4 backward) and 12 L C T for attention. All T x T scores are
    counted, although half of them are masked.
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def ugly_dimensions(n_embd: int, n_head: int, block_size: int, micro_batch_size: int) -> list[str]:
    """Return a note for each size that does not fit the tiles of a GPU, with a better number.

    Products of 16-bit numbers are fastest if sizes are multiples of 8, and better of 64 (NVIDIA's
    guide to matrix multiplication: multiples of 16 bytes, on an A100 of 128 bytes).
    """
    sizes = {
        "head size": n_embd // n_head,
        "n_embd": n_embd,
        "block_size": block_size,
        "micro_batch_size": micro_batch_size,
    }
    return [
        f"{name} {n} is not a multiple of 8: {math.ceil(n / 8) * 8} or, better, "
        f"{math.ceil(n / 64) * 64} runs faster"
        for name, n in sizes.items()
        if n % 8 and n not in (1, 2, 4)  # B = 1, 2 or 4 is fine: a product has B * T rows
    ]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work; a CPU has no queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes used so far: by tensors on CUDA, by the whole process elsewhere.

    None on Windows, which does not have `resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if os.name == "nt":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes on a Mac, KiB on Linux


def flops_of_run(model: nn.Module, device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the FLOPs for a token, and the FLOP/s of all ranks' data sheets (None: unknown)."""
    size, peak = model.config, peak_flops(device)
    flops = flops_per_token(model.n_params, size.n_layer, size.n_embd, size.block_size)
    return {"flops_per_token": flops, "peak_flops": peak and peak * world_size}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the system does not tell more."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return cpu


# -----------------------------------------------------------------------------
# GPUs: which one torch can use, and why not


def choose_device(kind: str) -> str:
    """Return the kind of device to use; `auto` is CUDA, else MPS, else the CPU.

    Raises ValueError, with the reason, if torch cannot use a device of the kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's are long, and why_no_gpu() says more
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return "cuda" if found["cuda"] else "mps" if found["mps"] else "cpu"
    if not found.get(kind, True):
        why = why_no_gpu() if kind == "cuda" else "torch finds none here"
        raise ValueError(f"device {kind}: {why}")
    return kind


def warn_of_unused_gpu() -> None:
    """Say on the console, if this machine has an NVIDIA GPU, why torch runs on the CPU."""
    if why := unused_gpu():
        print(f"warning: running on the CPU: {why}", file=sys.stderr, flush=True)


def check_gpu(device: torch.device) -> None:
    """Raise ValueError if this torch has no kernels for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same in ten lines
        name, has = device_name(device), torch.cuda.get_device_capability(device)
    if why := missing_kernels(has):
        raise ValueError(f"{name}: {why}")


# -----------------------------------------------------------------------------
# errors of a device

# If memory ran out: CUDA, ROCm, NCCL, Triton and MPS; cuBLAS and cuDNN; a buffer too large for MPS;
# and torch before 2.14 where it may not ask for the GPU's memory (pytorch#185946).
NO_GPU_MEMORY = (
    r"out of memory|STATUS_(\w+_)?ALLOC(ATION)?_FAILED|Invalid buffer size|"
    r"NVML_SUCCESS.*CUDACachingAllocator"
)
NO_CPU_MEMORY = r"DefaultCPUAllocator|std::bad_alloc|Cannot allocate memory"
GPU_FAULT = r"(CUDA|HIP|cuDNN|MIOpen|Triton)\b.*\berror\b"  # how torch's messages begin
CUDA_ERRORS = tuple(
    getattr(torch, name)
    for name in ("OutOfMemoryError", "AcceleratorError")
    if hasattr(torch, name)
)


class OutOfMemory(ValueError):  # noqa: N818 - the field's name for it
    """There is too little memory for what was asked."""


class DeviceError(OSError):
    """A GPU has failed."""


@contextlib.contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn an error of the device in this block into an error of one line.

    Raises OutOfMemory, or DeviceError, with the first line of torch's message, for other faults.
    Everything else passes: it is a bug, and its traceback matters.
    """
    try:
        yield
    except (RuntimeError, MemoryError, torch.cuda.DeferredCudaCallError) as error:
        text = str(error).strip()
        if isinstance(error, MemoryError) or re.search(NO_CPU_MEMORY, text):
            raise OutOfMemory("out of memory") from None
        if isinstance(error, torch.OutOfMemoryError) or re.search(NO_GPU_MEMORY, text, re.I):
            gpu = "GPU " if device.type != "cpu" else ""
            raise OutOfMemory(f"out of {gpu}memory") from None
        line = text.partition("\n")[0]  # hints for debugging follow
        if isinstance(error, CUDA_ERRORS) or re.match(GPU_FAULT, line, re.I):
            raise DeviceError(f"device {device}: {line}") from None
        raise


# -----------------------------------------------------------------------------
# choices: precision, compiler, attention


def limit_threads() -> None:
    """Let torch use no more threads than this process has cores.

    torch counts the cores of the machine, of which a container may have only some. On 2 cores, 16
    threads wait for each other: the tiny preset was 4 to 8 times slower than with 2.
    """
    if (cores := count_cores()) < torch.get_num_threads():
        torch.set_num_threads(cores)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; `auto` is bfloat16 if the device is fast with it.

    Otherwise `auto` is float16 on CUDA and float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # compute capability 8.0 (Ampere) is the first with bfloat16
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    # a CPU without these instructions (x86: the first two, Arm: the last) gains nothing from it
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    bfloat16 = device.type == "cpu" and {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)
    return torch.bfloat16 if bfloat16 else torch.float32


def choose_compile(setting: str, device: torch.device) -> tuple[bool, list[str]]:
    """Return whether to compile, and a note if something that torch.compile needs is missing.

    `auto` compiles if nothing is missing, `on` in any case.
    """
    if setting == "off" or (setting == "auto" and device.type == "mps"):
        return False, []
    missing = missing_for_compile(device)
    return not missing or setting == "on", [f"torch.compile: {missing}"] if missing else []


def missing_for_compile(device: torch.device) -> str:
    """Return what torch.compile needs for the device and does not find, or an empty string."""
    cc, what = [os.environ.get("CXX", "g++")], "C++"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or more"
        # Triton builds its link to the driver with one of these (its runtime/build.py)
        cc, what = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"], "C"
    if device.type == "mps" or (device.type == "cuda" and sys.platform != "linux"):
        return ""  # Triton for Windows brings its own compiler
    if sys.platform != "linux":
        return "on CPUs it is tested on Linux only"
    if not any(shutil.which(name) for name in cc):
        return f"there is no {what} compiler ({cc[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (python3-dev) are not installed"
    return ""


@contextlib.contextmanager
def attention_for_any_shape() -> Iterator[None]:
    """Leave cuDNN out of attention, in code that meets a new shape in every call.

    On H100 and B200 torch prefers cuDNN, which makes a plan for each shape (others report 23 to 37
    ms each). The other kernels need no plan. To change the setting of the process costs 2 us.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# -----------------------------------------------------------------------------
# the micro-batch


def choose_micro_batch_size(
    asked: int | None,
    tokens: int,
    T: int,
    world_size: int,
    fits: Callable[[int], bool],
    flag: str,
    divides: int | None = None,
) -> int:
    """Return the rows of a micro-batch: `asked`, or the largest power of two that `fits`.

    Every step has a multiple of `tokens`, which must be whole micro-batches on every rank. If not,
    raises ValueError with values that work. `flag` is the flag that sets `tokens`. `divides` is the
    total batch that a ramp's start divides. Raises OutOfMemory if not even one row fits.
    """
    rows, unit = tokens // (T * world_size), T * world_size  # rows on each rank
    if tokens % unit:
        if divides is None or divides % unit == 0:
            what = f"--{flag} {either(good_batches(tokens, unit, divides))}"
        else:  # no multiple of the unit divides this total
            totals = good_batches(divides, unit)
            starts = good_batches(tokens, unit, math.gcd(*totals))
            what = f"--total_batch_size {either(totals)} and --{flag} {either(starts)}"
        raise ValueError(
            f"{flag} {tokens} is not a multiple of block_size {T} * {world_size} ranks: give {what}"
        )
    size = largest_that_fits(rows, fits) if asked is None else asked
    if rows % size:
        raise ValueError(
            f"micro_batch_size {size} * block_size {T} * {world_size} ranks does not "
            f"divide {flag} {tokens}: give --micro_batch_size {nearest_divisors(rows, size)}"
        )
    return size


def good_batches(tokens: int, unit: int, divides: int | None = None) -> list[int]:
    """Return the nearest batches below and above `tokens` that keep a good micro-batch.

    A `unit` is one row on every rank. The rows of a rank are a multiple of a power of two, up to
    64, and small enough that two such multiples are below `tokens`. With `divides`, they are
    divisors of this multiple of `unit`.
    """
    k = 1 << max(0, min(64, tokens // unit // 2).bit_length() - 1)
    while k:
        step, most = unit * k, divides or tokens + unit * k
        near = tokens - tokens % step
        sides = range(near, 0, -step), range(near + step, most + 1, step)
        found = [next((n for n in side[:1000] if not (divides or n) % n), 0) for side in sides]
        if any(found):
            return [n for n in found if n]
        k //= 2
    return [divides]  # all other divisors are far away


def small_micro_batch_note(size: int, tokens: int, T: int, world_size: int) -> list[str]:
    """Return a note if the batch allows only small micro-batches, with batches that do not.

    Below 8 rows a GPU has too little to do at a time. No note if the micro-batch is all that a rank
    has in a step, or if memory limits it.
    """
    unit = T * world_size
    rows = tokens // unit
    better = [n for n in good_batches(tokens, unit) if n // unit & -(n // unit) > size]
    if size >= 8 or size == rows or size != rows & -rows or not better:
        return []
    return [
        f"micro_batch_size is {size}, because a rank has {rows} rows in a step: "
        f"--total_batch_size {either(better)} allows more and runs faster"
    ]


def rows_of_step(B: int, batch_tokens: int, T: int, world_size: int) -> int:
    """Return the rows of this step's micro-batches: B, or less if the batch is still growing.

    Less is the largest power of two that divides the rows of a rank, so that a ramp which starts
    with 4 rows on a rank does not stay at 4.
    """
    rows, rest = divmod(batch_tokens, T * world_size)
    assert rows and not rest, (batch_tokens, T, world_size)
    return B if rows % B == 0 else min(rows & -rows, 1 << (B.bit_length() - 1))


def nearest_divisors(number: int, wanted: int) -> str:
    """Return up to three divisors of a number close to a wanted one, to propose in an error."""
    most = min(number, 4 * wanted, 1 << 16)  # a damaged file may ask for a billion heads
    divisors = [n for n in range(1, most + 1) if number % n == 0]
    return either(sorted(divisors, key=lambda n: abs(n - wanted))[:3])


def either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """Return the largest power of two that divides `rows` and that `fits`.

    Raises OutOfMemory if not even one row fits.
    """
    size = rows & -rows  # the largest power of two that divides it
    while not fits(size):
        if size == 1:
            raise OutOfMemory("not even one row fits into GPU memory")
        size //= 2
    return size


# Elements in the logits of a micro-batch: at 64 rows of 1,024 tokens a GPU is busy, and more were
# not measured.
TOO_MANY_LOGITS = 1 << 32


def fits_in_memory(
    model: nn.Module, rows: int, autocast: torch.autocast, world_size: int = 1
) -> bool:
    """Return whether training on micro-batches of `rows` rows fits into GPU memory.

    The pass is not compiled: compiling would take longer. It leaves no gradients, and random
    numbers as they were.
    """
    device = model.transformer.wpe.weight.device
    logits = rows * model.config.block_size * model.config.padded_vocab_size
    if rows > 1 and logits >= TOO_MANY_LOGITS:
        return False
    fitted = True
    try:
        gpus = [device] if device.type == "cuda" else []
        with device_errors(device), torch.random.fork_rng(gpus):  # dropout draws masks
            try_micro_step(model, rows, autocast, world_size)
    except OutOfMemory:
        fitted = False
    if not fitted:
        gc.collect()  # the error's traceback can hold the tensors in a cycle (Python 3.12 does)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fitted


def try_micro_step(model: nn.Module, rows: int, autocast: torch.autocast, world_size: int) -> None:
    """Do what a step's second micro-step does, with all the memory that exists then.

    In float32 that is 16 bytes a parameter: the weight, its gradient from the first micro-step, and
    AdamW's two moments. On several ranks it is 24. DDP has buckets too, and gradients move into
    them in the last micro-step only. In the second step it makes new ones. NCCL holds the old ones
    until its next operation, which is in the last micro-step (ProcessGroupNCCL: shelvesToUnstash_).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.empty_like(p)
    ballast = [torch.empty_like(p) for p in parameters for _ in range(2 + 2 * (world_size > 1))]
    T, device = model.config.block_size, parameters[0].device
    x = torch.zeros(rows, T, dtype=torch.long, device=device)
    with torch.compiler.set_stance("force_eager"):
        with autocast:
            loss = model(x, x)
        loss.backward()
    del ballast
