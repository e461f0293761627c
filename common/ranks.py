"""The processes of a distributed run: how ranks join, agree, wait for each other and report errors.

Ranks talk in two ways. Tensors go through the process group (NCCL or gloo), whose operations end
with an error after a time limit. Everything that comes before it, or that may take long, goes
through the store: a small server of keys and values, on the first node.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from common import cli, hardware

POLL = 0.02  # seconds between two looks at the store
PATIENCE = 1.0  # seconds to see whether other ranks have the same error
DAY = 24 * 60 * 60.0  # seconds that ranks wait for work that rank 0 does alone


@dataclass
class Round:
    """The ranks that run at the same time. After a failure torchrun starts all of them again."""

    rank: int = 0
    world_size: int = 1
    limit: float = 600.0  # seconds after which a silent rank counts as lost
    store: dist.Store | None = None  # of this round alone; None while joining
    turns: Iterator[int] = field(default_factory=count)  # numbers what all ranks do together


_round: Round | None = None  # of this process; None before it joins, and without other ranks


class LostRankError(ConnectionError):
    """Another rank has ended, or is silent."""


# -----------------------------------------------------------------------------
# joining and leaving


def local_device(asked: str) -> torch.device:
    """Return the device of this process: each rank of a machine has its own GPU.

    `asked` is auto, cuda, mps or cpu. Raises ValueError if torch cannot use the device, or if the
    machine has fewer GPUs than ranks.
    """
    with cli.advice("or give --device cpu"):
        kind = hardware.choose_device(asked)
    if asked == "auto" and kind == "cpu" and (os.environ.get("LOCAL_RANK") or "0") == "0":
        hardware.warn_of_unused_gpu()
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind) if _round is None else own_gpu()
    with cli.advice("or give --device cpu"):
        hardware.check_gpu(device)
    if _round is not None:
        torch.cuda.set_device(device)
    return device


def own_gpu() -> torch.device:
    """Return the GPU of this rank."""
    here, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    ranks = max(here + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if ranks > gpus:  # all ranks of the machine say the same
        raise ValueError(
            f"{ranks} ranks on this machine, but torch sees {gpus} GPUs: start with "
            f"--nproc_per_node={gpus}"
        )
    return torch.device("cuda", here)


@contextlib.contextmanager
def join_ranks(timeout_minutes: float) -> Iterator[tuple[int, int]]:
    """Meet the other ranks in the store; yield rank and world size. Without a launcher: 0 and 1.

    Raises ValueError if the environment is incomplete, OSError if ranks are missing or lost.
    """
    global _round
    if "RANK" not in os.environ:
        yield 0, 1
        return
    _round = Round(limit=60 * timeout_minutes)
    _round.rank, _round.world_size = read_environment()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(f"the first node cannot be reached at {address} ({error})") from None
    try:
        _round.store = enter_round(store, _round)
        yield rank, world_size
    except (RuntimeError, LostRankError) as error:
        if not is_loss(error):
            raise
        with contextlib.suppress(LostRankError, RuntimeError):
            wait_for("failed", 2 * PATIENCE)
            sys.exit(2)  # that rank has said why
        what = " ".join(str(error).split())
        if not isinstance(error, dist.DistBackendError):  # NCCL's own message says more
            silent = "timed out" in what.lower()
            how = f"has been silent for {timeout_minutes:g} minutes" if silent else "has ended"
            what = f"another rank {how}"
        raise LostRankError(what) from None
    _round = None


def read_environment() -> tuple[int, int]:
    """Return rank and world size from the variables that torchrun, Kubernetes or a user sets."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(
            f"RANK is set, but {' and '.join(missing)} not: start with torchrun, set all of "
            f"{', '.join(names)}, or unset RANK to run on one device"
        )
    try:
        rank, world_size = (int(os.environ[name]) for name in names[:2])
    except ValueError:
        raise ValueError("RANK or WORLD_SIZE is not a number: set both") from None
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
                raise OSError("rank 0 did not join")
            time.sleep(POLL)
        name = store.get(f"answer/{note}").decode()
        store.set(f"{name}/joined/{this.rank}", "")
        return dist.PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, set(range(1, this.world_size))
    while missing := {r for r in missing if not store.check([f"{name}/joined/{r}"])}:
        if time.monotonic() > deadline:
            raise OSError(f"rank {', '.join(map(str, sorted(missing)))} did not join")
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
    check_equal({"device": kind})
    nccl = kind == "cuda" and dist.is_nccl_available()  # not on Windows; gloo is slow with GPUs
    try:
        dist.init_process_group(
            "nccl" if nccl else "gloo", store=_round.store, rank=_round.rank,
            world_size=_round.world_size, timeout=timedelta(seconds=_round.limit),
        )  # fmt: skip
        if nccl:  # NCCL connects, and takes its memory, in the first operation
            dist.all_reduce(torch.zeros(1, device=kind))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"the ranks cannot connect ({reason}): see docs/running.md") from None
    yield
    # After an error, NCCL's destroy_process_group() would wait for the other ranks, and they wait
    # for this one. The error must be printed, and the launcher then ends the others.
    if not nccl:
        # The threads of gloo release a tensor a moment after its sum is there. If Python ends
        # before that, they abort the process. So no rank leaves before the last one is done.
        with contextlib.suppress(RuntimeError):  # a rank that failed has reported it
            dist.barrier()
    dist.destroy_process_group()


