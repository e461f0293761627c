"""Muon: which parameters it has, what its updates look like, and how ranks share its work."""

import math

import pytest
import torch
from conftest import RUN, run_train

from common import muon as muon_module
from common.muon import Muon
from train_gpt2 import GPT, GPTConfig, Machine, TrainConfig, make_optimizers, train_step

CPU = Machine(torch.device("cpu"), torch.float32)
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def test_muon_makes_the_updates_of_the_blocks_matrices_orthogonal(small_model):
    config = TrainConfig(optimizer="muon", max_lr=1e-3, muon_lr=1e-2, weight_decay=0.0)
    optimizers = make_optimizers(small_model, config, CPU)
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    x, y = torch.randint(0, 300, (2, 4, 16))
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
    train_step(small_model, optimizers, UNSCALED, iter([(x, y)]), 1, 1.0, CPU)
    matrices = 0
    for name, p in small_model.named_parameters():
        update = before[name] - p.detach()
        if ".h." in name and p.dim() == 2:  # most singular values near 1, but for the scale
            size = torch.linalg.svdvals(update) / (1e-2 * 0.2 * math.sqrt(max(p.shape)))
            assert 0.7 < size.median() and size.max() < 1.3, name
            matrices += 1
        else:  # AdamW's first step goes by the sign of the gradient
            moved = update[update != 0].abs()
            assert moved.max().item() == pytest.approx(1e-3, rel=1e-2), name
    assert matrices == 4 * small_model.config.n_layer


def test_with_muon_the_head_stays_with_adamw_and_only_matrices_decay():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    optimizers = make_optimizers(model, TrainConfig(optimizer="muon"), CPU)
    (muon,) = optimizers["muon"].param_groups
    decayed, undecayed = optimizers["optimizer"].param_groups
    assert len(muon["params"]) == 48 and muon["weight_decay"] == 0.1
    assert {p.shape for p in decayed["params"]} == {(50304, 768), (1024, 768)}
    assert len(undecayed["params"]) == 98 and undecayed["weight_decay"] == 0
    assert decayed["peak_lr"] == muon["peak_lr"] == 6e-4  # Muon's where it is not given


class Network:
    """Two ranks in one process: a broadcast hands over what the owner sent before."""

    def __init__(self):
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor, owner, async_op):
        self.sent.append(tensor)
        return self

    def wait(self):
        pass


def matrices() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(8, 8), (32, 8), (8, 32), (24, 8)]
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def step(params: list[torch.nn.Parameter], rank: int, world_size: int) -> Muon:
    optimizer = Muon(params, 0.1, 0.95, rank, world_size, lr=0.1)
    torch.manual_seed(1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_each_rank_updates_its_share_and_both_shares_make_the_whole(monkeypatch):
    monkeypatch.setattr(muon_module, "dist", Network())
    whole, before = matrices(), matrices()
    step(whole, 0, 1)
    shares = [matrices(), matrices()]
    optimizers = [step(params, rank, 2) for rank, params in enumerate(shares)]
    owners = []
    for i, p in enumerate(before):
        changed = [rank for rank in (0, 1) if not torch.equal(shares[rank][i], p)]
        assert len(changed) == 1, "a matrix has one owner"
        owners += changed
        assert torch.equal(shares[changed[0]][i], whole[i]), "the owner does what one process does"
    sizes = [sum(p.numel() for p, o in zip(before, owners, strict=True) if o == r) for r in (0, 1)]
    assert min(sizes) / max(sizes) > 0.5, "equal shares"
    assert [p.shape for p in optimizers[0].matrices] == [p.shape for p in optimizers[1].matrices]


def test_ranks_exchange_weights_after_a_step_and_momenta_for_a_checkpoint(monkeypatch):
    network = Network()
    monkeypatch.setattr(muon_module, "dist", network)
    optimizer = step(matrices(), 0, 2)
    assert len(network.sent) == 4
    assert {t.data_ptr() for t in network.sent} == {p.data_ptr() for p in optimizer.matrices}
    network.sent.clear()
    state = optimizer.state_dict()["state"]
    assert len(state) == len(network.sent) == 4, "momenta that this rank never had are received"
    momenta = {optimizer.state[p]["momentum_buffer"].data_ptr() for p in optimizer.matrices}
    assert {t.data_ptr() for t in network.sent} == momenta


def test_its_rate_is_logged_beside_adamws(data_dir, tmp_path):
    metrics = run_train(data_dir, tmp_path, optimizer="muon", muon_lr=1e-2, max_steps=3)
    steps = [m for m in metrics if m["event"] == "train"]
    ratio = 1e-2 / RUN["max_lr"]
    assert [m["muon_lr"] / m["lr"] for m in steps] == pytest.approx([ratio] * 3)
