"""The processes of a distributed run: how ranks join, agree, wait for each other and report errors.

Ranks talk in two ways. Tensors go through the process group (NCCL or gloo), whose operations end
with an error after a time limit. Everything that comes before it, or that may take long, goes
through the store: a small server of keys and values, in torchrun or in rank 0.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import cli, hardware

POLL = 0.02  # seconds between two looks at the store
PATIENCE = 1.0  # seconds to see whether other ranks have the same error
SILENT = "another rank has been silent for {:g} minutes"


@dataclass
class Round:
    """The ranks that run at the same time. After a failure torchrun starts all of them again."""

    rank: int = 0
    world_size: int = 1
    limit: float = 600.0  # seconds after which a silent rank counts as lost
    store: "dist.Store | None" = None  # of this round alone; None while joining
    turns: Iterator[int] = field(default_factory=count)  # numbers what all ranks do together


# Of this process; None before it joins, and without other ranks. It stays after an error: `fail`,
# which prints it, is outside of the `with` block that joined.
_round: Round | None = None


class LostRankError(ConnectionError):
    """Another rank has ended, or is silent."""


def launched() -> bool:
    """Return whether a launcher has started this process as one of several ranks."""
    return bool(os.environ.get("RANK"))


def time_limit() -> timedelta | None:
    """Return after what time a silent rank counts as lost; None without other ranks."""
    return _round and timedelta(seconds=_round.limit)


# -----------------------------------------------------------------------------
# joining and leaving


def local_device(asked: str) -> torch.device:
    """Return the device of this process: each rank of a machine has its own GPU.

    `asked` is auto, cuda, mps or cpu. Raises ValueError if torch cannot use the device, or if the
    machine has fewer GPUs than ranks.
    """
    on_cpu = "--device cpu runs without a GPU"
    with cli.advice(on_cpu):
        kind = hardware.choose_device(asked)
    if kind == "mps" and _round is not None:  # gloo knows the CPU and CUDA
        if asked == "mps":
            raise ValueError(f"device mps: several ranks cannot share tensors on it: {on_cpu}")
        kind = "cpu"
    if asked == "auto" and kind == "cpu" and (os.environ.get("LOCAL_RANK") or "0") == "0":
        hardware.warn_of_unused_gpu()
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind) if _round is None else own_gpu()
    with hardware.device_errors(device):
        with cli.advice(on_cpu):
            hardware.check_gpu(device)
        if _round is not None:
            torch.cuda.set_device(device)
    return device


def own_gpu() -> torch.device:
    """Return the GPU of this rank."""
    here, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)  # Slurm, Kubernetes: each process sees only its own GPU
    ranks = max(here + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if ranks > gpus:  # under torchrun, all ranks of the machine say the same
        raise ValueError(
            f"{ranks} ranks on this machine, but torch sees only {gpus} GPU{'s' * (gpus > 1)}: "
            f"start with --nproc_per_node={gpus}"
        )
    return torch.device("cuda", here)


@contextlib.contextmanager
def join_ranks(timeout_minutes: float) -> Iterator[tuple[int, int]]:
    """Meet the other ranks in the store; yield rank and world size. Without a launcher: 0 and 1.

    Raises ValueError if the environment is incomplete, OSError if ranks are missing or lost.
    """
    global _round
    if not launched():
        yield 0, 1
        return
    _round = Round(limit=60 * timeout_minutes)
    _round.rank, _round.world_size = read_environment()
    try:
        timeout = timedelta(minutes=timeout_minutes)
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
        _round.store = enter_round(store, _round)
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise OSError(f"the ranks do not meet at {address} ({reason}): start all of them") from None
    try:
        yield _round.rank, _round.world_size
    except Exception as error:
        if is_loss(error):
            if within(3 * PATIENCE, lambda: await_key("failed", 2 * PATIENCE)) is not None:
                within(3 * PATIENCE, lambda: leave(2 * PATIENCE))
                sys.exit(2)  # that rank has said why
            raise LostRankError(describe_loss(error, timeout_minutes)) from None
        if not isinstance(error, ValueError | OSError):  # a bug: the others must not wait long
            within(PATIENCE, lambda: _round.store.set("failed", ""))
        raise
    _round = None


def read_environment() -> tuple[int, int]:
    """Return rank and world size from the variables that torchrun, Kubernetes or a user sets."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    what_to_do = f"start with torchrun, set {', '.join(names)}, or unset RANK to run on one device"
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"RANK is set, but not {' and '.join(missing)}: {what_to_do}")
    try:
        rank, world_size, _ = (int(os.environ[name]) for name in names[:3])
    except ValueError:
        raise ValueError(f"RANK, WORLD_SIZE or MASTER_PORT is no number: {what_to_do}") from None
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: {what_to_do}")
    return rank, world_size


