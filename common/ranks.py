"""The processes of a distributed run: how a rank joins the others, and how it leaves them."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def local_device(kind: str) -> torch.device:
    """Return the device of this process: under torchrun, each rank of a machine has its own GPU."""
    if kind == "cuda" and "RANK" in os.environ:
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    return torch.device(kind)


@contextlib.contextmanager
def join_ranks(kind: str, timeout_minutes: float) -> Iterator[tuple[int, int]]:
    """Join the other ranks and yield rank and world size. Without torchrun they are 0 and 1.

    A collective operation that takes longer than `timeout_minutes` ends the process.
    """
    if "RANK" not in os.environ:
        yield 0, 1
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # restarted ranks would otherwise find the addresses of the old ranks
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store, rank=rank, world_size=world_size, timeout=timeout,
    )  # fmt: skip
    try:
        yield rank, world_size
        # The threads of gloo release a tensor a moment after its sum is there. If Python ends
        # before that, they abort the process. So no rank leaves before the last one is done.
        if kind == "cpu":
            with contextlib.suppress(RuntimeError):  # a rank that failed has reported it
                dist.barrier()
    finally:
        dist.destroy_process_group()
