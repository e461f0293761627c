"""NVIDIA GPUs: whether their driver and this torch fit together, and which torch would."""

import os
import re
import subprocess
from pathlib import Path

import torch

OLDEST_DRIVER = {12: 525, 13: 580}  # for each CUDA version (NVIDIA: CUDA Compatibility, table 1)

# -----------------------------------------------------------------------------
# the driver


def gpus_are_hidden() -> bool:
    """Return whether the user, or Slurm for a job without GPUs, hides the GPUs from CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def nvidia_driver() -> str:
    """Return the version of the NVIDIA driver, or an empty string if there is none."""
    kernel = Path("/proc/driver/nvidia/version")
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]  # Windows, WSL
    try:
        if kernel.exists():
            answer = kernel.read_text()
        else:
            answer = subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\b\d{3,}\.\d[\d.]*", answer)
    return found[0] if found else ""


def unused_gpu() -> str:
    """Return why torch sees no GPU, and what to do, if this machine has an NVIDIA driver.

    The string is empty if torch sees a GPU, if there is no driver, or if the GPUs are hidden.
    """
    if torch.cuda.is_available() or gpus_are_hidden() or not (driver := nvidia_driver()):
        return ""
    version, cuda = int(driver.split(".")[0]), torch.version.cuda
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    index = next((f"cu{cu}" for cu, least in ((130, 580), (126, 525)) if version >= least), "")
    ours = f"torch {torch.__version__}" + (f" with CUDA {cuda}" if cuda else "")
    both = f"this machine has the NVIDIA driver {driver}, but"
    if Path("/proc/driver/nvidia").exists() and not list(Path("/dev").glob("nvidia[0-9]*")):
        # a container shows the host's /proc
        return f"{both} no device /dev/nvidia0 for {ours}: a container needs --gpus all"
    if not cuda:
        made = "is made for AMD GPUs" if torch.version.hip else "is a CPU-only build"
        update = "" if index else "update the driver to 580 or newer, then "
        return f"{both} {ours} {made}: {update}{install_torch(index or 'cu130')}"
    if version < oldest:
        wheel = f", or {install_torch(index)}" if index else ""
        return f"{both} {ours} needs {oldest} or newer: update the driver{wheel}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = f" (CUDA_VISIBLE_DEVICES is {visible})" if visible else ""
    return f"{both} {ours} sees no GPU{hint}: {cuda_fault()}: see docs/faq.md"


def why_no_gpu() -> str:
    """Return why torch sees no GPU."""
    if gpus_are_hidden():
        return "CUDA_VISIBLE_DEVICES hides the GPUs"
    nothing = "no AMD GPU is found" if torch.version.hip else "no NVIDIA driver is found"
    return unused_gpu() or nothing


def cuda_fault() -> str:
    """Return the reason, in torch's words, why CUDA does not start."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())
        number = re.search(r"Error \d+: .*", text)  # of the CUDA runtime, after a question
        return number[0] if number else re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")
    return "it gives no reason"


# -----------------------------------------------------------------------------
# kernels, and wheels that have them


def missing_kernels(capability: tuple[int, int]) -> str:
    """Return what to do if this torch has no kernels for a GPU of this compute capability.

    The string is empty if it has.
    """
    codes = [re.fullmatch(r"(sm|compute)_(\d+)(\d)(\w?)", a) for a in torch.cuda.get_arch_list()]
    codes = [code.groups() for code in codes if code]  # none: ROCm, whose names are others
    if not codes or any(
        runs_on(kind, (int(X), int(Y)), mark, capability) for kind, X, Y, mark in codes
    ):
        return ""
    if capability < (5, 0):
        remedy = "no current torch has them"
    elif capability < (7, 5):  # CUDA 13 dropped it; wheels for CUDA 12.6 end with torch 2.14
        remedy = install_torch("cu126")
    else:
        old = (torch.version.cuda or "").startswith("12")
        remedy = install_torch("cu130") if old else "install a newer torch"
    version = ".".join(map(str, capability))
    return f"torch {torch.__version__} has no kernels for compute capability {version}: {remedy}"


def runs_on(kind: str, code: tuple[int, int], mark: str, gpu: tuple[int, int]) -> bool:
    """Return whether code made for a compute capability runs on a GPU of another one.

    Machine code (sm) runs on the same major version from its minor version on, PTX (compute) on
    everything newer. Marked with `a` it runs on its own capability only, with `f` in its family.
    (NVIDIA: CUDA programming guide, compute capabilities.)
    """
    if mark == "a":
        return gpu == code
    return gpu >= code and (gpu[0] == code[0] or (kind == "compute" and not mark))


def install_torch(index: str) -> str:
    """Return the advice to replace torch by the same version from another index of wheels."""
    version = torch.__version__.partition("+")[0]
    url = f"https://download.pytorch.org/whl/{index}"
    return f"run pip install --force-reinstall torch=={version} --index-url {url}"