def enter_round(store: dist.Store, this: Round) -> dist.Store:
    """Return a part of the store that only the ranks of this round use.

    torchrun keeps one store over all restarts, with the addresses of dead ranks in it, and its
    restart counts differ from node to node. So rank 0 draws a name for the round. Every other rank
    leaves a note with a number of its own, and uses the name that answers this number. The notes
    of dead ranks are answered too, but nobody reads these answers.
    """
    deadline = time.monotonic() + this.limit
    if this.rank:
        note = uuid.uuid4().hex
        store.set(f"note/{this.rank}", note)
        while not store.check([f"answer/{note}"]):
            if time.monotonic() > deadline:
                raise OSError("rank 0 did not join: start all ranks")
            time.sleep(POLL)
        name = store.get(f"answer/{note}").decode()
        store.set(f"{name}/joined/{this.rank}", "")
        return dist.PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, set(range(1, this.world_size))
    while missing := {r for r in missing if not store.check([f"{name}/joined/{r}"])}:
        if time.monotonic() > deadline:
            numbers = ", ".join(map(str, sorted(missing)))
            raise OSError(f"these ranks did not join: {numbers}: start all ranks")
        for rank in missing:
            if store.check([f"note/{rank}"]):
                store.set(f"answer/{store.get(f'note/{rank}').decode()}", name)
        time.sleep(POLL)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def process_group(kind: str) -> Iterator[None]:
    """Connect the ranks that have joined, to exchange tensors on devices of this kind."""
    if _round is None:
        yield
        return
    with cli.advice("see why, or give --device"):
        check_equal({"device": kind})
    nccl = kind == "cuda" and dist.is_nccl_available()  # not on Windows; gloo is slow with GPUs
    try:
        dist.init_process_group(
            "nccl" if nccl else "gloo", store=_round.store, rank=_round.rank,
            world_size=_round.world_size, timeout=time_limit(),
        )  # fmt: skip
        if nccl:  # NCCL connects, and takes its memory, in the first operation
            dist.all_reduce(torch.zeros(1, device=kind))
    except RuntimeError as error:
        if isinstance(error, hardware.CUDA_ERRORS):
            raise
        reason = " ".join(str(error).split())
        raise LostRankError(f"the ranks cannot connect ({reason}): see docs/running.md") from None
    yield
    # After an error, NCCL's destroy_process_group() would wait for the other ranks, and they wait
    # for this one. The error must be printed, and the launcher then ends the others.
    if not nccl:
        # The threads of gloo release a tensor a moment after its sum is there. If Python ends
        # before that, they abort the process. So no rank leaves before the last one is done.
        with contextlib.suppress(RuntimeError):  # a rank that failed has reported it
            dist.barrier()
    within(30, lambda: leave(30))
    dist.destroy_process_group()


# -----------------------------------------------------------------------------
# waiting and agreeing


def await_key(key: str, limit: float) -> bytes:
    """Return the value of a key of this round, once it is there.

    Raises LostRankError if a rank has failed, or if nobody shows a sign of life for `limit`
    seconds: the rank that will set the key may show it with `heartbeat`.
    """
    store, start, beats, pause = _round.store, time.monotonic(), 0, POLL
    while not store.check([key]):
        if store.check(["failed"]):
            raise LostRankError("another rank has failed")
        if (now := store.add(f"{key}/beats", 0)) > beats:
            start, beats = time.monotonic(), now
        if time.monotonic() - start > limit:
            raise LostRankError(SILENT.format(limit / 60))
        time.sleep(pause)
        pause = min(1.05 * pause, 1.0)  # hundreds of ranks may ask one store for minutes
    return store.get(key)


@contextlib.contextmanager
def heartbeat(key: str) -> Iterator[None]:
    """Show the ranks that await a key, every second, that this process works on it."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):
            while not done.wait(1):
                _round.store.add(f"{key}/beats", 1)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return what a function returns; None if it fails or takes longer.

    The store's own calls have no time limit: if its process is frozen, they never return.
    """
    results = []

    def call() -> None:
        with contextlib.suppress(RuntimeError, LostRankError):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def is_loss(error: Exception) -> bool:
    """Return whether an exception says that another rank has ended or is silent."""
    if isinstance(error, LostRankError | dist.DistError):
        return True
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo and bool(re.search("connect|time(d )?out|clos|broken pipe", str(error), re.I))


def describe_loss(error: Exception, timeout_minutes: float) -> str:
    """Return what such an exception means, in the same words on all ranks."""
    text = " ".join(str(error).split())
    if isinstance(error, LostRankError | dist.DistBackendError):  # our words, or NCCL's, say it
        return text
    if isinstance(error, dist.DistError):
        return "the store cannot be reached, because torchrun or rank 0 has ended"
    if re.search("time(d )?out", text, re.I):
        return SILENT.format(timeout_minutes)
    return "another rank has ended"


