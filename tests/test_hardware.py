"""What the machine can do: device, errors, precision, compiler, micro-batch, peaks, memory."""

import gc
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL

from common import hardware
from train_gpt2 import GPT, PRESETS, GPTConfig, Machine, TrainConfig, make_optimizers, train_step

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
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: "no GPU")  # tests/test_nvidia.py
    assert hardware.choose_device("auto") == best
    assert hardware.choose_device("cpu") == "cpu"
    for kind, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert hardware.choose_device(kind) == kind
        else:
            why = "no GPU" if kind == "cuda" else "torch finds none here"
            with pytest.raises(ValueError, match=f"^device {kind}: {why}$"):
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


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (64, 4)])
def test_torch_takes_no_more_threads_than_the_container_has_cores(monkeypatch, cores, threads):
    monkeypatch.setattr(hardware, "count_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        hardware.limit_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


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


# -----------------------------------------------------------------------------
# errors of a device


def cpu_is_full() -> None:
    torch.empty(10**15)


def numpy_is_full() -> None:
    np.empty(10**15)


def raising(kind: type[Exception], text: str):
    def fail() -> None:
        raise kind(text)

    return fail


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CUDNN = "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
LAZY = "CUDA call failed lazily at initialization with error: CUDA error: out of memory"
MPS_FULL = "MPS backend out of memory (MPS allocated: 18.0 GiB, other allocations: 96.0 KiB)"
NCCL = "NCCL error in: NCCLUtils.cpp:94\nLast error:\nCuda failure 2 'out of memory'"
NVML = 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1154'


@pytest.mark.parametrize(
    ("device", "gpu", "fail"),
    [
        (CUDA, True, raising(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate")),
        (CUDA, True, raising(torch.OutOfMemoryError, "HIP out of memory. Tried to allocate")),
        (CUDA, True, raising(torch.AcceleratorError, "CUDA error: out of memory\nSearch for")),
        (CUDA, True, raising(RuntimeError, "CUDA driver error: out of memory")),
        (CUDA, True, raising(RuntimeError, CUBLAS)),
        (CUDA, True, raising(RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        (CUDA, True, raising(RuntimeError, f"cuDNN error: {CUDNN}")),
        (CUDA, True, raising(RuntimeError, "Triton Error [CUDA]: out of memory")),
        (CUDA, True, raising(RuntimeError, NVML)),
        (CUDA, True, raising(torch.distributed.DistBackendError, NCCL)),
        (CUDA, True, raising(torch.cuda.DeferredCudaCallError, LAZY)),
        (MPS, True, raising(RuntimeError, MPS_FULL)),
        (MPS, True, raising(RuntimeError, "Invalid buffer size: 19.45 GiB")),
        (CPU, False, cpu_is_full),
        (CPU, False, numpy_is_full),
        (CPU, False, raising(RuntimeError, "std::bad_alloc")),
        (CPU, False, raising(RuntimeError, "DefaultCPUAllocator: not enough memory: you tried")),
        (CPU, False, raising(RuntimeError, "unable to mmap 9 bytes: Cannot allocate memory (12)")),
        (CPU, False, raising(MemoryError, "")),
        (CUDA, False, cpu_is_full),  # beside a GPU, but not its memory
        (CUDA, False, numpy_is_full),
    ],
)
def test_every_lack_of_memory_becomes_one_short_error(device, gpu, fail):
    nested = hardware.device_errors(device)
    with pytest.raises(hardware.OutOfMemory) as caught, hardware.device_errors(device), nested:
        fail()
    assert str(caught.value) == ("out of GPU memory" if gpu else "out of memory")
    assert isinstance(caught.value, ValueError) and caught.value.__suppress_context__


ILLEGAL = """CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda for more information.
CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""


@pytest.mark.parametrize(
    ("kind", "text", "first"),
    [
        (torch.AcceleratorError, ILLEGAL, "CUDA error: an illegal memory access was encountered"),
        (RuntimeError, ILLEGAL, "CUDA error: an illegal memory access was encountered"),
        (torch.AcceleratorError, "device lost", "device lost"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "cuDNN error"),
        (RuntimeError, "cuDNN Frontend error: [cudnn_frontend] Error: no plans", "no plans"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", "CUBLAS"),
        (RuntimeError, "CUDA driver error: unknown error", "CUDA driver error: unknown error"),
        (RuntimeError, "CUDA unknown error - this may be due to", "CUDA unknown error"),
        (RuntimeError, "Triton Error [CUDA]: misaligned address", "misaligned address"),
        (RuntimeError, "HIP error: invalid device function\nHIP kernel", "invalid device function"),
    ],
)
def test_another_fault_of_a_gpu_is_its_first_line(monkeypatch, kind, text, first):
    gpu = torch.device("cuda", 3)
    with pytest.raises(OSError, match=first) as caught, hardware.device_errors(gpu):
        raise kind(text)
    assert isinstance(caught.value, hardware.DeviceError)
    assert str(caught.value).startswith("device cuda:3: ") and "\n" not in str(caught.value)
    assert "CUDA_LAUNCH_BLOCKING" not in str(caught.value)
    if kind is RuntimeError and text == ILLEGAL:  # also in a torch that has no such class
        monkeypatch.delattr(torch, "AcceleratorError")
        with pytest.raises(OSError, match=first), hardware.device_errors(gpu):
            raise kind(text)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp: remote process"),
        AssertionError("Torch not compiled with CUDA enabled"),
        ValueError("too many values to unpack"),
        FileNotFoundError("no file"),
        KeyboardInterrupt(),
        hardware.OutOfMemory("not even one row fits into GPU memory"),
    ],
)
def test_an_error_that_is_not_the_devices_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught, hardware.device_errors(CUDA):
        raise error
    assert caught.value is error and not error.__suppress_context__


# -----------------------------------------------------------------------------
# the compiler


@pytest.fixture
def toolchain(monkeypatch, tmp_path):
    """A Linux machine with all that torch.compile needs."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("device", "missing"),
    [
        (CUDA, "Triton is not installed"),
        (CUDA, "compute capability 7.0"),
        (CPU, "Linux only"),
        (CPU, "C++ compiler (g++)"),
        (CUDA, "C compiler (gcc)"),
        (CPU, "python3-dev"),
        (CUDA, "python3-dev"),
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
    elif "capability" in missing:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    elif "compiler" in missing:
        others = ("gcc", "clang") if "C++" in missing else ("g++", "clang++", "cc")
        monkeypatch.setattr(hardware.shutil, "which", lambda name: name if name in others else None)
    else:
        (toolchain / "Python.h").unlink()
    compiling, (note,) = hardware.choose_compile("auto", device)
    assert not compiling and note.startswith("torch.compile: ") and missing in note
    assert hardware.choose_compile("on", device) == (True, [note])
    assert hardware.choose_compile("off", device) == (False, [])
    if "python3-dev" not in missing:
        other = CPU if device is CUDA else CUDA
        assert hardware.choose_compile("auto", other) == (True, []), "it does not need this"


@pytest.mark.parametrize(
    ("cc", "there", "found"),
    [
        (None, "gcc", True),
        (None, "clang", True),
        (None, "cc", False),
        ("icx", "icx", True),
        ("icx", "gcc", False),  # Triton then looks for no other
    ],
)
def test_tritons_compiler_is_looked_for_as_triton_does(toolchain, monkeypatch, cc, there, found):
    monkeypatch.setattr(hardware.shutil, "which", {there: f"/usr/bin/{there}"}.get)
    if cc:
        monkeypatch.setenv("CC", cc)
    assert hardware.choose_compile("auto", CUDA)[0] == found


def test_triton_for_windows_needs_no_compiler(toolchain, monkeypatch):
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    (toolchain / "Python.h").unlink()
    assert hardware.choose_compile("auto", CUDA) == (True, [])


def test_an_amd_gpu_is_not_judged_by_nvidias_numbers(toolchain, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert hardware.choose_compile("auto", CUDA) == (True, [])


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
    for limit, expected in ((1000, 512), (48, 32), (1, 1)):
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
    with pytest.raises(ValueError, match=r"give --total_batch_size 1024$"):  # and not 0
        hardware.choose_micro_batch_size(None, 1000, 1024, 1, bool, total)
    with pytest.raises(ValueError, match=r"does not divide batch_ramp_start 32768.*32"):
        hardware.choose_micro_batch_size(64, 32768, 1024, 1, bool, ramp)


def test_one_row_is_tried_too_and_an_error_says_if_it_does_not_fit():
    tried = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return False

    with pytest.raises(hardware.OutOfMemory, match="not even one row fits into GPU memory"):
        hardware.choose_micro_batch_size(None, 64 * 1024, 1024, 8, fits, "total_batch_size")
    assert tried == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("tokens", "ranks", "proposed"),
    [
        (524288, 3, "393216 or 589824"),  # 128 or 192 rows on each rank
        (524288, 5, "491520 or 655360"),
        (524288, 6, "393216 or 589824"),
        (524288, 7, "458752 or 688128"),
        (1048576, 3, "983040 or 1179648"),
        (10000, 1, "8192 or 12288"),  # of few rows, the nearest
        (4000, 3, "3072 or 6144"),
        (1000, 3, "3072"),  # and not 0
    ],
)
def test_batches_proposed_for_any_number_of_gpus_keep_a_good_micro_batch(tokens, ranks, proposed):
    with pytest.raises(ValueError) as caught:
        hardware.choose_micro_batch_size(None, tokens, 1024, ranks, bool, "total_batch_size")
    assert str(caught.value).endswith(f"{ranks} ranks: give --total_batch_size {proposed}")
    sizes = []
    for batch in map(int, proposed.split(" or ")):
        sizes.append(
            hardware.choose_micro_batch_size(
                None, batch, 1024, ranks, lambda rows: rows <= 32, "total_batch_size"
            )
        )
    assert min(sizes) >= min(32, tokens // (1024 * ranks) // 4)


@pytest.mark.parametrize(
    ("total", "ranks", "proposed"),
    [
        (589824, 3, "--batch_ramp_start 24576 or 36864"),
        (393216, 3, "--batch_ramp_start 24576 or 49152"),
        (458752, 7, "--batch_ramp_start 28672 or 57344"),
        # no multiple of three rows divides this total: another total is needed too
        (524288, 3, "--total_batch_size 393216 or 589824 and --batch_ramp_start 24576 or 49152"),
    ],
)
def test_the_start_proposed_for_a_batch_ramp_divides_the_total(total, ranks, proposed):
    with pytest.raises(ValueError, match=f"give {proposed}$"):
        hardware.choose_micro_batch_size(
            1, 32768, 1024, ranks, bool, "batch_ramp_start", divides=total
        )
    totals, starts = ([total], proposed) if " and " not in proposed else proposed.split(" and ")
    if isinstance(totals, str):
        totals = [int(n) for n in totals.split() if n.isdigit()]
    starts = [int(n) for n in starts.split() if n.isdigit()]
    for whole, start in itertools.product(totals, starts):
        assert whole % start == 0 and start % (1024 * ranks) == 0


def test_a_batch_is_proposed_quickly_whatever_is_asked_for():
    prime = 10**12 + 39
    assert hardware.good_batches(10**15 + 1, 7)[0] <= 10**15
    assert hardware.good_batches(32, 3, divides=3 * prime) == [3]
    assert hardware.good_batches(10**9, 3, divides=3 * prime) == [3 * prime]


@pytest.mark.parametrize(
    ("size", "tokens", "T", "ranks", "proposed"),
    [
        (1, 525312, 1024, 3, "393216 or 589824"),  # 171 rows on each rank
        (4, 102400, 1024, 1, "98304 or 131072"),
        (4, 3 * 1024 * 20, 1024, 3, "49152 or 73728"),
        (8, 524288, 1024, 8, None),
        (4, 524288, 1024, 8, None),  # memory is the limit
        (5, 25600, 1024, 1, None),  # asked for
        (2, 1024 * 14, 1024, 1, "12288 or 16384"),
        (2, 1024 * 2, 1024, 1, None),  # all rows at once
        (4, 512, 128, 1, None),  # the preset `tiny`
        (2, 512, 128, 2, None),
        (1, 1152, 128, 3, "1536"),
    ],
)
def test_a_batch_that_forces_a_small_micro_batch_is_noted(size, tokens, T, ranks, proposed):
    notes = hardware.small_micro_batch_note(size, tokens, T, ranks)
    assert len(notes) == (proposed is not None)
    for note in notes:
        assert f"micro_batch_size is {size}" in note and f"--total_batch_size {proposed} " in note


def test_no_preset_is_noted_for_its_micro_batch():
    for preset, ranks in itertools.product(PRESETS.values(), (1, 2, 4, 8, 16)):
        tokens, T = preset.total_batch_size, preset.block_size
        if tokens % (T * ranks) == 0:
            size = hardware.largest_that_fits(tokens // (T * ranks), lambda rows: rows <= 32)
            assert not hardware.small_micro_batch_note(size, tokens, T, ranks)


def test_the_micro_batch_grows_with_a_batch_ramp():
    rows = [
        hardware.rows_of_step(64, n * 32768, 1024, 8) for n in range(1, 17)
    ]  # 4 rows more on each rank with every step of the ramp
    assert rows == [4, 8, 4, 16, 4, 8, 4, 32, 4, 8, 4, 16, 4, 8, 4, 64]
    for n, b in enumerate(rows, 1):
        assert n * 32768 % (b * 1024 * 8) == 0
    assert hardware.rows_of_step(64, 32768, 1024, 1) == 32
    assert hardware.rows_of_step(6, 1024 * 12, 1024, 1) == 6, "what was asked for, if it divides"
    assert hardware.rows_of_step(6, 1024 * 8, 1024, 1) == 4
    with pytest.raises(AssertionError):
        hardware.rows_of_step(4, 32768, 1024, 3)


def test_rows_that_exceed_memory_do_not_fit_and_leave_no_gradients(four_rows_fit, small_model):
    autocast = Machine(CPU, torch.float32).autocast
    assert not hardware.fits_in_memory(small_model, 8, autocast)
    assert hardware.fits_in_memory(small_model, 4, autocast)
    assert all(p.grad is None for p in small_model.parameters())
    fits = lambda rows: hardware.fits_in_memory(small_model, rows, autocast)  # noqa: E731
    assert hardware.largest_that_fits(48, fits) == 4


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory"])
def test_the_trial_understands_every_lack_of_memory(monkeypatch, small_model, text):
    autocast = Machine(CPU, torch.float32).autocast
    monkeypatch.setattr(GPT, "loss", lambda *args: raising(RuntimeError, text)())
    assert not hardware.fits_in_memory(small_model, 1, autocast)
    monkeypatch.setattr(GPT, "loss", lambda *args: raising(RuntimeError, "a bug")())
    with pytest.raises(RuntimeError, match="a bug"):
        hardware.fits_in_memory(small_model, 1, autocast)


@pytest.mark.parametrize(("ranks", "tensors"), [(1, 3), (2, 5)])
def test_the_trial_holds_what_a_second_micro_step_holds(monkeypatch, small_model, ranks, tensors):
    """Beside the weights: gradients, two moments and, on several ranks, old and new buckets."""
    whole_loss, empty_like, held, seen = GPT.loss, torch.empty_like, [], []

    def counting(p):
        held.append(weakref.ref(made := empty_like(p)))
        return made

    def loss(self, x, targets):
        alive = [tensor for ref in held if (tensor := ref()) is not None]
        seen.append(sum(tensor.numel() for tensor in alive))
        assert all(p.grad is not None for p in self.parameters())
        return whole_loss(self, x, targets)

    monkeypatch.setattr(torch, "empty_like", counting)
    monkeypatch.setattr(GPT, "loss", loss)
    autocast = Machine(CPU, torch.float32).autocast
    assert hardware.fits_in_memory(small_model, 2, autocast, ranks)
    assert seen == [tensors * small_model.n_params]
    assert all(p.grad is None for p in small_model.parameters())


def test_a_failed_trial_frees_its_memory_before_the_next(monkeypatch, small_model):
    """Without waiting for the collector of cycles."""
    held, emptied, empty_like = [], [], torch.empty_like

    def noting(p):
        held.append(weakref.ref(made := empty_like(p)))
        return made

    def full(self, x, targets):
        held.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", noting)
    monkeypatch.setattr(GPT, "loss", full)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: emptied.append([r() is None for r in held])
    )
    gc.disable()
    try:
        assert not hardware.fits_in_memory(small_model, 2, Machine(CPU, torch.float32).autocast)
    finally:
        gc.enable()
    assert len(held) > 1 and emptied == [[True] * len(held)]


def test_the_trial_changes_no_random_numbers():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, dropout=0.5)).train()
    before = torch.get_rng_state()
    assert hardware.fits_in_memory(model, 2, Machine(CPU, torch.float32).autocast)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_tokens_than_were_measured_are_not_tried(monkeypatch, small_model):
    tried = []
    monkeypatch.setattr(hardware, "try_micro_step", lambda model, rows, *rest: tried.append(rows))
    autocast = Machine(CPU, torch.float32).autocast
    large = GPTConfig(n_layer=1, n_head=1, n_embd=1)  # 1,024 tokens, 50,304 ids
    monkeypatch.setattr(small_model, "config", large)
    fits = lambda rows: hardware.fits_in_memory(small_model, rows, autocast)  # noqa: E731
    assert hardware.largest_that_fits(512, fits) == 64 and tried == [64]
    # a single row cannot be made smaller
    monkeypatch.setattr(small_model, "config", GPTConfig(n_embd=12, block_size=1 << 17))
    assert fits(1) and not fits(2)


# -----------------------------------------------------------------------------
# attention


def test_cudnn_is_left_out_of_attention_for_new_shapes_and_is_back_afterwards():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    others = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled")
    before = [getattr(torch.backends.cuda, name)() for name in others]
    q = torch.randn(1, 2, 8, 16)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert enabled()
    with pytest.raises(KeyError), hardware.attention_for_any_shape():
        with hardware.attention_for_any_shape():
            assert not enabled()
        assert not enabled(), "the inner block restores what it found"
        assert [getattr(torch.backends.cuda, name)() for name in others] == before
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)
        raise KeyError
    assert enabled()


def test_a_generator_keeps_cudnn_out_only_while_it_computes():
    def tokens():
        for _ in range(2):
            with hardware.attention_for_any_shape():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
            yield

    for _ in tokens():
        assert torch.backends.cuda.cudnn_sdp_enabled()


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
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
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
        # a part of a GPU
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A100-PCIE-40GB MIG 3g.20gb", None),
        ("NVIDIA A100 80GB PCIe MIG 2g.20gb", None),
        ("NVIDIA GH200 480GB MIG 1g.12gb", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA A100-40C", None),
        ("Tesla V100-SXM2-16GB MIG 1g", None),
        ("Tesla V100-SXM3-32GB-H", None),
        ("Quadro RTX 8000", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets_or_unknown(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(CUDA) == (tflops and tflops * 1e12)
    assert hardware.peak_flops(CPU) is None and hardware.peak_flops(MPS) is None


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


def test_a_device_has_its_gpus_name_or_its_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert hardware.device_name(torch.device("cuda", 3)) == "GPU 3"
    assert (hardware.device_name(CPU), hardware.device_name(MPS)) == ("cpu", "mps")


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


# -----------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_needs_as_much_memory_as_training(ranks, tmp_path):
    """A step of two micro-steps. A process group of one rank has all the buckets of several."""
    gpu = torch.device("cuda", 0)
    machine = Machine(gpu, torch.bfloat16, world_size=ranks)
    model = GPT(GPTConfig()).to(gpu).train()
    torch.cuda.reset_peak_memory_stats()
    assert hardware.fits_in_memory(model, 1, machine.autocast, ranks)
    trial = torch.cuda.max_memory_allocated()
    optimizers = make_optimizers(model, TrainConfig(), machine)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    x, trained = torch.zeros(1, 1024, dtype=torch.long, device=gpu), model
    if ranks > 1:
        join = f"file://{tmp_path / 'join'}"
        torch.distributed.init_process_group("nccl", init_method=join, rank=0, world_size=1)
        trained = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    try:
        for _ in range(2):  # the second step has AdamW's moments, and DDP's old and new buckets
            torch.cuda.reset_peak_memory_stats()
            train_step(trained, optimizers, scaler, iter([(x, x)] * 2), 2, 1.0, machine)
    finally:
        if ranks > 1:
            torch.distributed.destroy_process_group()
    training = torch.cuda.max_memory_allocated()
    assert training <= 1.05 * trial, "the micro-batch that was chosen does not fit"
    assert trial <= 1.1 * training, "a larger micro-batch would have fitted"


@pytest.mark.gpu
def test_a_full_gpu_is_one_short_error_and_goes_on():
    gpu = torch.device("cuda", 0)
    with (
        pytest.raises(hardware.OutOfMemory, match="out of GPU memory"),
        hardware.device_errors(gpu),
    ):
        torch.empty(1 << 45, device=gpu)
    model = GPT(GPTConfig(**{**SMALL, "block_size": 4096}, dropout=0.1)).to(gpu).train()
    random, autocast = torch.cuda.get_rng_state(), Machine(gpu, torch.bfloat16).autocast
    filler = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device=gpu)
    assert not hardware.fits_in_memory(model, 1024, autocast), "the residual stream takes 512 MB"
    assert hardware.fits_in_memory(model, 1, autocast)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    del filler


@pytest.mark.gpu
def test_attention_to_new_shapes_makes_no_plan():
    model = GPT(GPTConfig(n_layer=1)).to("cuda").eval()

    def operations() -> set[str]:
        tokens = torch.zeros(2, 100, dtype=torch.long, device="cuda")
        cpu = torch.profiler.ProfilerActivity.CPU
        autocast = torch.autocast("cuda", torch.bfloat16)
        with torch.no_grad(), autocast, torch.profiler.profile(activities=[cpu]) as profile:
            model.hidden(tokens)
        return {event.key for event in profile.key_averages()}

    cudnn = "aten::_scaled_dot_product_cudnn_attention"
    with hardware.attention_for_any_shape():
        assert cudnn not in operations()
    if torch.cuda.get_device_capability() in ((9, 0), (10, 0)) and torch.version.cuda >= "13":
        assert cudnn in operations(), "torch no longer prefers cuDNN: the context is not needed"
