"""What the machine can do: device, precision, compiler, micro-batch, peaks, memory."""

from pathlib import Path

import pytest
import torch

from common import hardware
from train_gpt2 import PRESETS, Machine

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


# -----------------------------------------------------------------------------
# device, precision, compiler


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_fastest_device_is_chosen_and_a_missing_one_refused(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert hardware.choose_device("auto") == best
    assert hardware.choose_device("cpu") == "cpu"
    for kind, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert hardware.choose_device(kind) == kind
        else:
            with pytest.raises(ValueError, match=f"device {kind}: torch finds none here"):
                hardware.choose_device(kind)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.choose_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 wbnoinvd", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16 amx_tile", torch.bfloat16),
        ("Features\t: fp asimd i8mm bf16 dgh", torch.bfloat16),  # Arm
        ("flags\t\t: fpu sse2 avx512f avx2", torch.float32),
        ("flags\t\t: fpu my_bf16 bf16x", torch.float32),
    ],
)
def test_a_cpu_gets_bfloat16_only_with_instructions_for_it(monkeypatch, cpuinfo, dtype):
    monkeypatch.setattr(hardware.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    assert hardware.choose_dtype("auto", CPU) == dtype
    assert hardware.choose_dtype("auto", MPS) == torch.float32
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert hardware.choose_dtype("auto", CPU) == torch.float32, "no /proc/cpuinfo to read"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_taken(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for device in (CPU, CUDA, MPS):
        assert hardware.choose_dtype(name, device) == getattr(torch, name)


@pytest.fixture
def toolchain(monkeypatch, tmp_path):
    """A Linux machine with all that torch.compile needs."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("device", "missing"),
    [
        (CUDA, "Triton is not installed"),
        (CPU, "Linux only"),
        (CPU, "C++ compiler"),
        (CPU, "python3-dev"),
    ],
)
def test_compiling_needs_tools_and_a_note_names_the_missing_one(
    toolchain, monkeypatch, device, missing
):
    assert hardware.choose_compile("auto", device) == (True, [])
    if "Triton" in missing:
        monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    elif "Linux" in missing:
        monkeypatch.setattr(hardware.sys, "platform", "darwin")
    elif "C++" in missing:
        monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    else:
        (toolchain / "Python.h").unlink()
    compiling, (note,) = hardware.choose_compile("auto", device)
    assert not compiling and note.startswith("torch.compile: ") and missing in note
    assert hardware.choose_compile("on", device) == (True, [note])
    assert hardware.choose_compile("off", device) == (False, [])
    other = CPU if device is CUDA else CUDA
    assert hardware.choose_compile("auto", other) == (True, []), "it does not need this"


def test_the_compiler_that_cxx_names_is_looked_for(toolchain, monkeypatch):
    monkeypatch.setattr(hardware.shutil, "which", {"clang++": "/usr/bin/clang++"}.get)
    assert not hardware.choose_compile("auto", CPU)[0]
    monkeypatch.setenv("CXX", "clang++")
    assert hardware.choose_compile("auto", CPU) == (True, [])


def test_a_mac_gpu_compiles_only_if_asked(toolchain):
    assert hardware.choose_compile("auto", MPS) == (False, [])
    assert hardware.choose_compile("on", MPS) == (True, [])
    assert hardware.choose_compile("off", MPS) == (False, [])


# -----------------------------------------------------------------------------
# micro-batch


def test_the_micro_batch_is_the_largest_power_of_two_that_fits():
    flag = "total_batch_size"
    for limit, expected in ((1000, 512), (48, 32), (1, 1), (0, 1)):
        size = hardware.choose_micro_batch_size(
            None, 524288, 1024, 1, lambda rows, n=limit: rows <= n, flag
        )
        assert size == expected
    assert hardware.choose_micro_batch_size(None, 524288, 1024, 8, lambda rows: True, flag) == 64
    assert hardware.choose_micro_batch_size(None, 96 * 1024, 1024, 1, lambda rows: True, flag) == 32


def test_a_micro_batch_that_is_asked_for_is_taken_without_a_trial():
    def fits(rows: int) -> bool:
        raise AssertionError("no trial is needed")

    assert hardware.choose_micro_batch_size(6, 96 * 16, 16, 2, fits, "total_batch_size") == 6


def test_a_batch_that_does_not_divide_is_refused_with_values_that_do():
    total, ramp = "total_batch_size", "batch_ramp_start"
    with pytest.raises(ValueError, match=r"--micro_batch_size 4 or 2 or 8"):
        hardware.choose_micro_batch_size(5, 524288, 1024, 1, bool, total)
    with pytest.raises(ValueError, match=r"--total_batch_size 522240 or 525312"):
        hardware.choose_micro_batch_size(None, 524288, 1024, 3, bool, total)
    with pytest.raises(ValueError, match=r"give --total_batch_size 1024$"):  # and not 0
        hardware.choose_micro_batch_size(None, 1000, 1024, 1, bool, total)
    with pytest.raises(ValueError, match=r"does not divide batch_ramp_start 32768.*32"):
        hardware.choose_micro_batch_size(64, 32768, 1024, 1, bool, ramp)


def test_rows_that_exceed_memory_do_not_fit_and_leave_no_gradients(four_rows_fit, small_model):
    autocast = Machine(CPU, torch.float32).autocast
    assert not hardware.fits_in_memory(small_model, 8, autocast)
    assert hardware.fits_in_memory(small_model, 4, autocast)
    assert all(p.grad is None for p in small_model.parameters())
    fits = lambda rows: hardware.fits_in_memory(small_model, rows, autocast)  # noqa: E731
    assert hardware.largest_that_fits(48, fits) == 4


# -----------------------------------------------------------------------------
# facts: name, speed, memory, sizes


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        # other products, whose names begin like those in the table
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Quadro RTX 8000", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets_or_unknown(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(CUDA) == (tflops and tflops * 1e12)
    assert hardware.peak_flops(CPU) is None and hardware.peak_flops(MPS) is None


def test_mfu_is_the_part_of_all_ranks_peak_or_unknown(monkeypatch):
    assert hardware.mfu(1e12, 2.0, torch.device("cpu")) is None
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 4e12)
    assert hardware.mfu(1e12, 2.0, torch.device("cuda")) == 0.125
    assert hardware.mfu(1e12, 2.0, torch.device("cuda"), world_size=8) == 0.125 / 8


@pytest.mark.parametrize(
    ("number", "wanted", "expected"),
    [
        (32, 3, "2 or 4 or 1"),
        (512, 5, "4 or 2 or 8"),
        (7919, 2, "1"),
        (10**15, 7, "8 or 5 or 4"),
        (10**15, 10**9 + 7, "64000 or 62500 or 51200"),
    ],
)
def test_the_divisors_proposed_are_the_nearest_and_quickly_found(number, wanted, expected):
    assert hardware.nearest_divisors(number, wanted) == expected


def test_flops_per_token_are_those_of_the_palm_paper():
    # 860 MFLOP a token is what speeds of GPT-2 124M are reported with
    assert round(hardware.flops_per_token(124_475_904, 12, 768, 1024) / 1e6) == 860
    assert hardware.flops_per_token(10, 1, 1, 1) == 60 + 12
    assert hardware.flops_per_token(0, 2, 3, 5) == 12 * 2 * 3 * 5


def test_ugly_dimensions_are_named_with_a_nice_number():
    notes = " ".join(hardware.ugly_dimensions(300, 3, 1024, 12))
    assert "head size 100" in notes and "104" in notes and "128" in notes
    assert "n_embd 300" in notes and "304" in notes and "320" in notes
    assert "micro_batch_size 12" in notes and "block_size" not in notes


def test_no_preset_has_an_ugly_dimension():
    for name, preset in PRESETS.items():
        sizes = preset.n_embd, preset.n_head, preset.block_size
        for rows in (1, 2, 4, preset.micro_batch_size):
            assert not hardware.ugly_dimensions(*sizes, rows), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its memory")
def test_peak_memory_of_a_process_is_in_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    expected = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))
    assert hardware.peak_memory(CPU) == pytest.approx(expected, rel=0.05)


def test_peak_memory_of_a_gpu_is_that_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    assert hardware.peak_memory(CUDA) == 12345


def test_only_a_device_with_a_queue_is_waited_for(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append(1))
    hardware.wait_for(CPU)
    assert not calls
    hardware.wait_for(CUDA)
    hardware.wait_for(MPS)
    assert len(calls) == 2


def test_the_cpus_name_is_the_model_if_linux_tells_it(monkeypatch):
    cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 7R13 Processor\nflags\t: fpu\n"
    monkeypatch.setattr(hardware.Path, "exists", lambda path: True)
    monkeypatch.setattr(hardware.Path, "read_text", lambda path: cpuinfo)
    assert hardware.cpu_name() == "AMD EPYC 7R13 Processor"
    monkeypatch.setattr(hardware.platform, "processor", lambda: "")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(hardware.Path, "read_text", lambda path: "Features\t: fp asimd\n")
    assert hardware.cpu_name() == "aarch64"
    monkeypatch.setattr(hardware.Path, "exists", lambda path: False)
    assert hardware.cpu_name() == "aarch64"