def leave(limit: float) -> None:
    """Tell the others that this rank leaves. Rank 0, which may be the store, leaves last.

    It waits for at most `limit` seconds.
    """
    deadline = time.monotonic() + limit
    with contextlib.suppress(RuntimeError):  # the store has ended
        left = _round.store.add("left", 1)
        while _round.rank == 0 and left < _round.world_size and time.monotonic() < deadline:
            time.sleep(POLL)
            left = _round.store.add("left", 0)


def on_rank_0(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 alone; return its result, or raise its error, on every rank.

    All ranks must call it. They wait at the store, so the work may take longer than the time limit
    of tensor operations, as long as rank 0 lives. Tensors in the result have numbers on rank 0 only
    (see `share`); `parallel.from_rank_0` sends them.
    """
    if _round is None:
        return function(*args)
    key, value = f"turn/{next(_round.turns)}", None
    if _round.rank == 0:
        try:
            with heartbeat(key):
                value = function(*args)
        except (ValueError, OSError) as error:  # now all ranks have it: it is printed once
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            _round.store.set(key, f"{kind}: {cli.explain(error)}")
            raise
        _round.store.set(key, "done" if value is None else "value")
        return value if value is None else share(value)
    said, _, message = await_key(key, _round.limit).decode().partition(": ")
    if said in ("OSError", "ValueError"):
        raise (OSError if said == "OSError" else ValueError)(message)
    return share(None) if said == "value" else None


class Outline(pickle.Pickler):
    """Pickle a value with the shapes and dtypes of its tensors, but not their numbers."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return without_numbers, (value.shape, value.dtype, isinstance(value, nn.Parameter))


def without_numbers(shape: torch.Size, dtype: torch.dtype, parameter: bool) -> Tensor:
    """Return a tensor on the meta device, which has no memory."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(tensor) if parameter else tensor


def share(value: Any) -> Any:
    """Return rank 0's value on every rank; others may give None.

    Its tensors have numbers on rank 0 only. On other ranks they are on the meta device.
    """
    cuda = dist.get_backend() == "nccl"  # NCCL sends from GPU to GPU
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    file = io.BytesIO()
    Outline(file).dump(value)
    message = [file.getvalue()]
    dist.broadcast_object_list(message, src=0, device=device)
    return value if _round.rank == 0 else pickle.loads(message[0])


def all_sum(value: float, device: torch.device) -> float:
    """Return the sum over the ranks, in float64 if the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(value, dtype=dtype, device=device)
    if _round is not None:
        dist.all_reduce(total)
    return total.item()


def check_equal(facts: dict[str, Any]) -> None:
    """Raise ValueError, on every rank, if a fact is not the same on all ranks.

    It names the rank and both values. `facts` holds JSON types.
    """
    if _round is None:
        return
    this, key = _round, f"turn/{next(_round.turns)}"
    if this.rank:
        this.store.set(f"{key}/{this.rank}", json.dumps(facts))
        if differ := await_key(key, this.limit).decode():
            raise ValueError(differ)
        return
    differ = ""
    for rank in range(1, this.world_size):
        theirs = json.loads(await_key(f"{key}/{rank}", this.limit))
        for name, value in facts.items():
            if theirs.get(name) != value and not differ:
                differ = f"{name} is {theirs.get(name)} on rank {rank} and {value} on rank 0"
    this.store.set(key, differ)
    if differ:
        raise ValueError(differ)


# -----------------------------------------------------------------------------
# errors


def fail(script: str, message: str) -> NoReturn:
    """Print an error as one line, once for all ranks, and exit with code 2.

    The line names the rank, unless all ranks have the same error.
    """
    if _round is None:  # the command line is wrong; it is typed on each node, so say it there once
        if not launched() or (os.environ.get("LOCAL_RANK") or "0") == "0":
            cli.print_error(script, message)
        sys.exit(2)
    # the launcher sends SIGTERM as soon as one rank has ended: first say why
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    speaks, everyone = True, _round.world_size == 1
    if _round.store is not None:  # without an answer of the store, say it in any case
        answer = within(3 * PATIENCE, lambda: claim(message, _round))
        speaks, everyone = answer or (speaks, everyone)
    if speaks:
        cli.print_error(script, message if everyone else f"rank {_round.rank}: {message}")
    if _round.store is not None:
        within(3 * PATIENCE, lambda: leave(2 * PATIENCE))
    if dist.is_initialized() and dist.get_backend() == "gloo":  # does not wait, and stops threads
        dist.destroy_process_group()
    sys.exit(2)


def claim(message: str, this: Round) -> tuple[bool, bool]:
    """Return whether this rank has to print an error, and whether all ranks have the same one."""
    key = f"error/{hashlib.sha256(message.encode()).hexdigest()}"
    first = this.store.add(key, 1) == 1
    this.store.set("failed", "")
    deadline = time.monotonic() + PATIENCE
    while first and this.store.add(key, 0) < this.world_size and time.monotonic() < deadline:
        time.sleep(POLL)
    return first, this.store.add(key, 0) >= this.world_size
