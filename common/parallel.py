"""A model on several ranks: whole on each of them (DDP), or sharded over them (FSDP2).

Sharded, a rank keeps a part of every parameter, of its gradient and of its moments. Before a block
runs, forward or backward, the ranks gather its weights. After it they drop them again, and its
gradient is averaged and scattered. So every pass is work that all ranks do together.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from common import hardware, ranks
from common.cli import advice

# -----------------------------------------------------------------------------
# sharding, and collecting


def spread(model: nn.Module, device: torch.device, shard: bool = False) -> nn.Module:
    """Return rank 0's model on this rank's device: all of it or, with `shard`, this rank's part.

    All ranks must call it. Only rank 0's model needs numbers: those of other ranks may be on the
    meta device. They are sent tensor by tensor, so with `shard` no other rank ever holds more than
    one whole tensor. Then it also turns off autocast's cache of weights, for good.
    """
    if not dist.is_initialized():
        return model.to(device)
    weights, training = dict(model.named_parameters()), model.training
    with torch.device("meta"):  # shapes without memory
        model = type(model)(model.config).train(training)
    if shard:
        # not at the top of this file: it takes half a second, and most commands do not need it
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = make_mesh(device)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # the rest: embedding = head, positions, ln_f
        register_fsdp_forward_method(model, "hidden")
        # it would keep a bfloat16 copy of every whole block until the pass ends
        torch.set_autocast_cache_enabled(False)
    model.to_empty(device=device)
    model.lm_head.weight = model.transformer.wte.weight  # still one matrix
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(from_rank_0(weights[name], p))
    return model


def make_mesh(device: torch.device) -> DeviceMesh:
    """Return the ranks as FSDP2 needs them: sharded within a node, replicated across nodes.

    Weights are gathered in every pass, over the fast links inside a node. Between nodes, only the
    gradients of a part are averaged, once a step.
    """
    world_size, here = dist.get_world_size(), ranks_of_node()
    if here == world_size:
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    # Muon's sums over both dimensions take two operations. torch warns that this is slow (it was
    # not measured) and inexact (`equal_nodes`).
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    grid = torch.arange(world_size).view(-1, here)  # a row for each node
    groups = [
        dist.new_subgroups_by_enumeration(lines.tolist(), timeout=ranks.time_limit())[0]
        for lines in (grid.T, grid)
    ]
    return DeviceMesh.from_group(groups, device.type, grid, mesh_dim_names=("nodes", "ranks"))


def ranks_of_node() -> int:
    """Return the ranks over which a model is sharded: those of a node, or all.

    All, if the launcher does not say how many a node has, or if each has only one rank. Raises
    ValueError if the nodes have different numbers.
    """
    here, world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), dist.get_world_size()
    with advice("start as many ranks on every node, or give --shard off"):
        ranks.check_equal({"nproc_per_node": here})
    return here if here > 1 and world_size % here == 0 else world_size


def from_rank_0(value: Tensor, like: Tensor) -> Tensor:
    """Return rank 0's tensor on the device of `like`: all of it, or the part that `like` has.

    All ranks must call it; on other ranks than 0 only shape and dtype of `value` matter. It is a
    part if `like` is a part of a tensor of the same shape.
    """
    if not dist.is_initialized():
        return value
    whole = torch.empty(value.shape, dtype=value.dtype, device=like.device)
    if dist.get_rank() == 0:
        whole.copy_(value)
    if is_sharded(like) and like.shape == value.shape:
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, like.device_mesh, like.placements)
    else:
        dist.broadcast(whole, src=0)
    # NCCL only queues it. Without waiting, rank 0's slow reading of all tensors would count against
    # the time limit of one, and all of them would lie in the memory of the others.
    hardware.wait_for(like.device)
    return whole


def equal_nodes(parameters: list[nn.Parameter]) -> None:
    """Give every node the first node's copy of sharded parameters, bit for bit.

    It is needed after an update that adds up what several ranks have computed: a sum in another
    order is another number, and copies that differ would drift apart.
    """
    for p in parameters:
        if is_sharded(p) and p.device_mesh.ndim > 1:
            dist.broadcast(p.detach().to_local(), group=p.device_mesh.get_group(0), group_src=0)


def on_rank_0_whole(tensors: Any) -> Any:
    """Return dicts of tensors with sharded ones put together, on the CPU of rank 0.

    All ranks must call it. On other ranks such tensors are empty, because one copy is enough.
    Tensors that are not sharded, and all other values, stay as they are.
    """
    if isinstance(tensors, dict):
        return {name: on_rank_0_whole(value) for name, value in tensors.items()}
    if not is_sharded(tensors):
        return tensors
    whole = tensors.detach().full_tensor()  # one tensor at a time is whole on every device
    return whole.cpu() if dist.get_rank() == 0 else torch.empty(0)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients down so that their norm is at most `most`; return the norm before.

    On a CPU, torch adds up the squares of a tensor one after the other, in float32: the norm of 38
    million numbers is 0.3% too small, and that of their parts less. So on a CPU it is the norm of
    the norms of rows, which is exact to a few millionths and takes as long.
    """
    parameters = [p for p in parameters if p.grad is not None]
    parts = [
        torch.linalg.vector_norm(p.grad, dim=1)
        if p.dim() == 2 and p.device.type == "cpu"
        else p.grad
        for p in parameters
    ]
    norm = nn.utils.get_total_norm(parts)
    if is_sharded(norm):
        nodes, norm = norm.device_mesh.ndim > 1, norm.full_tensor()
        if nodes:  # each node has summed up by itself; see `equal_nodes`
            dist.broadcast(norm, src=0)
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def is_sharded(part: Any) -> bool:
    """Tell whether this is a model of FSDP2 or one of its tensors, by what only these have."""
    return hasattr(part, "reshard") or hasattr(part, "full_tensor")


