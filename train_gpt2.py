"""
GPT-2 and its training, in one file.

    python fineweb.py                                               # the data, once
    python train_gpt2.py                                            # a CPU, a Mac or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py          # eight GPUs
    python train_gpt2.py --preset tiny --data_dir data/pydocs       # two CPU cores, minutes

Shapes: B rows (sequences) of a micro-batch, T tokens of a row, C width of the residual stream
(n_embd), nh attention heads of size hs (C = nh * hs), V vocabulary padded to a multiple of 128.
"""

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# -----------------------------------------------------------------------------
# configuration


class Preset(NamedTuple):
    """A model's size and the settings that go with it."""

    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    max_lr: float
    total_batch_size: int  # tokens a step
    micro_batch_size: int = 8  # rows, where no GPU memory can be probed
    max_steps: int = 19073  # 10B tokens at half a million a step


PRESETS = {
    "tiny": Preset(4, 128, 4, 128, 4e-3, 512, 4, 700),
    "gpt2": Preset(12, 768, 12, 1024, 6e-4, 524288),
    "gpt2-medium": Preset(24, 1024, 16, 1024, 3e-4, 524288),
    "gpt2-large": Preset(36, 1280, 20, 1024, 2.5e-4, 524288),
    "gpt2-xl": Preset(48, 1600, 25, 1024, 2e-4, 1048576),
    "gpt3-125m": Preset(12, 768, 12, 2048, 6e-4, 524288),  # GPT-3 paper, table 2.1
    "gpt3-350m": Preset(24, 1024, 16, 2048, 3e-4, 524288),
    "gpt3-760m": Preset(24, 1536, 16, 2048, 2.5e-4, 524288),
    "gpt3-1.3b": Preset(24, 2048, 16, 2048, 2e-4, 1048576),
    "gpt3-2.7b": Preset(32, 2560, 32, 2048, 1.6e-4, 1048576),
    "gpt3-6.7b": Preset(32, 4096, 32, 2048, 1.2e-4, 2097152),
    "gpt3-13b": Preset(40, 5120, 40, 2048, 1e-4, 2097152),
}
Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
MODEL_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture: what a checkpoint needs to rebuild the model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in MODEL_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give a positive number")
        if self.n_embd % self.n_head:
            heads = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = sorted(heads, key=lambda h: abs(h - self.n_head))[:3]
            raise ValueError(
                f"n_head {self.n_head} does not divide n_embd {self.n_embd}: "
                f"give --n_head {' or '.join(map(str, near))}, or another width"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: give a number from 0 up to 1")

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the embedding: a multiple of 128 keeps the matrix products on fast tiles."""
        return math.ceil(self.vocab_size / 128) * 128


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train GPT-2. Fields left out take the preset's value; the machine decides what says auto."""

    # data
    data_dir: Path = Path("edu_fineweb10B")  # folder of token shards, made by fineweb.py
    shuffle: bool = True  # permute the windows of every epoch
    seed: int = 1337  # of initialisation, shuffling, dropout and samples
    # model
    preset: Literal[tuple(PRESETS)] = "gpt2"  # size of the model and the settings that go with it
    n_layer: int | None = None  # number of blocks
    n_head: int | None = None  # attention heads in a block
    n_embd: int | None = None  # width of the residual stream
    block_size: int | None = None  # context length, in tokens
    vocab_size: int | None = None  # token ids (50257), padded to a multiple of 128 in memory
    dropout: float = 0.0  # probability; 0 is best when no text is seen often
    init_from: str | None = None  # checkpoint, Hugging Face folder or hub name to start from
    # batch
    total_batch_size: int | None = None  # tokens a step, over all ranks
    micro_batch_size: int | None = None  # rows at a time on one device; left out: what fits
    batch_ramp_tokens: int = 0  # grow the batch linearly over so many tokens
    batch_ramp_start: int = 32768  # tokens a step at the start of the ramp, and its granularity
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside the blocks
    max_steps: int | None = None  # the run's budget is so many steps of total_batch_size
    warmup_steps: int | None = None  # of linear warm-up: 715, or a tenth of max_steps if less
    max_lr: float | None = None  # peak learning rate; a tenth of the preset's with --init_from
    schedule: Literal["cosine", "linear"] = "cosine"  # after warm-up; linear: down to zero
    min_lr_ratio: float = 0.1  # the cosine ends at this part of max_lr
    weight_decay: float = 0.1  # on tensors of two or more dimensions
    beta1: float = 0.9  # AdamW's decay of the mean of gradients
    beta2: float = 0.95  # AdamW's decay of the mean of squared gradients
    eps: float = 1e-8  # AdamW's guard against division by zero
    muon_lr: float | None = None  # Muon's peak learning rate, in AdamW's terms (max_lr)
    muon_momentum: float = 0.95  # Muon's decay of the mean of gradients
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # precision and device
    dtype: Dtype = "auto"  # of matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile
    device: Device = "auto"  # where to run
    # evaluation: before the first step, every so many steps, and after the last; 0: never
    eval_every: int = 250  # steps between validation losses
    sample_every: int = 250  # steps between text samples
    hellaswag_every: int | None = None  # steps between HellaSwag scores (250 on CUDA, else 0)
    val_tokens: int | None = None  # tokens of a validation (10485760 on CUDA, else 65536)
    # run
    out_dir: Path = Path("log")  # folder of metrics.jsonl and checkpoints
    checkpoint_every: int = 1000  # steps; 0: only at the end and on a signal
    keep_checkpoints: int = 2  # how many of the newest to keep; 0: all
    resume: bool = False  # go on from the newest checkpoint in out_dir, if there is one
    max_skipped: int = 10  # steps in a row with a loss or gradient that is not finite: give up
    timeout_minutes: float = 10.0  # a rank silent for so long ends a distributed run
    # what is recorded besides the usual lines of metrics.jsonl
    stats_every: int = 0  # steps between records of how each layer is updated; 0: never
    tensorboard: bool = False  # the same numbers for TensorBoard, in out_dir
    wandb: bool = False  # the same numbers for Weights & Biases

    def __post_init__(self) -> None:
        preset = PRESETS[self.preset]
        fill = {"total_batch_size": preset.total_batch_size, "max_steps": preset.max_steps}
        if self.init_from is None:
            fill |= {name: getattr(preset, name, 50257) for name in MODEL_FIELDS}
        fill["max_lr"] = preset.max_lr if self.init_from is None else preset.max_lr / 10
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, value in vars(self).items():
            at_least = 1 if name in ("total_batch_size", "max_steps", "micro_batch_size") else 0
            if isinstance(value, int | float) and not at_least <= value < math.inf:
                raise ValueError(f"{name} {value}: give a number of {at_least} or more")
        betas = self.beta1, self.beta2, self.muon_momentum
        if self.warmup_tokens > self.budget or max(betas) >= 1:
            raise ValueError("give --warmup_steps up to max_steps, betas and momentum below 1")
        if self.batch_ramp_tokens and self.total_batch_size % max(self.batch_ramp_start, 1):
            raise ValueError(
                f"batch_ramp_start {self.batch_ramp_start} does not divide total_batch_size "
                f"{self.total_batch_size}: give a divisor of it"
            )
        if self.init_from is None:
            self.model_config()  # raises where the dimensions do not fit together

    def model_config(self) -> GPTConfig:
        """The architecture that the preset and the flags ask for."""
        return GPTConfig(**{name: getattr(self, name) for name in (*MODEL_FIELDS, "dropout")})

    @property
    def budget(self) -> int:
        """Tokens of the whole run."""
        return self.max_steps * self.total_batch_size

    @property
    def warmup_tokens(self) -> int:
        steps = self.warmup_steps
        return self.total_batch_size * (min(715, self.max_steps // 10) if steps is None else steps)


# -----------------------------------------------------------------------------
# model


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        B, T, C = x.shape
        # each of q, k, v: (B, nh, T, hs)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:  # generating text: see sample.py
            k, v = cache.extend(k, v)
        # softmax(q k^T / sqrt(hs)) v without ever storing the T x T matrix
        y = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
        )  # (B, nh, T, hs)  # fmt: skip
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019), with the parameter names of Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix reads and writes tokens
        self._init_weights()

    def _init_weights(self) -> None:
        # Every block adds to the residual stream twice. Scaling those 2 * n_layer projections by
        # 1/sqrt(2 * n_layer) keeps its variance the same at any depth (GPT-2 paper, section 2.3).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, C) of token ids (B, T).

        `positions` (B, T) or (T,), `mask` (True where a query sees a key) and `caches` (one a
        layer) serve scoring and sampling; left out, row t is position t and sees all before it.
        """
        if positions is None:
            T, most = idx.size(1), self.config.block_size
            assert T <= most, f"{T} tokens, block_size {most}"
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, caches[i] if caches else None)
        return self.transformer.ln_f(x)  # (B, T, C)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V); or, given targets (B, T), the mean loss in nats.

        Targets of -1 do not count. The logits of the padded ids mean nothing: cut them off at
        `config.vocab_size` before choosing a token.
        """
        x = self.hidden(idx)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of hidden states (B, T, C) against targets (B, T)."""
        logits = self.lm_head(x).flatten(0, 1)  # (B*T, V), the largest tensor there is
        # softmax needs float32; the compiler fuses the cast, so that no such copy is ever stored
        return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-1)


def load_model(name_or_path: str | Path | None, device: torch.device | str = "cpu") -> GPT:
    """Return a trained model in eval mode, float32, on `device`.

    `name_or_path`: a checkpoint `*.pt`, a folder in Hugging Face format, or a hub name such as
    `gpt2`; None: the newest checkpoint in log/, else `gpt2`. Raises ValueError or
    FileNotFoundError where there is no such model or its file is damaged.
    """
    from export import build_model, checkpoint_paths, read_checkpoint, read_huggingface

    if name_or_path is None:
        name_or_path = next(iter(checkpoint_paths(Path("log"))), "gpt2")
    if str(name_or_path).endswith(".pt"):
        state = read_checkpoint(Path(name_or_path))
        model = build_model(GPTConfig(**state["model_config"]), state["model"])
    else:
        model = read_huggingface(str(name_or_path))
    return model.to(device).eval()


def compile_model(model: GPT) -> None:
    """Compile in place, by block: all blocks share one graph, compiled once whatever the depth."""
    from torch._functorch import config

    # On a CPU the backward pass computes norms, GELU and casts again instead of being handed them:
    # as fast, in an eighth less memory (benchmarks/ladder_cpu.md).
    config.ban_recompute_materialized_backward = next(model.parameters()).device.type != "cpu"
    for block in model.transformer.h:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)


# -----------------------------------------------------------------------------
# data


def window_order(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch's windows (uint32), drawn from (seed, epoch)."""
    order = np.arange(n_windows, dtype=np.uint32)  # 40 MB for ten million windows
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class Windows:
    """The windows of one split: shards cut into rows of T inputs and, shifted by one, T targets.

    Window i of a shard is its tokens [i*T, i*T + T]; none crosses shards; the tail is dropped.
    """

    def __init__(self, data_dir: Path, split: str, block_size: int, vocab_size: int):
        from shards import open_shards

        self.block_size = block_size
        self.shards = open_shards(data_dir, split, vocab_size)  # memory-mapped
        self.ends = np.cumsum([max(0, len(s) - 1) // block_size for s in self.shards])
        self._order: tuple[Any, np.ndarray] = (None, np.empty(0))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (len(windows), T) int64."""
        T = self.block_size
        rows = np.empty((len(windows), T + 1), dtype=np.int64)
        for row, window in zip(rows, windows, strict=True):
            shard = int(np.searchsorted(self.ends, window, side="right"))
            start = (int(window) - int(self.ends[shard - 1] if shard else 0)) * T
            row[:] = self.shards[shard][start : start + T + 1]
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    def stream(self, start: int, count: int, seed: int | None) -> np.ndarray:
        """Return windows [start, start + count) of the endless stream of epochs.

        Every epoch is all windows: in order, or permuted where a seed is given.
        """
        parts = []
        while count:
            epoch, first = divmod(start, len(self))
            n = min(count, len(self) - first)
            if seed is None:
                parts.append(np.arange(first, first + n))
            else:
                if self._order[0] != (seed, epoch):
                    self._order = ((seed, epoch), window_order(len(self), seed, epoch))
                parts.append(self._order[1][first : first + n])
            start, count = start + n, count - n
        return np.concatenate(parts)


def micro_batches(
    windows: Windows, config: TrainConfig, B: int, machine: "Machine", step: int, tokens_seen: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's inputs and targets, (B, T) each, for every micro-step of the rest of a run.

    A thread reads them a few micro-batches ahead of their use.
    """
    T = windows.block_size

    def places(step: int, tokens_seen: int) -> Iterator[tuple[int, int, int]]:
        while tokens_seen < config.budget:
            rows = step_batch_tokens(config, tokens_seen) // T
            firsts = range(machine.rank * B, rows, machine.world_size * B)
            yield from ((step, m, tokens_seen // T + first) for m, first in enumerate(firsts))
            step, tokens_seen = step + 1, tokens_seen + rows * T

    def read(first: int) -> tuple[Tensor, ...]:
        batch = windows.read(windows.stream(first, B, config.seed if config.shuffle else None))
        return tuple(t.pin_memory() for t in batch) if machine.device.type == "cuda" else batch

    todo = places(step, tokens_seen)
    with ThreadPoolExecutor(1) as reader:
        ahead = deque((place, reader.submit(read, place[2])) for place in islice(todo, 4))
        while ahead:
            (step, micro_step, _), batch = ahead.popleft()
            x, y = batch.result()
            ahead.extend((place, reader.submit(read, place[2])) for place in islice(todo, 1))
            if config.dropout:
                key = np.random.SeedSequence((config.seed, step, micro_step, machine.rank))
                torch.manual_seed(int(key.generate_state(1)[0]))
            yield x.to(machine.device, non_blocking=True), y.to(machine.device, non_blocking=True)


# -----------------------------------------------------------------------------
# optimizer, schedule, batch ramp


class Muon(torch.optim.Muon):
    """Muon (Jordan et al., 2024), its work dealt out over the ranks.

    It replaces a matrix's averaged gradient by the nearest orthogonal matrix, scaled to the size
    of AdamW's updates (Liu et al., 2025, section 2.2). Each rank does so with its own share of the
    matrices; then all exchange the weights. Up to date is only the owner's momentum.
    """

    def __init__(self, matrices: list[nn.Parameter], config: TrainConfig, machine: "Machine"):
        self.matrices = sorted(matrices, key=Tensor.numel, reverse=True)  # for equal shares
        self.machine = machine
        peak_lr = config.max_lr if config.muon_lr is None else config.muon_lr
        group = {"params": self.matrices, "peak_lr": peak_lr, "logged_as": "muon_lr"}
        settings = dict(weight_decay=config.weight_decay, momentum=config.muon_momentum)
        super().__init__([group], adjust_lr_fn="match_rms_adamw", **settings)

    def exchange(self, tensors: list[Tensor]) -> None:
        """Send each tensor from the rank that owns its matrix to all others."""
        if (n := self.machine.world_size) > 1:
            for sent in [dist.broadcast(t, i % n, async_op=True) for i, t in enumerate(tensors)]:
                sent.wait()

    def step(self) -> None:
        for i, p in enumerate(self.matrices):
            if i % self.machine.world_size != self.machine.rank:
                p.grad = None  # torch's Muon passes over it
        super().step()
        self.exchange([p.detach() for p in self.matrices])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with every momentum; all ranks must call it."""
        for p in self.matrices:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p).detach())
        self.exchange([self.state[p]["momentum_buffer"] for p in self.matrices])
        return super().state_dict()


def make_optimizers(model: GPT, config: TrainConfig, machine: "Machine") -> dict[str, Any]:
    """Return AdamW, as "optimizer", and "muon" if asked for; biases and gains do not decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = {}
    if config.optimizer == "muon":  # the embedding, which is also the head, stays with AdamW
        inside = {p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2}
        optimizers["muon"] = Muon([p for p in params if p in inside], config, machine)
        params = [p for p in params if p not in inside]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak_lr": config.max_lr, "logged_as": "lr"} for group in groups]
    # fused: one kernel over all tensors instead of several for each
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, config.max_lr, betas, config.eps, fused=True)
    return {"optimizer": adamw, **optimizers}


def step_batch_tokens(config: TrainConfig, tokens_seen: int) -> int:
    """Return the tokens of the step that starts at `tokens_seen`: the ramp, cut at the budget."""
    batch = config.total_batch_size
    if tokens_seen < config.batch_ramp_tokens:
        start = config.batch_ramp_start
        batch = start + (batch - start) * tokens_seen // config.batch_ramp_tokens
        batch -= batch % start
    return min(batch, config.budget - tokens_seen)


def learning_rate(config: TrainConfig, tokens_seen: int, batch_tokens: int, peak: float) -> float:
    """Return the rate of the step that starts at `tokens_seen`: linear warm-up, then down.

    Warm-up counts the tokens seen once the step is done, so that the first step is not idle.
    """
    warmup = config.warmup_tokens
    if tokens_seen < warmup:
        return peak * min(1.0, (tokens_seen + batch_tokens) / warmup)
    progress = (tokens_seen - warmup) / (config.budget - warmup)
    if config.schedule == "linear":
        return peak * (1 - progress)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


# -----------------------------------------------------------------------------
# the machine: ranks, precision, compiler


@dataclass(frozen=True)
class Machine:
    """What this process runs on, and its rank among the `world_size` processes of the run."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; everything that is kept is float32
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def print(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)

    def sum(self, value: float) -> float:
        """Add up over the ranks, in float64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(value, dtype=dtype, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item()


@contextlib.contextmanager
def set_up_machine(config: TrainConfig) -> Iterator[Machine]:
    """Choose device and precision; under torchrun join the other ranks."""
    from bench import choose_dtype

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = config.device
    if kind == "auto":
        kind = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there.get(kind, True):
        raise ValueError(f"device {kind}: torch finds none here: give --device cpu")
    torch.set_float32_matmul_precision("high")  # TF32 for the products that stay float32
    if "RANK" not in os.environ:
        device = torch.device(kind)
        yield Machine(device, choose_dtype(config.dtype, device))
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=config.timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else restarted ranks find dead ones' addresses
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store, rank=rank, world_size=world_size, timeout=timeout,
    )  # fmt: skip
    try:
        yield Machine(device, choose_dtype(config.dtype, device), rank, world_size)
        # gloo's threads let go of a tensor a moment after its sum is there. If Python is ending by
        # then they abort it, so no rank leaves before the last is done.
        if kind == "cpu":
            with contextlib.suppress(RuntimeError):  # a rank that failed has said so itself
                dist.barrier()
    finally:
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# one step, and evaluation


class StepResult(NamedTuple):
    loss: float  # mean over the whole batch, nats a token
    grad_norm: float  # before clipping
    applied: bool  # False where loss or norm was not finite: the weights are as before
    stop: bool  # some rank was asked to stop
    data_wait: float  # seconds spent waiting for data


def train_step(
    model: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    micro_batches: Iterator[tuple[Tensor, Tensor]],
    grad_accum_steps: int,
    grad_clip: float,
    machine: Machine,
    stop: bool = False,
) -> StepResult:
    """Make one update from `grad_accum_steps` micro-batches on every rank.

    The device is waited for once, for loss and norm together; only then is the update applied.
    """
    report = torch.tensor([0.0, float(stop)], device=machine.device)  # loss, ranks asked to stop
    data_wait = 0.0
    for micro_step in range(grad_accum_steps):
        start = time.perf_counter()
        x, y = next(micro_batches)
        data_wait += time.perf_counter() - start
        if machine.world_size > 1:  # ranks exchange gradients once a step, not once a micro-step
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with machine.autocast:
            # backward adds gradients up: divide, so that the sum is the mean over the batch
            loss = model(x, y) / grad_accum_steps
        report[0] += loss.detach()
        scaler.scale(loss).backward()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if machine.world_size > 1:
        dist.all_reduce(report)
    loss_sum, stops, norm = torch.cat([report, norm.view(1)]).tolist()
    applied = math.isfinite(loss_sum) and math.isfinite(norm)
    for optimizer in optimizers.values():
        if applied:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return StepResult(loss_sum / machine.world_size, norm, applied, stops > 0, data_wait)


@torch.no_grad()
def validation_loss(model: GPT, windows: Windows, n: int, B: int, machine: Machine) -> float:
    """Return the mean loss over the first `n` windows, read B at a time on every rank."""
    model.eval()
    total = 0.0
    for first in range(machine.rank * B, n, machine.world_size * B):
        rows = min(B, n - first)
        x, y = windows.read(np.arange(first, first + rows))
        # fill up with rows that do not count: another shape would be compiled anew
        x, y = F.pad(x, (0, 0, 0, B - rows)), F.pad(y, (0, 0, 0, B - rows), value=-1)
        with machine.autocast:
            total += model(x.to(machine.device), y.to(machine.device)).item() * rows
    model.train()
    return machine.sum(total) / n


# -----------------------------------------------------------------------------
# training


def train(config: TrainConfig) -> None:
    """Train a GPT-2 until its token budget is spent or a signal asks to stop.

    Raises ValueError or FileNotFoundError, before the first step, for what the user has to mend.
    """
    from fineweb import collect_stop_signals
    from shards import locked

    signals = collect_stop_signals()
    with set_up_machine(config) as machine, contextlib.ExitStack() as stack:
        if machine.is_main:
            stack.enter_context(locked(config.out_dir))  # a second run in it would spoil both
        finished = train_on(config, machine, signals)
        if not finished:
            machine.print("stopped as asked: go on with the same command and --resume")
    if not finished and "RANK" not in os.environ:
        sys.exit(128 + signals[0])  # under torchrun a saved stop is no failure


def train_on(config: TrainConfig, machine: Machine, signals: list[int]) -> bool:
    """Do what `train` says on this machine; return whether the budget is spent."""
    import bench
    import export
    from hellaswag import questions_for_training, score
    from plot import LayerStats, RunLog
    from sample import sample_text
    from shards import fingerprint

    # a new run, or the state of one to go on with
    device, out_dir, world_size = machine.device, config.out_dir, machine.world_size
    cuda = device.type == "cuda"
    holds_a_run = (out_dir / "metrics.jsonl").exists() or export.checkpoint_paths(out_dir)
    if machine.is_main and holds_a_run and not config.resume:
        raise ValueError(f"{out_dir} holds a run: go on with --resume, or give another --out_dir")
    state = export.newest_checkpoint(out_dir, machine.print) if config.resume else None
    data = fingerprint(config.data_dir)
    if state:
        export.check_same_run(config, state, data)
    model = export.make_model(config, state).to(device).train()
    T, n_params = model.config.block_size, sum(p.numel() for p in model.parameters())

    # data
    train_windows = Windows(config.data_dir, "train", T, model.config.vocab_size)
    val_windows = Windows(config.data_dir, "val", T, model.config.vocab_size)
    if len(val_windows) < 1 or len(train_windows) * T < config.total_batch_size:
        raise ValueError(
            f"{config.data_dir}: {len(train_windows)} training and {len(val_windows)} validation "
            f"windows of {T} tokens are less than one step of {config.total_batch_size} tokens and "
            "one window: make more data, or lower --total_batch_size or --block_size"
        )
    val_tokens = config.val_tokens or (10485760 if cuda else 65536)
    n_val = min(len(val_windows), max(1, val_tokens // T))

    # micro-batch, compiler, optimizer, ranks
    fits = partial(bench.fits_in_memory, model, machine)
    off_cuda = PRESETS[config.preset].micro_batch_size
    B = bench.choose_micro_batch_size(config, T, machine, off_cuda, fits)
    compiling, missing = bench.choose_compile(config.compile, device)
    if compiling:
        compile_model(model)
    optimizers = make_optimizers(model, config, machine)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
    ddp_model: nn.Module = model
    if world_size > 1:
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    step = tokens_seen = 0
    if state:
        for name, optimizer in optimizers.items():  # the groups are as configured here
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[name]["state"]})
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step, tokens_seen = state["step"], state["windows_seen"] * T
        if state["train_config"]["max_steps"] != config.max_steps:
            machine.print(
                f"warning: max_steps was {state['train_config']['max_steps']}, is now "
                f"{config.max_steps}: the learning rate takes another course from here"
            )
        state = None  # its memory
        if tokens_seen >= config.budget:
            machine.print(f"{out_dir}: the run is finished: {step} steps, {tokens_seen:,} tokens")
            return True

    # the log: metrics.jsonl and the console
    log = RunLog(out_dir, step, machine.is_main, config.tensorboard, config.wandb)
    log.write(
        "run", step, config=export.plain(config), model_config=export.plain(model.config),
        n_params=n_params, data=data, micro_batch_size=B, world_size=world_size, compile=compiling,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        dtype=str(machine.dtype).removeprefix("torch."),
        passes=config.budget / (len(train_windows) * T),
    )  # fmt: skip
    for note in bench.ugly_dimensions(model.config, B) + missing:
        machine.print(f"note: {note}")
    if config.resume:
        machine.print(f"going on after step {step}" if step else "nothing to resume: a new run")

    # what a resumed run has logged at this step already: rank 0 knows, all must agree
    done = {e for e in ("val", "hellaswag", "sample") if machine.sum((e, step) in log.kept)}
    gpt2_ids = model.config.vocab_size == 50257  # others are not those of our tokenizer
    hellaswag_every = {None: 250 if cuda else 0}.get(config.hellaswag_every, config.hellaswag_every)
    questions = questions_for_training(machine) if hellaswag_every and gpt2_ids else None

    batches = micro_batches(train_windows, config, B, machine, step, tokens_seen)
    peak, token_flops = bench.peak_flops(device), bench.flops_per_token(model.config, n_params)
    first_step, stopping, skipped, unsaved = step, False, 0, ""
    while True:
        last = tokens_seen >= config.budget

        def due(every: int, event: str) -> bool:
            now = every > 0 and (last or step % every == 0)  # noqa: B023
            return now and not stopping and not (step == first_step and event in done)  # noqa: B023

        # once in a while: how well does it predict text it has never seen?
        if due(config.eval_every, "val"):
            loss = validation_loss(model, val_windows, n_val, B, machine)
            log.write("val", step, loss=loss)

        # once in a while: does it know how a story goes on?
        if questions and due(hellaswag_every, "hellaswag"):
            log.write("hellaswag", step, **score(model, questions, machine))

        # once in a while: what does it write?
        if machine.is_main and gpt2_ids and due(config.sample_every, "sample"):
            for text in sample_text(model, config.seed, machine):
                log.write("sample", step, text=text)

        # once in a while, and before leaving: keep everything
        saving = last or stopping or (step > first_step and due(config.checkpoint_every, ""))
        states = {name: o.state_dict() for name, o in optimizers.items()} if saving else {}
        if saving and machine.is_main:
            path = out_dir / f"ckpt_{step:06d}.pt"
            state = dict(
                model={name: p.detach() for name, p in model.named_parameters()},
                **states,
                scaler=scaler.state_dict(),
                step=step,
                windows_seen=tokens_seen // T,
                model_config=export.plain(model.config),
                train_config=export.plain(config),
                rng=torch.get_rng_state(),
                data=data,
            )
            start = time.perf_counter()
            try:
                export.write_checkpoint(path, state, config.keep_checkpoints)
                unsaved = ""
                log.write("checkpoint", step, path=str(path), seconds=time.perf_counter() - start)
            except (OSError, RuntimeError) as error:  # disk full: there may be room next time
                unsaved = f"{path} could not be written ({error}): make room"
                if last or stopping:
                    raise OSError(f"{unsaved} and go on with --resume") from None
        if unsaved:
            log.say(f"warning: {unsaved}")
        if last or stopping:
            if last and machine.is_main:
                export.write_huggingface(model, out_dir / "hf")
            log.close()
            return last

        # one step
        batch_tokens = step_batch_tokens(config, tokens_seen)
        lrs = {}
        for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
            lr = learning_rate(config, tokens_seen, batch_tokens, group["peak_lr"])
            group["lr"] = lrs[group["logged_as"]] = lr
        grad_accum_steps = batch_tokens // (B * T * world_size)
        watching = machine.is_main and due(config.stats_every, "")
        start = time.perf_counter()
        try:
            with LayerStats(model, optimizers) if watching else contextlib.nullcontext() as stats:
                result = train_step(
                    ddp_model, optimizers, scaler, batches, grad_accum_steps, config.grad_clip,
                    machine, stop=bool(signals),
                )  # fmt: skip
        except torch.OutOfMemoryError:
            smaller = f"--resume with --micro_batch_size {max(1, B // 2)}"
            raise ValueError(f"out of GPU memory in step {step}: {smaller}") from None
        dt = time.perf_counter() - start
        tokens_seen += batch_tokens
        stopping = result.stop
        if result.applied:
            mfu = batch_tokens / dt * token_flops / (peak * world_size) if peak else None
            log.write(
                "train", step, loss=result.loss, **lrs, grad_norm=result.grad_norm, dt=dt,
                batch_tokens=batch_tokens, tokens_seen=tokens_seen, mfu=mfu,
                tokens_per_sec=batch_tokens / dt, data_wait=result.data_wait,
            )  # fmt: skip
            if stats:
                log.write("stats", step, **stats.values(result.grad_norm))
        else:
            why = f"loss {result.loss}, gradient norm {result.grad_norm}"
            windows = [(tokens_seen - batch_tokens) // T, tokens_seen // T]
            log.write("skip", step, why=why, windows=windows)
        skipped = 0 if result.applied else skipped + 1
        if skipped and skipped >= config.max_skipped:
            raise ValueError(
                f"{skipped} steps in a row were not finite: --resume from the last checkpoint with "
                "other data, or start again with a lower --max_lr"
            )
        step += 1


def main() -> None:
    from fineweb import run_command

    run_command(TrainConfig, train)


if __name__ == "__main__":
    main()
