"""
What each speed-up buys, measured.
"""

import math
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from train_gpt2 import GPTConfig

# -----------------------------------------------------------------------------
# model FLOPs utilisation

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
    """Return the FLOP/s the GPU is sold with; None where we do not know it for certain."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    found = [peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return found[0] * 1e12 if found else None


def flops_per_token(config: "GPTConfig", n_params: int) -> int:
    """Return forward and backward FLOPs a token: 6 a weight, and 12 L C T of attention scores."""
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size


def ugly_dimensions(config: "GPTConfig", micro_batch_size: int) -> list[str]:
    """Name the sizes that fit GPU tiles badly, each with the nice number next to it."""
    sizes = {
        "head size": config.n_embd // config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.block_size,
        "micro_batch_size": micro_batch_size,
    }
    return [
        f"{name} {n} is not a multiple of 8: {math.ceil(n / 8) * 8} or, better, "
        f"{math.ceil(n / 64) * 64} runs faster"
        for name, n in sizes.items()
        if n % 8 and n not in (1, 2, 4)
    ]