class StopAsked(Exception):  # noqa: N818 - it is no error
    """A signal has asked some rank to stop: an evaluation ends without a result, on all ranks."""


@contextlib.contextmanager
def evaluating(model: nn.Module, signals: Sequence[int] = ()) -> Iterator[Callable]:
    """Let a model predict without dropout in this block. All ranks do equally many passes in it.

    Gives a function for the loop over the passes: it ends the loop when a signal has arrived. The
    block then raises StopAsked, if it has arrived on any rank.
    """
    device = next(model.parameters()).device
    # Sharded passes are work of all ranks, and on CPUs all of HellaSwag takes hours: no rank may
    # leave alone, or wait for one that goes on. On GPUs agreeing would make every pass wait.
    agree = is_sharded(model) or device.type == "cpu"

    def passes(steps: Iterable) -> Iterator:
        for step in steps:
            if ranks.all_sum(bool(signals), device) if agree else signals:
                return
            yield step

    training = model.training
    model.eval()
    yield passes
    model.train(training)
    if is_sharded(model):  # after a pass the embedding is still whole, for the head or a next pass
        model.reshard()
    if ranks.all_sum(bool(signals), device):
        raise StopAsked


# -----------------------------------------------------------------------------
# memory: when to shard, and when to compute activations again

# Bytes of float32 state a parameter: with DDP weight, gradient and two moments, the buckets that
# are sent, and for a short time new buckets (`hardware.try_micro_step`); sharded, the first four.
DDP_BYTES, SHARDED_BYTES = 24, 16
ROOM = 0.7  # the part of a GPU's memory that DDP's state may take: activations need the rest
USABLE = 0.9  # the part of free memory to plan with: an allocator leaves gaps
ENOUGH_TOKENS = 4096  # in a micro-batch. With fewer, a GPU waits for weights that others send.


