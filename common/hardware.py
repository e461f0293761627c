"""What the machine can do: device, precision, compiler, micro-batch, peak speed and MFU."""

import importlib.util
import math
import os
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
# speed: peaks, MFU, sizes that suit the hardware

PEAK_TFLOPS = {  # dense bfloat16 (float16 where older) with float32 sums, from NVIDIA's data sheets
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
    """Return the FLOP/s on the GPU's data sheet; None if we do not know it for certain."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    found = [peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return found[0] * 1e12 if found else None


def flops_per_token(n_params: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Return the FLOPs of forward and backward pass for one token.

    6 for each parameter (2 forward, 4 backward) and 12 L C T for the attention scores, counted
    in full although half of them are masked (PaLM paper, appendix B).
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def ugly_dimensions(n_embd: int, n_head: int, block_size: int, micro_batch_size: int) -> list[str]:
    """Return a note for each size that does not fit the tiles of a GPU, with a better number."""
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
        if n % 8 and n not in (1, 2, 4)
    ]


# -----------------------------------------------------------------------------
# choices: device, precision, compiler, micro-batch


def choose_device(kind: str) -> str:
    """Return the kind of device: as asked, or the best there is. ValueError if there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there.get(kind, True):
        raise ValueError(f"device {kind}: torch finds none here")
    return kind


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of matrix products: bfloat16 where the device is good at it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    bfloat16 = device.type == "cpu" and {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)
    return torch.bfloat16 if bfloat16 else torch.float32


def choose_compile(setting: str, device: torch.device) -> tuple[bool, list[str]]:
    """Return whether to compile and, if something is missing for that, a note that names it."""
    if setting == "off" or (setting == "auto" and device.type == "mps"):
        return False, []
    missing = ""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif device.type == "cpu" and sys.platform != "linux":
        missing = "on CPUs it was tried on Linux only"
    elif device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        missing = "there is no C++ compiler (g++)"
    elif device.type == "cpu" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (python3-dev) are not installed"
    return not missing or setting == "on", [f"torch.compile: {missing}"] if missing else []


def choose_micro_batch_size(
    asked: int | None, tokens: int, T: int, world_size: int, fits: Callable[[int], bool], flag: str
) -> int:
    """Return the rows of a micro-batch: as asked, or the largest power of two that `fits`.

    Every step, a multiple of `tokens`, must be whole micro-batches on every rank. ValueError
    proposes values that work; it calls `tokens` by the name of its `flag`.
    """
    rows = tokens // (T * world_size)  # on each rank
    if tokens % (T * world_size):
        near = " or ".join(str(n * T * world_size) for n in (rows, rows + 1) if n)
        raise ValueError(
            f"{flag} {tokens} is not a multiple of block_size {T} * {world_size} ranks: "
            f"give --{flag} {near}"
        )
    size = asked
    if size is None:
        size = rows & -rows  # the largest power of two that divides it
        while size > 1 and not fits(size):
            size //= 2
    if rows % size:
        near = sorted((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - size))
        raise ValueError(
            f"micro_batch_size {size} * block_size {T} * {world_size} ranks does not "
            f"divide {flag} {tokens}: give --micro_batch_size {' or '.join(map(str, near[:3]))}"
        )
    return size


def fits_in_memory(model: nn.Module, rows: int, autocast: torch.autocast) -> bool:
    """Try a forward and backward pass of so many rows; not compiled, which would take longer."""
    device = model.transformer.wpe.weight.device
    x = torch.zeros(rows, model.config.block_size, dtype=torch.long, device=device)
    fitted = True
    try:
        # takes the place of AdamW's two moments and DDP's buckets, which do not exist yet
        ballast = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
        with autocast, torch.compiler.set_stance("force_eager"):
            model(x, x).backward()
        del ballast
    except torch.OutOfMemoryError:
        fitted = False
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fitted
