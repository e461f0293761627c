"""The NVIDIA driver and torch's kernels: why a GPU is not used, and which torch would use it."""

import subprocess

import pytest
import torch

from common import hardware, nvidia

NO_DRIVER = "no NVIDIA driver is found"
TO_126 = "--index-url https://download.pytorch.org/whl/cu126"
TO_130 = "--index-url https://download.pytorch.org/whl/cu130"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A stand-in for /proc, /dev, nvidia-smi and a torch that sees no GPU."""
    settings = {"smi": ""}

    def path(name: str):
        return tmp_path / name.strip("/")

    def smi(*args, **kwargs):
        if not settings["smi"]:
            raise FileNotFoundError("nvidia-smi")
        return subprocess.CompletedProcess(args, 0, stdout=settings["smi"])

    def driver(text: str, devices: int = 1) -> None:
        path("/proc/driver/nvidia").mkdir(parents=True)
        path("/proc/driver/nvidia/version").write_text(text)
        path("/dev").mkdir()
        path("/dev/nvidiactl").touch()
        for n in range(devices):
            path(f"/dev/nvidia{n}").touch()

    def torch_is(version: str, cuda: str | None, hip: str | None = None, error: str = "") -> None:
        def init() -> None:
            if error:
                raise RuntimeError(error)

        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "init", init)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "Path", path)
    monkeypatch.setattr(nvidia.subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings |= {"driver": driver, "torch": torch_is}
    return settings


CLOSED = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb 22 01:44:30 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"


@pytest.mark.parametrize("text", [CLOSED, OPEN])
@pytest.mark.parametrize("version", ["550.54.14", "580.65.06", "570.124"])
def test_the_drivers_version_is_read_from_both_kernel_modules(machine, text, version):
    machine["driver"](text.format(version))
    assert nvidia.nvidia_driver() == version


@pytest.mark.parametrize("answer", ["572.16\n", "572.16\n572.16\n"])
def test_without_proc_nvidia_smi_tells_the_driver(machine, answer):
    machine["smi"] = answer
    assert nvidia.nvidia_driver() == "572.16"


@pytest.mark.parametrize("answer", ["", "No devices were found", "Failed to initialize NVML"])
def test_a_machine_without_a_driver_is_warned_of_nothing(machine, answer, capsys):
    machine["smi"] = answer
    machine["torch"]("2.13.0+cpu", None)
    assert nvidia.unused_gpu() == ""
    hardware.warn_of_unused_gpu()
    assert hardware.choose_device("auto") == "cpu"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match=f"^device cuda: {NO_DRIVER}$"):
        hardware.choose_device("cuda")


def test_an_nvidia_smi_that_hangs_holds_nothing_up(machine, monkeypatch):
    def hang(*args, timeout: float, **kwargs):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(nvidia.subprocess, "run", hang)
    assert nvidia.nvidia_driver() == ""


@pytest.mark.parametrize("driver", ["535.104.05", "525.60.13", "570.86.15"])
def test_a_driver_older_than_the_wheels_cuda_is_named_with_what_fits_it(machine, driver):
    machine["driver"](CLOSED.format(driver))
    machine["torch"]("2.13.0+cu130", "13.0", error="The NVIDIA driver on your system is too old")
    why = nvidia.unused_gpu()
    assert f"NVIDIA driver {driver}" in why and "torch 2.13.0+cu130 with CUDA 13.0" in why
    assert "needs 580 or newer: update the driver, or run pip install" in why
    assert why.endswith(f"torch==2.13.0 {TO_126}")
    with pytest.raises(ValueError, match="needs 580 or newer"):
        hardware.choose_device("cuda")


def test_a_driver_that_no_wheel_fits_has_to_be_updated(machine):
    machine["driver"](CLOSED.format("470.82.01"))
    machine["torch"]("2.12.0+cu126", "12.6", error="The NVIDIA driver on your system is too old")
    assert nvidia.unused_gpu().endswith("needs 525 or newer: update the driver")
    machine["torch"]("2.12.0+cpu", None)
    assert "update the driver to 580 or newer, then run pip install" in nvidia.unused_gpu()


@pytest.mark.parametrize(("driver", "index"), [("550.54.14", TO_126), ("590.44.01", TO_130)])
def test_a_cpu_only_torch_beside_a_driver_is_named_with_the_wheel_to_install(
    machine, driver, index, capsys
):
    machine["driver"](OPEN.format(driver))
    machine["torch"]("2.13.0+cpu", None)
    why = nvidia.unused_gpu()
    assert f"{driver}, but torch 2.13.0+cpu is a CPU-only build: run pip install" in why
    # 2.13.0+cpu satisfies torch==2.13.0, so pip would leave it there
    assert why.endswith(f"--force-reinstall torch==2.13.0 {index}")
    hardware.warn_of_unused_gpu()
    out, err = capsys.readouterr()
    assert not out and err == f"warning: running on the CPU: {why}\n"


def test_a_container_without_gpus_is_named_as_such(machine):
    machine["driver"](CLOSED.format("580.65.06"), devices=0)
    machine["torch"]("2.13.0", "13.0", error="Found no NVIDIA driver on your system.")
    assert "no device /dev/nvidia0" in nvidia.unused_gpu()
    assert nvidia.unused_gpu().endswith("a container needs --gpus all")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before "
            "calling NumCudaDevices() that might have already set an error? Error 802: system not "
            "yet initialized",
            "Error 802: system not yet initialized",
        ),
        ("No CUDA GPUs are available", "No CUDA GPUs are available"),
        (
            "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. "
            "changing env variable CUDA_VISIBLE_DEVICES after program start. Setting the available "
            "devices to be zero.",
            "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. "
            "changing env variable CUDA_VISIBLE_DEVICES after program start",
        ),
        ("", "it gives no reason"),
    ],
)
def test_another_fault_is_told_in_torchs_own_words(machine, error, reason):
    machine["driver"](CLOSED.format("580.65.06"))
    machine["torch"]("2.13.0", "13.0", error=error)
    why = nvidia.unused_gpu()
    assert "580.65.06" in why and "torch 2.13.0 with CUDA 13.0 sees no GPU" in why
    assert why.endswith(f": {reason}: see docs/faq.md") and "\n" not in why


@pytest.mark.parametrize("hidden", ["", " ", "-1", "-1,0", "NoDevFiles"])
def test_gpus_that_the_user_hides_are_not_warned_of(machine, monkeypatch, hidden):
    machine["driver"](CLOSED.format("535.104.05"))
    machine["torch"]("2.13.0+cpu", None)
    assert nvidia.unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert nvidia.unused_gpu() == ""
    with pytest.raises(ValueError, match="device cuda: CUDA_VISIBLE_DEVICES hides the GPUs"):
        hardware.choose_device("cuda")


def test_a_wrong_number_of_a_gpu_is_named(machine, monkeypatch):
    machine["driver"](CLOSED.format("580.65.06"))
    machine["torch"]("2.13.0", "13.0", error="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "(CUDA_VISIBLE_DEVICES is 7): No CUDA GPUs" in nvidia.unused_gpu()


def test_a_torch_for_amd_gpus_is_said_to_be_one(machine):
    machine["driver"](CLOSED.format("580.65.06"))
    machine["torch"]("2.13.0+rocm7.1", None, hip="7.1.0")
    assert "torch 2.13.0+rocm7.1 is made for AMD GPUs: run pip install" in nvidia.unused_gpu()


def test_a_torch_for_amd_gpus_without_one_looks_for_no_nvidia_driver(machine):
    machine["torch"]("2.13.0+rocm7.1", None, hip="7.1.0", error="No HIP GPUs are available")
    assert nvidia.unused_gpu() == ""
    with pytest.raises(ValueError, match="device cuda: no AMD GPU is found"):
        hardware.choose_device("cuda")


def test_nothing_is_looked_for_when_cuda_works(machine, monkeypatch):
    def look() -> str:
        raise AssertionError("nothing to look for")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvidia, "nvidia_driver", look)
    monkeypatch.setattr(nvidia, "cuda_fault", look)
    for kind in ("auto", "cuda"):
        assert hardware.choose_device(kind) == "cuda"
    assert nvidia.unused_gpu() == ""


# -----------------------------------------------------------------------------
# kernels

CU126 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
CU130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


def kernels_fail(monkeypatch, archs: str, capability: tuple[int, int], cuda: str = "13.0") -> str:
    """The error of check_gpu, or an empty string."""
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_arch_list", archs.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GPU")
    try:
        hardware.check_gpu(torch.device("cuda", 0))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (CU130, (7, 5), True),  # T4
        (CU130, (8, 7), True),  # machine code runs on a newer minor version
        (CU130, (8, 9), True),  # RTX 4090
        (CU130, (10, 3), True),  # B300
        (CU130, (12, 1), True),  # DGX Spark
        (CU130, (7, 0), False),  # V100
        (CU130, (6, 0), False),  # P100
        (CU126, (7, 0), True),
        (CU126, (6, 1), True),  # GTX 1080
        (CU126, (10, 0), False),  # B200
        (CU126, (12, 0), False),  # RTX 5090
        ("sm_86", (8, 0), False),  # and not on an older one
        ("sm_80 compute_80", (9, 0), True),  # PTX runs on everything newer
        ("sm_90 compute_90", (8, 9), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a compute_90a", (10, 0), False),  # `a`: nowhere else
        ("sm_100a", (10, 3), False),
        ("sm_120f", (12, 1), True),  # `f`: in its family
        ("compute_100f", (12, 0), False),
        ("", (7, 0), True),  # a CPU build names none
        ("gfx90a gfx942", (9, 4), True),  # ROCm
    ],
)
def test_a_gpu_is_refused_exactly_if_torch_has_no_code_for_it(monkeypatch, archs, capability, runs):
    assert (kernels_fail(monkeypatch, archs, capability) == "") == runs


def test_a_gpu_without_kernels_is_named_with_the_wheels_that_have_them(monkeypatch):
    error = kernels_fail(monkeypatch, CU130, (7, 0))
    assert error == (
        "NVIDIA GPU: torch 2.13.0 has no kernels for compute capability 7.0: "
        f"run pip install --force-reinstall torch==2.13.0 {TO_126}"
    )
    assert kernels_fail(monkeypatch, CU126, (12, 0), cuda="12.6").endswith(TO_130)
    assert kernels_fail(monkeypatch, CU130, (14, 0)).endswith("install a newer torch")
    assert kernels_fail(monkeypatch, CU130, (3, 7)).endswith("no current torch has them")


def test_the_wheels_named_are_those_of_torchs_own_table():
    table = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", None) or pytest.skip("an older torch")
    assert min(table["12.6"]["x86_64"]) == 50 and 70 in table["12.6"]["x86_64"]
    assert min(table["13.0"]["x86_64"]) == 75 and {100, 120} <= table["13.0"]["x86_64"]


@pytest.mark.gpu
def test_this_machines_gpu_has_kernels():
    hardware.check_gpu(torch.device("cuda", 0))
    assert hardware.choose_device("auto") == "cuda" and nvidia.unused_gpu() == ""
    assert int(nvidia.nvidia_driver().split(".")[0]) >= 525