def choose_shard(setting: str, n_params: int, device: torch.device) -> tuple[bool, list[str]]:
    """Return whether to shard the model over the ranks, and a note with the numbers if so.

    `auto` does it if DDP's state would not leave enough of a GPU's memory. Raises ValueError if it
    is asked for and there is only one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if setting == "on":
            raise ValueError(
                "shard on: there is only one rank, and nobody to share with: start several with "
                "torchrun --nproc_per_node, or leave --shard out"
            )
        return False, []
    cuda = device.type == "cuda"  # elsewhere the memory is the system's, which others use too
    has = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    needed = DDP_BYTES * n_params > ROOM * has
    if setting == "off" or (setting == "auto" and not ranks.all_sum(needed, device)):
        return False, []
    parts = ranks_of_node()
    sizes = (SHARDED_BYTES * n_params / parts, DDP_BYTES * n_params, 12 * n_params)
    own, ddp, file = (
        f"{size / 1e9:,.0f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB" for size in sizes
    )
    of = f" of {has / 1e9:,.0f} GB" if cuda else ""
    return True, [
        f"the model is sharded over {parts} ranks: {own} of weights, gradients and moments on "
        f"each{of} (DDP: up to {ddp}). A checkpoint has {file}, and rank 0 needs that much main "
        "memory to write it"
    ]


def bytes_of_step(
    model: nn.Module, rows: int, parts: int, dtype: torch.dtype, compiled: bool, recompute: bool
) -> int:
    """Return the GPU memory of a rank in a step with micro-batches of `rows` rows, sharded.

    The constants are counted with simulated ranks (benchmarks/scaling.md). Compiled blocks keep
    less, so this is the most that a step can need.
    """
    size = model.config
    C, L, positions = size.n_embd, size.n_layer, rows * size.block_size
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    rest = model.n_params - L * block
    # A block keeps so many bytes for each channel of each position; computed again, only its input.
    # All of that is there when the backward pass begins, at the logits, and nearly all in the first
    # block that it comes to.
    of_block, of_input = {torch.bfloat16: (34, 2), torch.float16: (40, 4)}.get(dtype, (64, 4))
    one_block, logits = of_block * C * positions, size.padded_vocab_size * positions
    logits = 8 * logits + 4 * min(logits, 1 << 31)  # for more of them the loss is taken in parts
    kept = L * (of_input * C * positions if recompute else one_block)
    # Whole for a time: two blocks, one just arriving, and a gradient, twice while it is on its way.
    # The last block arrives while the logits are there.
    kept += max(logits + 8 * block, 20 * block + (one_block if recompute else 0))
    if not (compiled or recompute or dtype == torch.float32):
        kept += 2 * model.n_params  # copies in 16 bits
    # The rest is whole all the time, and its gradient. At the end that is there three times: from
    # the head, from the embedding, and on its way.
    kept = max(8 * rest + kept, 16 * rest + 4 * block)
    return SHARDED_BYTES * model.n_params // parts + kept


def fits_sharded(
    model: nn.Module, rows: int, dtype: torch.dtype, compiled: bool, recompute: bool
) -> bool:
    """Return whether a step of a sharded model fits into the memory of this rank's GPU."""
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    parts = next(model.parameters()).device_mesh.shape[-1]
    needed = bytes_of_step(model, rows, parts, dtype, compiled, recompute)
    logits = rows * model.config.block_size * model.config.padded_vocab_size
    return needed <= USABLE * free and (rows == 1 or logits < hardware.TOO_MANY_LOGITS)


def choose_recompute(
    setting: str,
    model: nn.Module,
    asked: int | None,
    most: int,
    dtype: torch.dtype,
    compiled: bool,
) -> bool:
    """Return whether blocks are computed again in the backward pass instead of kept in memory.

    `auto` does it if a sharded model could otherwise not take the micro-batch of `asked` rows, or,
    if none is asked for, only small ones. `most` are the rows of a rank in a step.
    """
    device = next(model.parameters()).device
    if setting != "auto" or not is_sharded(model) or device.type != "cuda":
        return setting == "on"
    enough = asked or min(most, math.ceil(ENOUGH_TOKENS / model.config.block_size))
    fitting = fits_sharded(model, enough, dtype, compiled, recompute=False)
    return ranks.all_sum(not fitting, device) > 0


def choose_micro_batch(
    model: nn.Module, config: Any, machine: Any, compiled: bool, usual: int
) -> int:
    """Return the rows of a micro-batch on every rank, and set `model.recompute`.

    On CUDA that is the largest power of two that fits into memory, elsewhere at most `usual` rows,
    because the system lends memory that it does not have. `config.micro_batch_size` is kept if it
    divides the batch. Raises ValueError if it does not, or if not even one row fits.
    """
    T, world_size, dtype = model.config.block_size, machine.world_size, machine.dtype
    asked, batch = config.micro_batch_size, config.total_batch_size
    of_rank = batch // (T * world_size)  # rows in a step
    recompute = choose_recompute(config.recompute, model, asked, of_rank, dtype, compiled)
    model.recompute = recompute

    def fits(rows: int) -> bool:
        if machine.device.type != "cuda":
            return rows <= usual
        if is_sharded(model):
            fitted = fits_sharded(model, rows, dtype, compiled, recompute)
        else:
            fitted = hardware.fits_in_memory(model, rows, machine.autocast, world_size)
        return ranks.all_sum(fitted, machine.device) == world_size  # the same answer on every rank

    if config.batch_ramp_tokens:  # the batch of every step is a multiple of the first
        first, flag = config.batch_ramp_start, "batch_ramp_start"
        hardware.choose_micro_batch_size(asked or 1, first, T, world_size, fits, flag, batch)
    rows = hardware.choose_micro_batch_size(asked, batch, T, world_size, fits, "total_batch_size")
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)  # the trials are not training
    return rows