# -----------------------------------------------------------------------------
# waiting and agreeing


def wait_for(key: str, limit: float) -> bytes:
    """Return the value of a key of this round, once it is there; LostRankError after `limit` s."""
    store, start = _round.store, time.monotonic()
    while not store.check([key]):
        if store.check(["failed"]):  # a rank has reported an error
            raise LostRankError("another rank has failed")
        if time.monotonic() - start > limit:
            raise LostRankError("timed out")
        time.sleep(POLL)
    return store.get(key)


def is_loss(error: Exception) -> bool:
    """Return whether an exception says that another rank has ended or is silent."""
    return isinstance(error, LostRankError | dist.DistError) or "gloo" in str(error)


def on_rank_0(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 alone; return its result, or raise its error, on every rank.

    All ranks must call it. They wait at the store, so the work may take longer than the time limit
    of tensor operations. Tensors in the result are on the CPU of every rank.
    """
    if _round is None:
        return function(*args)
    key, value = f"turn/{next(_round.turns)}", None
    if _round.rank == 0:
        try:
            value = function(*args)
        except (ValueError, OSError) as error:  # now all ranks have it: it is printed once
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            _round.store.set(key, f"{kind}: {cli.explain(error)}")
            raise
        _round.store.set(key, "done" if value is None else "value")
        return value if value is None else share(value)
    said, _, message = wait_for(key, DAY).decode().partition(": ")
    if message:
        raise (OSError if said == "OSError" else ValueError)(message)
    return share(None) if said == "value" else None


class TensorPickler(pickle.Pickler):
    """Pickle a value without its tensors; keep these in a list."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class TensorUnpickler(pickle.Unpickler):
    """Put the tensors of a list into a value pickled by TensorPickler."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def share(value: Any) -> Any:
    """Return rank 0's value, of plain types and tensors, on every rank."""
    cuda = dist.get_backend() == "nccl"  # NCCL sends from GPU to GPU: one tensor at a time
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    file = io.BytesIO()
    pickler = TensorPickler(file)
    pickler.dump(value)
    message = [(file.getvalue(), [(t.shape, t.dtype) for t in pickler.tensors])]
    dist.broadcast_object_list(message, src=0, device=device)
    if _round.rank == 0:
        for tensor in pickler.tensors:
            dist.broadcast(tensor.detach().contiguous().to(device), src=0)
        return value
    tensors = []
    for shape, dtype in message[0][1]:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=0)
        tensors.append(tensor.cpu())
    return TensorUnpickler(io.BytesIO(message[0][0]), tensors).load()


def total(value: float, device: torch.device) -> float:
    """Return the sum over the ranks, in float64 if the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    summed = torch.tensor(value, dtype=dtype, device=device)
    if _round is not None:
        dist.all_reduce(summed)
    return summed.item()


def check_equal(facts: dict[str, Any]) -> None:
    """Raise ValueError, on every rank, if a fact is not the same on all ranks.

    It names the rank and both values. `facts` holds JSON types.
    """
    if _round is None:
        return
    this, turn = _round, next(_round.turns)
    key = f"turn/{turn}"
    if this.rank:
        this.store.set(f"{key}/{this.rank}", json.dumps(facts))
        if differ := wait_for(key, this.limit).decode():
            raise ValueError(differ)
        return
    differ = ""
    for rank in range(1, this.world_size):
        theirs = json.loads(wait_for(f"{key}/{rank}", this.limit))
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
    if _round is None:  # no ranks yet: the command line is wrong, and it is the same on all ranks
        if os.environ.get("RANK", "0") == "0":
            cli.print_error(script, message)
        sys.exit(2)
    # the launcher sends SIGTERM as soon as one rank has ended: first say why
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    speaks, everyone = True, _round.world_size == 1
    if _round.store is not None:
        with contextlib.suppress(RuntimeError):  # without a store, say it in any case
            speaks, everyone = claim(message, _round)
    if speaks:
        cli.print_error(script, message if everyone else f"rank {_round.rank}: {message}")
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
