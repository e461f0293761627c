"""What the machine can do: device, precision, compiler, micro-batch, peak speed and MFU, memory."""

import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# -----------------------------------------------------------------------------
# facts: name, speed, memory, sizes that suit the hardware

# Dense bfloat16 products with float32 sums (float16 on GPUs without bfloat16), from NVIDIA's data
# sheets. A pattern must match the whole name: a laptop GPU with the same number is slower.
PEAK_TFLOPS = {
    r"A100-.*|A100 80GB PCIe": 312,
    r"H100 80GB HBM3|H100 SXM.*|H200|GH200.*": 989,
    r"H100 PCIe": 756,
    r"H100 NVL|H200 NVL": 835,
    r"B200": 2250,
    r"L4": 121,
    r"L40S": 362,
    r"Tesla T4|T4": 65,
    r"Tesla V100-SXM2-.*|Tesla V100-SXM3-.*": 125,
    r"Tesla V100-PCIE-.*": 112,
    r"GeForce RTX 3080": 59.5,
    r"GeForce RTX 3090": 71,
    r"GeForce RTX 4080": 97.5,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5080": 112.6,
    r"GeForce RTX 5090": 209.5,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s on the GPU's data sheet, or None if the table has no such GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    found = [peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return found[0] * 1e12 if found else None


def flops_per_token(n_params: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Return the FLOPs of the forward and backward pass for one token (PaLM paper, appendix B).

    6 for each parameter (2 forward, 4 backward) and 12 L C T for attention. All T x T scores are
    counted, although half of them are masked.
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def mfu(flops: float, seconds: float, device: torch.device, world_size: int = 1) -> float | None:
    """Return the model FLOPs utilisation: the part of the ranks' peak that a computation uses.

    None if the peak is not known.
    """
    peak = peak_flops(device)
    return flops / seconds / (peak * world_size) if peak else None


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


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the system does not tell more."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return cpu


# -----------------------------------------------------------------------------
# choices: device, precision, compiler, micro-batch


def choose_device(kind: str) -> str:
    """Return the kind of device to use; `auto` is CUDA, else MPS, else the CPU.

    Raises ValueError if torch does not find a device of the kind.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return "cuda" if found["cuda"] else "mps" if found["mps"] else "cpu"
    if not found.get(kind, True):
        raise ValueError(f"device {kind}: torch finds none here")
    return kind


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
    missing = ""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif device.type == "cpu" and sys.platform != "linux":
        missing = "on CPUs it is tested on Linux only"
    elif device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        missing = "there is no C++ compiler (g++)"
    elif device.type == "cpu" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (python3-dev) are not installed"
    return not missing or setting == "on", [f"torch.compile: {missing}"] if missing else []


def choose_micro_batch_size(
    asked: int | None, tokens: int, T: int, world_size: int, fits: Callable[[int], bool], flag: str
) -> int:
    """Return the rows of a micro-batch: `asked`, or the largest power of two that `fits`.

    Every step has a multiple of `tokens`, which must be whole micro-batches on every rank. If not,
    raises ValueError with values that work. `flag` is the flag that sets `tokens`.
    """
    rows = tokens // (T * world_size)  # on each rank
    if tokens % (T * world_size):
        near = " or ".join(str(n * T * world_size) for n in (rows, rows + 1) if n)
        raise ValueError(
            f"{flag} {tokens} is not a multiple of block_size {T} * {world_size} ranks: "
            f"give --{flag} {near}"
        )
    size = largest_that_fits(rows, fits) if asked is None else asked
    if rows % size:
        raise ValueError(
            f"micro_batch_size {size} * block_size {T} * {world_size} ranks does not "
            f"divide {flag} {tokens}: give --micro_batch_size {nearest_divisors(rows, size)}"
        )
    return size


def nearest_divisors(number: int, wanted: int) -> str:
    """Return up to three divisors of a number close to a wanted one, to propose in an error."""
    most = min(number, 4 * wanted, 1 << 16)  # a damaged file may ask for a billion heads
    divisors = [n for n in range(1, most + 1) if number % n == 0]
    return " or ".join(map(str, sorted(divisors, key=lambda n: abs(n - wanted))[:3]))


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """Return the largest power of two that divides `rows` and that `fits`."""
    size = rows & -rows  # the largest power of two that divides it
    while size > 1 and not fits(size):
        size //= 2
    return size


def fits_in_memory(model: nn.Module, rows: int, autocast: torch.autocast) -> bool:
    """Return whether a forward and backward pass of `rows` rows fits into GPU memory.

    The pass is not compiled: compiling would take longer. It leaves no gradients.
    """
    device = model.transformer.wpe.weight.device
    x = torch.zeros(rows, model.config.block_size, dtype=torch.long, device=device)
    fitted = True
    try:
        # as large as AdamW's two moments and DDP's buckets, which do not exist yet
        ballast = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
        with autocast, torch.compiler.set_stance("force_eager"):
            model(x, x).backward()
        del ballast
    except torch.OutOfMemoryError:
        fitted = False
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fitted
