"""Muon, an optimizer for matrices, with its work shared among the ranks: see docs/muon.md."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import parallel


class Muon(torch.optim.Muon):
    """Muon (Jordan et al., 2024) for a list of matrices, on one rank of several.

    It replaces the averaged gradient of a matrix by the nearest orthogonal matrix, so that all
    directions move equally, scaled to the size of AdamW's updates (Liu et al., 2025, section 2.2).
    Each rank does this for its share of the matrices. Then the ranks exchange the weights. Only
    the owner of a matrix has its current momentum. Matrices that are sharded over the ranks
    (FSDP2) need none of this: torch multiplies their parts, and sends what that needs.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        weight_decay: float,
        momentum: float,
        rank: int,
        world_size: int,
        **group: Any,  # more entries of the parameter group
    ):
        self.matrices = sorted(matrices, key=Tensor.numel, reverse=True)  # for equal shares
        if parallel.is_sharded(matrices[0]):
            rank, world_size = 0, 1
        self.rank, self.world_size = rank, world_size
        settings = dict(weight_decay=weight_decay, momentum=momentum)
        # its learning rate then means what AdamW's does: how far a typical weight moves
        settings["adjust_lr_fn"] = "match_rms_adamw"
        super().__init__([{"params": self.matrices, **group}], **settings)

    def exchange(self, tensors: list[Tensor]) -> None:
        """Send each tensor from the rank that owns its matrix to all others."""
        if (n := self.world_size) > 1:
            for sent in [dist.broadcast(t, i % n, async_op=True) for i, t in enumerate(tensors)]:
                sent.wait()

    def step(self) -> None:
        """Update this rank's matrices, then give and take the weights."""
        for i, p in enumerate(self.matrices):
            if i % self.world_size != self.rank:
                p.grad = None  # torch's Muon skips it
        super().step()
        self.exchange([p.detach() for p in self.matrices])
        parallel.equal_nodes(self.matrices)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with every momentum; all ranks must call it."""
        for p in self.matrices:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p).detach())
        self.exchange([self.state[p]["momentum_buffer"] for p in self.matrices])
        return super().state_dict()
