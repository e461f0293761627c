"""
GPT-2 and its training, in one file. To run it:

    python fineweb.py                                          # the data, once
    python train_gpt2.py                                       # on a CPU, a Mac or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # on eight GPUs
    python train_gpt2.py --preset tiny --data_dir data/pydocs  # after fineweb.py --source pydocs

Read it from top to bottom: configuration, model, data, optimizer and schedule, ranks, one step,
evaluation, the loop. What commands share is in common/: checkpoint files, the run's log, the
tokenizer, the choice of precision. You can follow GPT-2 and its training without opening it.

Shapes: B rows (sequences) of a micro-batch, T tokens of a row, C width of the residual stream
(n_embd), nh attention heads of size hs (C = nh * hs), V vocabulary padded to a multiple of 128.
"""

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint as checkpoint_block

from common import checkpoint, cli, hardware, parallel, ranks
from common.cli import advice, plain
from common.files import locked
from common.generate import sample_text
from common.huggingface import write_huggingface
from common.layer_stats import LayerStats
from common.metrics import run_facts
from common.muon import Muon
from common.runlog import RunLog, open_log
from common.shards import fingerprint, open_shards
from common.tokenizer import count_bytes
from common.weights import read_weights
from hellaswag import questions_for_training, score

# -----------------------------------------------------------------------------
# configuration


class Preset(NamedTuple):
    """The size of a model, and the settings that go with it."""

    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    max_lr: float
    total_batch_size: int  # tokens a step
    micro_batch_size: int = 8  # rows, if GPU memory cannot be probed
    max_steps: int = 19073  # 10B tokens at half a million a step
    muon_max_lr: float | None = None  # max_lr with --optimizer muon, where it was measured


PRESETS = {  # sizes of GPT-2 and GPT-3, rates and batches of GPT-3 (its paper, table 2.1)
    "tiny": Preset(4, 128, 4, 128, 2e-3, 1024, 8, 380, muon_max_lr=16e-3),
    "gpt2": Preset(12, 768, 12, 1024, 6e-4, 524288),
    "gpt2-medium": Preset(24, 1024, 16, 1024, 3e-4, 524288),
    "gpt2-large": Preset(36, 1280, 20, 1024, 2.5e-4, 524288),
    "gpt2-xl": Preset(48, 1600, 25, 1024, 2e-4, 1048576),
    "gpt3-125m": Preset(12, 768, 12, 2048, 6e-4, 524288),
    "gpt3-350m": Preset(24, 1024, 16, 2048, 3e-4, 524288),
    "gpt3-760m": Preset(24, 1536, 16, 2048, 2.5e-4, 524288),
    "gpt3-1.3b": Preset(24, 2048, 16, 2048, 2e-4, 1048576),  # 24 heads in the paper: do not divide
    "gpt3-2.7b": Preset(32, 2560, 32, 2048, 1.6e-4, 1048576),
    "gpt3-6.7b": Preset(32, 4096, 32, 2048, 1.2e-4, 2097152),
    "gpt3-13b": Preset(40, 5120, 40, 2048, 1e-4, 2097152),  # width 5140 in the paper
}
MODEL_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture: what a checkpoint needs to build the model again."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in MODEL_FIELDS:
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} {getattr(self, name)}: give a number from 1 up to 2^31")
        if self.n_embd % self.n_head:
            what = f"n_head {self.n_head} does not divide n_embd {self.n_embd}"
            near = hardware.nearest_divisors(self.n_embd, self.n_head)
            raise ValueError(f"{what}: give --n_head {near}, or another width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: give a number from 0 up to 1")

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the embedding: a multiple of 128 keeps the matrix products on fast tiles."""
        return math.ceil(self.vocab_size / 128) * 128


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train GPT-2. The preset sets what you leave out; `auto` lets the machine decide."""

    # data
    data_dir: Path = Path("edu_fineweb10B")  # folder of token shards, made by fineweb.py
    shuffle: bool = True  # a new order of the windows in every epoch; else that of the files
    seed: int = 1337  # for initialisation, shuffling, dropout and samples
    # model
    preset: Literal[tuple(PRESETS)] = "gpt2"  # size of the model and the settings that go with it
    n_layer: int | None = None  # number of blocks
    n_head: int | None = None  # attention heads in a block
    n_embd: int | None = None  # width of the residual stream
    block_size: int | None = None  # context length, in tokens
    vocab_size: int | None = None  # token ids (50257), padded to a multiple of 128 in memory
    dropout: float = 0.0  # probability; 0 is best if the data is read about once
    init_from: str | None = None  # model to start from: checkpoint, run, folder, hub name
    # batch
    total_batch_size: int | None = None  # tokens a step, over all ranks (the preset's)
    micro_batch_size: int | None = None  # rows at a time on a device (CUDA: what fits; else 8)
    batch_ramp_tokens: int = 0  # grow the batch linearly over this many tokens
    batch_ramp_start: int = 32768  # tokens a step at the start; every batch is a multiple of it
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside the blocks
    max_steps: int | None = None  # budget, in steps of total_batch_size (19073; tiny: 380)
    warmup_steps: int | None = None  # linear warm-up (715, or a tenth of max_steps if less)
    max_lr: float | None = None  # peak learning rate; a tenth of the preset's with --init_from
    # after warm-up; linear: down to zero; wsd: constant, and down only at the end
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_fraction: float = 0.2  # wsd: the last part of the budget, in which the rate goes down
    min_lr_ratio: float = 0.1  # cosine and wsd end at this fraction of max_lr
    weight_decay: float = 0.1  # for tensors of two or more dimensions
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.95  # AdamW: decay of the mean of squared gradients
    eps: float = 1e-8  # AdamW: prevents division by zero
    muon_lr: float | None = None  # Muon: peak learning rate on AdamW's scale (max_lr)
    muon_momentum: float = 0.95  # Muon: decay of the mean of gradients
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # precision and device
    dtype: hardware.Dtype = "auto"  # for matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile
    device: hardware.Device = "auto"  # where to run
    # evaluation: before the first step, every N steps, and after the last; 0: never
    eval_every: int = 250  # steps between validation losses
    sample_every: int = 250  # steps between text samples
    hellaswag_every: int | None = None  # steps between HellaSwag scores (250 on CUDA, else 0)
    val_tokens: int | None = None  # tokens of a validation (10485760 on CUDA, else 65536)
    # run
    out_dir: Path = Path("log")  # folder for metrics.jsonl and checkpoints
    checkpoint_every: int = 1000  # steps; 0: only at the end and on a signal
    keep_checkpoints: int = 2  # how many of the newest to keep; 0: all
    resume: bool = False  # continue from the newest checkpoint in out_dir, if there is one
    branch_from: Path | None = None  # new run from this checkpoint, with another schedule or budget
    target_loss: float | None = None  # end the run at the first validation loss at or below this
    max_skipped: int = 10  # stop after this many skipped steps in a row (not finite)
    shard: Literal["auto", "on", "off"] = "auto"  # shard the model over the ranks (FSDP2)
    recompute: Literal["auto", "on", "off"] = "auto"  # save memory: compute blocks twice
    timeout_minutes: float = 10.0  # end the run if a rank is silent for this long
    profile_step: int | None = None  # first of three steps to profile with torch.profiler
    stats_every: int = 0  # steps between records of how each layer is updated; 0: never
    tensorboard: bool = False  # send the same numbers to TensorBoard, in out_dir
    wandb: bool = False  # send the same numbers to Weights & Biases

    def __post_init__(self) -> None:
        preset = PRESETS[self.preset]
        fill = {"total_batch_size": preset.total_batch_size, "max_steps": preset.max_steps}
        if self.init_from is None:
            fill |= {name: getattr(preset, name, 50257) for name in MODEL_FIELDS}
        max_lr = (self.optimizer == "muon" and preset.muon_max_lr) or preset.max_lr
        fill["max_lr"] = max_lr if self.init_from is None else max_lr / 10
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the class is frozen
        for name, value in vars(self).items():
            low = int(name.endswith(("_size", "_start", "max_steps", "val_tokens")))
            high = 1 if name in ("dropout", "beta1", "beta2", "muon_momentum") else 2**63
            if isinstance(value, int | float) and not low <= value < high:
                raise ValueError(f"{name} {value}: give a number from {low} up to {high:g}")
        if self.warmup_tokens > self.budget or self.decay_fraction > 1:
            given = f"warmup_steps {self.warmup_steps}, decay_fraction {self.decay_fraction}"
            raise ValueError(f"{given}: give at most {self.max_steps} (max_steps) and 1")
        if self.target_loss is not None and not (self.target_loss and self.eval_every):
            raise ValueError(f"target_loss {self.target_loss}: give more than 0, and --eval_every")
        if self.batch_ramp_tokens and self.total_batch_size % self.batch_ramp_start:
            given = f"batch_ramp_start {self.batch_ramp_start}, total {self.total_batch_size}"
            raise ValueError(f"{given}: give a --batch_ramp_start that divides the total")
        if self.init_from is None:
            self.model_config()  # raises if the dimensions do not fit together

    def model_config(self) -> GPTConfig:
        """Return the architecture that the preset and the flags ask for."""
        return GPTConfig(**{name: getattr(self, name) for name in (*MODEL_FIELDS, "dropout")})

    @property
    def budget(self) -> int:
        """Tokens of the whole run."""
        return self.max_steps * self.total_batch_size

    @property
    def warmup_tokens(self) -> int:
        steps = self.warmup_steps
        # GPT-3 warms up for 375M tokens: 715 steps of half a million
        return self.total_batch_size * (min(715, self.max_steps // 10) if steps is None else steps)


# -----------------------------------------------------------------------------
# model


class CausalSelfAttention(nn.Module):
    """Let each position gather information from itself and the positions before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # query, key and value in one product: one large product is faster than three small ones
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads found
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        B, T, C = x.shape
        # Each head works on its own hs = C / nh numbers of a position. q, k, v: (B, nh, T, hs)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:  # sampling keeps the keys and values of earlier tokens
            k, v = cache.extend(k, v)
        # softmax(q k^T / sqrt(hs)) v: a query asks, keys answer, values are what is passed on. The
        # sum of hs products has variance hs; without sqrt(hs) softmax would pick one key alone.
        # Flash attention (Dao et al., 2022), where torch has it, never stores the T x T scores: 200
        # MB a layer in bfloat16 for B = 8, T = 1024.
        y = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,  # t must not see t+1, its target. T = 1: all is past
        )  # (B, nh, T, hs)  # fmt: skip
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Process each position by itself: widen to 4C, apply a non-linearity, project back to C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2 was trained with this approximation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)  # mean 0 and variance 1, then gain and bias
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        # "Pre-norm": LayerNorm is inside the branches. Between the blocks there are only additions,
        # so a part of the gradient reaches every layer unchanged, at any depth.
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


MOST_LOGITS = 2**31 - 1  # in one tensor: with more, kernels would have to count in 64 bits


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019), with the parameter names of Hugging Face's GPT2LMHeadModel."""

    # The residual stream, if products have this dtype too: half the bytes. Scores keep float32.
    residual_dtype = torch.bfloat16

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Keep only the input of each block for the backward pass, and compute the rest again there:
        # 2 bytes a channel instead of 34, for a third more work (Chen et al., 2016).
        self.recompute = False
        parts = dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),  # what a token means
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it is: learned too
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),  # the stream has grown with every block
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # One matrix reads and writes tokens (Press and Wolf, 2017): tokens that can replace each
        # other should be close in both. It saves 38.6M of 163M parameters at 124M.
        self.lm_head.weight = self.transformer.wte.weight
        self.n_params = sum(p.numel() for p in self.parameters())  # the shared matrix counts once
        self._init_weights()

    def _init_weights(self) -> None:
        # 0.02 is GPT-2's value (OpenAI's code has 0.01 for wpe). A layer's outputs start smaller
        # than its inputs, by 0.02 * sqrt(C): 0.55 at C = 768. Logits start small too, so every
        # token is about equally likely and the first loss is close to ln(V).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Each of the n_layer blocks adds to the residual stream twice. A sum of n equal
                # independent terms grows like sqrt(n), so these projections start smaller by
                # 1/sqrt(2 * n_layer) (GPT-2 paper, section 2.3).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # the gains of LayerNorm are 1 already

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, C) of token ids (B, T).

        Scoring and sampling use `positions` (B, T) or (T,), `mask` (True if a query sees a key)
        and `caches` (one a layer). By default token t has position t and sees tokens 0 to t.
        """
        if positions is None:
            T, most = idx.size(1), self.config.block_size
            assert T <= most, f"{T} tokens, block_size {most}"
            positions = torch.arange(T, device=idx.device)
        # Attention itself does not know the order of its inputs, so each position adds a vector.
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        kind, dtype = x.device.type, self.residual_dtype
        if self.training and torch.is_autocast_enabled(kind):
            x = x.to(dtype) if torch.get_autocast_dtype(kind) == dtype else x
        for i, block in enumerate(self.transformer.h):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint_block(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, caches[i] if caches else None)
        return self.transformer.ln_f(x)  # (B, T, C)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) or, with targets (B, T), the mean loss in nats.

        Targets of -1 do not count. The logits of padded ids have no meaning: cut them off at
        `config.vocab_size` before you choose a token.
        """
        x = GPT.hidden(self, idx)  # (B, T, C); FSDP2's self.hidden frees wte, which the head needs
        if targets is None:
            return self.lm_head(x)
        # The loss of 64 rows (3.3 billion logits) is taken in two halves.
        most = max(1, MOST_LOGITS // (idx.size(1) * self.config.padded_vocab_size))  # rows
        n = math.ceil(len(idx) / most)
        parts = zip(x.chunk(n), targets.chunk(n), strict=True)
        return torch.stack([self.loss(*part) for part in parts]).sum() / (targets != -1).sum()

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy of hidden states (B, T, C) against targets (B, T)."""
        # All T positions of a row are predicted at once: T training examples for one pass.
        logits = self.lm_head(x).flatten(0, 1)  # (B*T, V), the largest tensor of all
        # A sum of 50,000 exponentials needs more than bfloat16's 8 bits. The compiler puts the cast
        # inside its loop, so the float32 logits (3.3 GB at B = 16) are never stored.
        return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-1, reduction="sum")


def load_model(name_or_path: str | Path | None, device: torch.device | str = "cpu") -> GPT:
    """Return a trained model in eval mode, float32, on `device`. Rank 0 reads it for all ranks.

    `name_or_path`: a file, folder or hub name of docs/inputs.md; None: the newest checkpoint under
    log/, else `gpt2`. Raises ValueError or OSError if there is no such model or it is damaged.
    """
    return parallel.spread(ranks.on_rank_0(read_model, name_or_path), torch.device(device)).eval()


def read_model(name_or_path: str | Path | None) -> GPT:
    """Return a trained model on the CPU; for the rest see `load_model`."""
    name, sizes, weights = read_weights(name_or_path)
    try:
        return checkpoint.build_model(GPT, GPTConfig, sizes, weights)
    except ValueError as error:
        raise ValueError(f"{name}: {error}: give another model") from None


def compile_model(model: GPT) -> None:
    """Compile in place, block by block: all blocks share one graph, so it is compiled once."""
    # On a CPU the backward pass computes norms, GELU and casts again instead of storing them: as
    # fast, in an eighth less memory at 124M (benchmarks/ladder_cpu.md). Sharded, it would otherwise
    # keep a bfloat16 copy of every whole block: 26 GB at 13B.
    store = next(model.parameters()).device.type != "cpu" and not parallel.is_sharded(model)
    functorch.ban_recompute_materialized_backward = store
    # DDP would cut a block's graph at every 25 MB of gradients: 2 graphs at width 768, 4 at 1600.
    torch._dynamo.config.optimize_ddp = False
    for block in model.transformer.h:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)


# -----------------------------------------------------------------------------
# data


def window_order(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch's windows (uint32), drawn from (seed, epoch)."""
    order = np.arange(n_windows, dtype=np.uint32)  # 40 MB for ten million windows
    # neighbours in a file come from one document: in one batch, their gradients would be alike
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class Windows:
    """The windows of one split: shards cut into rows of T inputs and, shifted by one, T targets.

    Window i of a shard is tokens [i*T, i*T + T]. None crosses shards. The tail is dropped.
    """

    def __init__(self, data_dir: Path, split: str, block_size: int, vocab_size: int):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.shards = open_shards(data_dir, split, vocab_size)  # memory-mapped
        # a window needs T + 1 tokens, because its last input needs a target: hence n - 1
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
            row[:] = self.shards[shard][start : start + T + 1]  # uint16 to the int64 of embeddings
        if (top := rows.max(initial=0)) >= self.vocab_size:  # opening them looked at samples only
            what = f"token id {top} in the data, but vocab_size is {self.vocab_size}"
            raise ValueError(f"{what}: give the --vocab_size of its tokenizer")
        rows = torch.from_numpy(rows)  # position t predicts token t + 1
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # a GPU copies one block only

    def stream(self, start: int, count: int, seed: int | None) -> np.ndarray:
        """Return windows [start, start + count) of the endless stream of epochs.

        Every epoch is all windows: in order, or permuted if there is a seed.
        """
        parts = []
        while count:
            epoch, first = divmod(start, len(self))
            n = min(count, len(self) - first)
            if seed is not None and self._order[0] != (seed, epoch):  # drawn once an epoch
                self._order = ((seed, epoch), window_order(len(self), seed, epoch))
            in_order = np.arange(first, first + n)
            parts.append(in_order if seed is None else self._order[1][in_order])
            start, count = start + n, count - n
        return np.concatenate(parts)


def micro_batches(
    windows: Windows, config: TrainConfig, B: int, machine: "Machine", step: int, tokens_seen: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's inputs and targets, (B, T) each, for every micro-step of the rest of a run.

    What a step reads depends only on the windows used before it, not on ranks, micro-batch or
    restarts. A thread reads a few micro-batches ahead, so that the device does not wait.
    """
    T, seed = windows.block_size, config.seed if config.shuffle else None

    def places(step: int, tokens_seen: int) -> Iterator[tuple[int, int, range]]:
        while tokens_seen < config.budget:
            batch_tokens, first = step_batch_tokens(config, tokens_seen), tokens_seen // T
            b = hardware.rows_of_step(B, batch_tokens, T, machine.world_size)
            starts = range(machine.rank * b, batch_tokens // T, machine.world_size * b)
            yield from ((step, m, range(first + s, first + s + b)) for m, s in enumerate(starts))
            step, tokens_seen = step + 1, tokens_seen + batch_tokens

    def read(rows: range) -> tuple[Tensor, ...]:
        batch = windows.read(windows.stream(rows.start, len(rows), seed))
        return tuple(t.pin_memory() for t in batch) if cuda else batch

    todo, cuda = places(step, tokens_seen), machine.device.type == "cuda"
    with ThreadPoolExecutor(1) as reader:
        ahead = deque((place, reader.submit(read, place[2])) for place in islice(todo, 4))
        while ahead:
            (step, micro_step, _), batch = ahead.popleft()
            x, y = batch.result()  # has been read while the device worked
            ahead.extend((place, reader.submit(read, place[2])) for place in islice(todo, 1))
            if config.dropout:  # the model draws its masks next: the same ones after a restart
                key = np.random.SeedSequence((config.seed, step, micro_step, machine.rank))
                torch.manual_seed(int(key.generate_state(1)[0]))
            # A GPU copies from pinned memory while the CPU goes on. Elsewhere that is not safe.
            yield tuple(t.to(machine.device, non_blocking=cuda) for t in (x, y))


# -----------------------------------------------------------------------------
# optimizer, schedule, batch ramp


def make_optimizers(model: GPT, config: TrainConfig, machine: "Machine") -> dict[str, Any]:
    """Return AdamW, as "optimizer", and Muon, as "muon", if it is asked for."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = {}
    if config.optimizer == "muon":
        # Muon is for matrices that map vectors to vectors. The embedding is a table with a row for
        # each token. It stays with AdamW, as in Muon's own recipe.
        inside = {p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2}
        optimizers["muon"] = Muon(
            [p for p in params if p in inside], config.weight_decay, config.muon_momentum,
            machine.rank, machine.world_size, logged_as="muon_lr",
            peak_lr=config.max_lr if config.muon_lr is None else config.muon_lr,
        )  # fmt: skip
        params = [p for p in params if p not in inside]
    # Weight decay pulls weights towards 0, so a large one must pay for itself. Biases and the gains
    # of LayerNorm only shift and scale: pulling a gain to 0 would switch its channel off.
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak_lr": config.max_lr, "logged_as": "lr"} for group in groups]
    # AdamW (Loshchilov and Hutter, 2019) divides the mean gradient by the root of its mean square:
    # a weight moves by at most about the learning rate, for gradients of any scale. The betas, eps,
    # decay, clipping and warm-up are GPT-3's (appendix B); 0.95, not 0.999, follows changes faster.
    # fused: a few kernels for all tensors. They read and write 28 bytes a parameter, once.
    betas = (config.beta1, config.beta2)  # averages over about 10 and 20 steps
    adamw = torch.optim.AdamW(groups, config.max_lr, betas, config.eps, fused=True)
    return {"optimizer": adamw, **optimizers}


def step_batch_tokens(config: TrainConfig, tokens_seen: int) -> int:
    """Return the tokens of the step that starts at `tokens_seen`: the ramp, cut at the budget.

    At first all examples give similar gradients: a few are enough. (GPT-3 paper, appendix B.)
    """
    batch = config.total_batch_size
    if tokens_seen < config.batch_ramp_tokens:
        start = config.batch_ramp_start
        batch = start + (batch - start) * tokens_seen // config.batch_ramp_tokens
        batch -= batch % start  # whole micro-batches on any number of ranks
    return min(batch, config.budget - tokens_seen)


def learning_rate(config: TrainConfig, tokens_seen: int, batch_tokens: int, peak: float) -> float:
    """Return the rate of the step that starts at `tokens_seen`: linear warm-up, then the schedule.

    Warm-up counts the tokens seen after the step, so the rate of the first step is not 0.
    """
    warmup = config.warmup_tokens
    if tokens_seen < warmup:  # AdamW's averages are noisy at first, and large steps would do harm
        return peak * min(1.0, (tokens_seen + batch_tokens) / warmup)
    start = warmup  # of the way down
    if config.schedule == "wsd":  # warm-up, stable, decay (Hu et al., 2024, section 4)
        # As long as the rate is constant, it does not matter how long the run will be: one run can
        # have many ends (--branch_from).
        start = max(warmup, config.budget - round(config.decay_fraction * config.budget))
    progress = max(0, tokens_seen - start) / max(1, config.budget - start)
    if config.schedule == "linear":
        return peak * (1 - progress)  # to 0: small last steps average out noise
    left = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)  # left: from 1 to 0


def set_learning_rates(
    optimizers: dict[str, Any], config: TrainConfig, tokens_seen: int, batch_tokens: int
) -> dict[str, float]:
    """Set the rate of every parameter group for one step; return the rates by name."""
    rates = {}
    for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
        group["lr"] = learning_rate(config, tokens_seen, batch_tokens, group["peak_lr"])
        rates[group["logged_as"]] = group["lr"]  # "lr" or "muon_lr"
    return rates


# -----------------------------------------------------------------------------
# the machine: device, precision, ranks


@dataclass(frozen=True)
class Machine:
    """What this process runs on, and its rank among the `world_size` processes of the run."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters and optimizer stay in float32
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def autocast(self) -> torch.autocast:
        """Run matrix products in `dtype`; norms, softmax and loss stay float32.

        bfloat16 has the range of float32 with 8 bits of precision instead of 24. A product sums
        up in float32, so single errors of 0.4% average out. The weights must not be rounded: an
        update of 6e-4 next to a weight of 0.5 would be lost.
        """
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def print(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)


@contextlib.contextmanager
def set_up_machine(config: TrainConfig, alone: bool = False) -> Iterator[Machine]:
    """Choose device and precision; under torchrun join the other ranks, unless `alone`."""
    join = contextlib.nullcontext((0, 1)) if alone else ranks.join_ranks(config.timeout_minutes)
    with join as (rank, world_size):
        device = ranks.local_device(config.device)
        # Products that stay in float32 may use TF32 on a GPU: 11 bits of precision instead of 24,
        # for several times the speed. Most CPUs ignore this.
        torch.set_float32_matmul_precision("high")
        hardware.limit_threads()
        with hardware.device_errors(device), ranks.process_group(device.type):
            yield Machine(device, hardware.choose_dtype(config.dtype, device), rank, world_size)


# -----------------------------------------------------------------------------
# one step, and evaluation


class StepResult(NamedTuple):
    loss: float  # mean over the whole batch, in nats a token
    grad_norm: float  # before clipping
    applied: bool  # False if loss or norm was not finite: the weights are unchanged
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
    """Make one update from `grad_accum_steps` micro-batches on every rank."""
    report = torch.zeros(2, device=machine.device)  # loss, ranks asked to stop
    report[1] = float(stop)  # not torch.tensor(...), which waits until a GPU has the copy
    data_wait = 0.0  # seconds
    # Half a million tokens do not fit into memory at once. Their gradient is a mean, so it can be
    # added up, one micro-batch after the other.
    for micro_step in range(grad_accum_steps):
        start = time.perf_counter()
        x, y = next(micro_batches)
        data_wait += time.perf_counter() - start
        if machine.world_size > 1:
            # DDP averages gradients over the ranks in a backward pass. To do it in the last one is
            # enough, and sends 1/grad_accum_steps of the bytes. (DDP's no_sync() sets this too.)
            last = micro_step == grad_accum_steps - 1
            if parallel.is_sharded(model):  # in a node always: whole gradients need too much room
                model.set_requires_all_reduce(last)
            else:
                model.require_backward_grad_sync = last
        with machine.autocast:
            # Each loss is a mean over its micro-batch, and backward() adds gradients up. Without
            # the division the gradient would be grad_accum_steps times too large.
            loss = model(x, y) / grad_accum_steps
        report[0] += loss.detach()  # stays on the device: .item() would wait for it
        scaler.scale(loss).backward()  # float16 only: keeps small gradients from becoming 0
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)  # what is clipped is the true gradient
    # One bad batch must not move the weights far: a larger norm is scaled down to grad_clip.
    norm = parallel.clip_gradients(model.parameters(), grad_clip or math.inf)
    if machine.world_size > 1:
        dist.all_reduce(report)
    # Here the CPU waits for the device: once, for all three numbers.
    loss_sum, stops, norm = torch.cat([report, norm.view(1)]).tolist()
    # A NaN in the weights stays there. Every rank sees the same sums, so all decide alike. In
    # float16 an overflow is normal while the scaler looks for its factor; the step's data is lost.
    applied = math.isfinite(loss_sum) and math.isfinite(norm)
    for optimizer in optimizers.values():
        if applied:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return StepResult(loss_sum / machine.world_size, norm, applied, stops > 0, data_wait)


@torch.no_grad()
def validation_loss(
    model: GPT, windows: Windows, n: int, B: int, machine: Machine, signals: Sequence[int] = ()
) -> float:
    """Return the mean loss over the first `n` windows, read B at a time on every rank."""
    total, mine = 0.0, machine.rank * B
    with parallel.evaluating(model, signals) as passes, machine.autocast:
        for first in passes(range(0, n, machine.world_size * B)):  # equally many on every rank
            rows = max(0, min(B, n - first - mine))
            x, y = windows.read(np.arange(first + mine, first + mine + rows))
            # fill up with rows that do not count: torch would compile again for another shape
            x, y = F.pad(x, (0, 0, 0, B - rows)), F.pad(y, (0, 0, 0, B - rows), value=-1)
            loss = model(x.to(machine.device), y.to(machine.device)).item()
            total += loss * rows if rows else 0.0  # the mean of no rows is not a number
    # sums, not means of means: the result is the same for any number of ranks
    return ranks.all_sum(total, machine.device) / n


def bits_per_byte(windows: Windows, n: int) -> float:
    """Return what turns a loss (nats a token) over the first `n` windows into bits per byte.

    Tokenizers cut text into more tokens or fewer, which changes the loss of a token, but not the
    loss of the whole text. Returns 0 if the tokens stand for no text.
    """
    n_bytes = sum(count_bytes(windows.read(np.array([i]))[1].numpy()) for i in range(n))
    return n * windows.block_size / (math.log(2) * n_bytes) if n_bytes else 0.0


# -----------------------------------------------------------------------------
# a run


@dataclass(kw_only=True)
class Run:
    """All that training works with, and how far it has come."""

    config: TrainConfig
    machine: Machine
    model: GPT
    ddp_model: nn.Module  # the same model; on several ranks it also averages gradients
    optimizers: dict[str, Any]
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    train_windows: Windows
    val_windows: Windows
    data: str  # fingerprint of the shards
    micro_batch_size: int
    compiled: bool
    notes: list[str]  # for the console, before the first step
    saved: bool  # there is a checkpoint to continue from
    trunk: Path | None  # folder of the run that this one branches off
    step: int = 0  # updates done
    tokens_seen: int = 0
    on_target: bool = False  # a validation loss was at or below --target_loss
    closed: bool = False  # it has come to its end, and that is written down

    @property
    def finished(self) -> str:
        """Why the run is at its end: "target" or "budget"; empty if it goes on."""
        if self.on_target:
            return "target"
        return "budget" if self.tokens_seen >= self.config.budget else ""


def initial_model(config: TrainConfig, state: dict[str, Any] | None) -> GPT:
    """Return the model of a checkpoint, of --init_from, or a new one, on the CPU."""
    torch.manual_seed(config.seed)
    if state:
        with advice("give another --out_dir"):
            return checkpoint.build_model(GPT, GPTConfig, state["model_config"], state["model"])
    if config.init_from is None:
        return GPT(config.model_config())
    model = read_model(config.init_from)
    sizes, weights = plain(model.config) | {"dropout": config.dropout}, model.state_dict()
    sizes, weights = checkpoint.crop_positions(sizes, weights, config.block_size)
    for name in MODEL_FIELDS:
        asked, has = getattr(config, name), sizes[name]
        if asked is not None and asked != has:
            raise ValueError(f"{name} {asked}: {config.init_from} has {has}: leave it out")
    return checkpoint.build_model(GPT, GPTConfig, sizes, weights)


def open_windows(config: TrainConfig, T: int, vocab_size: int) -> tuple[Windows, Windows]:
    """Return the windows for training and for validation; ValueError if there are too few."""
    damaged = "repair it with fineweb.py, or remove it, or give the --vocab_size of its tokenizer"
    missing = "make the data with fineweb.py, or check --data_dir"
    with advice(damaged, ValueError), advice(missing, OSError):
        train, val = (Windows(config.data_dir, name, T, vocab_size) for name in ("train", "val"))
    if len(val) < 1 or len(train) * T < config.total_batch_size:
        raise ValueError(
            f"{config.data_dir}: {len(train)} training and {len(val)} validation windows of {T} "
            f"tokens are less than one step of {config.total_batch_size} tokens and one window: "
            "make more data, or lower --total_batch_size or --block_size"
        )
    return train, val


def prepare(config: TrainConfig, machine: Machine) -> Run:
    """Return a new run, the run of the newest checkpoint with --resume, or a branch of another one.

    Raises ValueError or FileNotFoundError for what the user has to correct.
    """
    # a run to continue, or none. Rank 0 alone looks: a network file system may show the ranks of
    # other nodes older files, and they would continue from another step.
    device, several = machine.device, machine.world_size > 1
    state, trunk = ranks.on_rank_0(checkpoint.find_state, config, machine.print, several)
    with advice("make the data with fineweb.py, or give another --data_dir"):
        data = fingerprint(config.data_dir)
    facts = {"step": state["step"] if state else 0, "data": data, "dtype": str(machine.dtype)}
    with advice("start all ranks with the same command and the same files"):  # paths may differ
        ranks.check_equal({**plain(config), **facts, "data_dir": "", "out_dir": ""})
    if state:
        with advice("give those of the checkpoint" if trunk else checkpoint.OTHER_RUN):
            checkpoint.check_same_run(state, plain(config), data, branch=trunk is not None)

    # model and data
    model = ranks.on_rank_0(initial_model, config, state)  # elsewhere it has no numbers yet
    shard, notes = parallel.choose_shard(config.shard, model.n_params, device)
    if shard and config.stats_every:  # it reads whole weights and gradients
        raise ValueError("stats_every works on whole models: give --stats_every 0 or --shard off")
    model = parallel.spread(model, device, shard).train()
    size, T = model.config, model.config.block_size
    train_windows, val_windows = open_windows(config, T, size.vocab_size)

    # the micro-batch, and with it model.recompute: large products keep the device busy
    compiled, missing = hardware.choose_compile(config.compile, device)
    usual = PRESETS[config.preset].micro_batch_size
    B = parallel.choose_micro_batch(model, config, machine, compiled, usual)
    small = hardware.small_micro_batch_note(B, config.total_batch_size, T, machine.world_size)

    # compiler, optimizers, ranks
    if compiled:
        compile_model(model)
    run = Run(
        config=config, machine=machine, model=model, ddp_model=model,
        optimizers=make_optimizers(model, config, machine),
        # float16 has no numbers below 6e-8. The scaler multiplies the loss, so that gradients stay
        # above, and lowers its factor when a large one overflows. bfloat16 has float32's range.
        scaler=torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16),
        train_windows=train_windows, val_windows=val_windows, data=data,
        micro_batch_size=B, compiled=compiled, saved=state is not None and not trunk, trunk=trunk,
        notes=[
            *notes, *missing, *hardware.ugly_dimensions(size.n_embd, size.n_head, T, B),
            *(small if device.type == "cuda" else []),
        ],
    )  # fmt: skip
    if machine.world_size > 1 and not shard:
        # Every rank has the whole model and its own rows. DDP starts all ranks with equal weights
        # and averages their gradients, so the weights stay equal. With the bucket view, the average
        # stays in the buffer that was sent and is not copied. (FSDP2 is in common/parallel.py.)
        run.ddp_model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if state:
        checkpoint.restore_run(run, state)
    elif config.resume:
        run.notes.append("nothing to resume: a new run")
    return run


# -----------------------------------------------------------------------------
# training


def train(config: TrainConfig) -> None:
    """Train a GPT-2 until its token budget is spent or a signal asks to stop.

    Raises ValueError or OSError for what the user has to correct.
    """
    run, start = None, time.perf_counter()
    try:
        with set_up_machine(config) as machine, contextlib.ExitStack() as stack:
            in_use = "wait until it ends, or choose another --out_dir"  # two runs would damage both
            with advice(in_use, ValueError), advice("choose another --out_dir", OSError):
                ranks.on_rank_0(stack.enter_context, locked(config.out_dir))
            run = prepare(config, machine)
            signals = cli.collect_stop_signals()  # they end the run after a whole step, and save
            if run.closed:
                machine.print(f"{config.out_dir}: the run is finished after {run.step} steps")
            else:
                log = open_log(run, time.perf_counter() - start)
                train_loop(run, stack.enter_context(log), signals)
    except (hardware.OutOfMemory, hardware.DeviceError, ranks.LostRankError) as error:
        B, what_to_do = run.micro_batch_size if run else 1, "start again"
        if run:
            what_to_do = "use --resume" if run.saved else "start again with another --out_dir"
        if isinstance(error, hardware.OutOfMemory):
            smaller = max((n for n in range(1, B) if B % n == 0), default=0)
            one_row = "give more GPUs, --recompute on, or a smaller --block_size or --preset"
            what_to_do = f"{what_to_do} and --micro_batch_size {smaller}" if smaller else one_row
        error.add_note(what_to_do)
        raise
    if not run.closed:
        machine.print("stopped as asked: continue with the same command and --resume")
        if not ranks.launched():  # torchrun would count it as a failure
            sys.exit(128 + signals[0])


def train_loop(run: Run, log: RunLog, signals: list[int]) -> None:
    """Take steps until the budget is spent or a signal has arrived on some rank."""
    config, machine, model = run.config, run.machine, run.model
    B, T, cuda = run.micro_batch_size, model.config.block_size, machine.device.type == "cuda"

    # How often, in steps. HellaSwag and samples need GPT-2's tokens. HellaSwag is slow on a CPU.
    gpt2_ids = model.config.vocab_size >= 50257
    hellaswag_every = 250 * cuda if config.hellaswag_every is None else config.hellaswag_every
    questions = questions_for_training(machine) if hellaswag_every and gpt2_ids else None
    every = {
        "val": config.eval_every,
        "hellaswag": hellaswag_every if questions else 0,
        "sample": config.sample_every if gpt2_ids else 0,
        "checkpoint": config.checkpoint_every,  # a crash loses at most this many
        "stats": config.stats_every,  # how one update treats each layer
    }
    val_tokens = config.val_tokens or (10485760 if cuda else 65536)
    n_val = min(len(run.val_windows), max(1, val_tokens // T))
    # What a resumed run has logged at this step already. Rank 0 knows it, and all must agree.
    done = ranks.on_rank_0(lambda: {e for e, step in log.kept if step == run.step})
    done.add("checkpoint")  # before the first step there is nothing new to save

    def due(event: str) -> bool:  # after a signal there is only time to save
        now = every[event] and (run.finished or run.step % every[event] == 0)
        return bool(now and event not in done and not stopping)

    # validation reads the same windows every time; of GPT-2's tokens it gives bits per byte too
    per_byte = bits_per_byte(run.val_windows, n_val) if every["val"] and gpt2_ids else 0.0
    batches = micro_batches(run.train_windows, config, B, machine, run.step, run.tokens_seen)
    stopping, skipped, unsaved = False, 0, ""  # asked to stop; steps skipped in a row; what failed
    while True:
        try:
            # once in a while: how well does it predict text that it has never seen?
            if due("val"):
                loss = validation_loss(model, run.val_windows, n_val, B, machine, signals)
                log.write("val", run.step, loss=loss, bpb=loss * per_byte if per_byte else None)
                run.on_target |= config.target_loss is not None and loss <= config.target_loss

            # once in a while: does it know how a story continues? (25% is guessing)
            if due("hellaswag"):
                log.write("hellaswag", run.step, **score(model, questions, machine, signals))

            # once in a while: what does it write? (the same prompt and seed, to compare)
            if due("sample"):
                for text in sample_text(model, config.seed, machine.autocast):
                    log.write("sample", run.step, text=text)
        except parallel.StopAsked:  # a resumed run evaluates here again
            stopping = True

        # once in a while, and before leaving: save everything that the next step depends on
        if due("checkpoint") or run.finished or stopping:
            unsaved = checkpoint.save_run(run, log)
            run.saved |= not unsaved
        if run.finished or stopping:
            if unsaved:  # this must not look like success
                raise OSError(f"{unsaved} and continue with --resume")
            if not stopping:  # the final weights, for other programs
                folder = config.out_dir / "hf"
                weights = parallel.on_rank_0_whole(dict(model.named_parameters()))
                facts = run_facts(config.out_dir)  # for the model card: loss, data, commit
                with advice("make room, then run export.py"):
                    ranks.on_rank_0(write_huggingface, plain(model.config), weights, folder, facts)
            why = "signal" if stopping else run.finished
            log.write("end", run.step, why=why, tokens_seen=run.tokens_seen)
            run.closed = not stopping
            return
        if unsaved:  # the older checkpoints are still there, so training may continue
            log.say(f"warning: {unsaved}")

        # one step: batch size and learning rates are those of this place in the budget
        batch_tokens = step_batch_tokens(config, run.tokens_seen)
        rates = set_learning_rates(run.optimizers, config, run.tokens_seen, batch_tokens)
        # each rank reads its part of the batch in micro-batches, one after the other
        rows = hardware.rows_of_step(B, batch_tokens, T, machine.world_size)
        grad_accum_steps = batch_tokens // (rows * T * machine.world_size)
        watching = due("stats") and machine.is_main  # one rank is enough: all have equal weights
        watch = LayerStats(model, run.optimizers) if watching else contextlib.nullcontext()
        with log.profiled(run.step), watch as stats:
            start = time.perf_counter()  # dt is training alone, without evaluation and saving
            result = train_step(
                run.ddp_model, run.optimizers, run.scaler, batches, grad_accum_steps,
                config.grad_clip, machine, stop=bool(signals),
            )  # fmt: skip
            dt = time.perf_counter() - start  # train_step has waited for the backward pass
        run.tokens_seen += batch_tokens  # also of a skipped step: its data is not tried again
        stopping = result.stop  # the same on all ranks: else some would wait forever

        log.write_step(run.step, result, batch_tokens, run.tokens_seen, T, **rates, dt=dt)
        if stats and result.applied:
            log.write("stats", run.step, **stats.values(result.grad_norm))
        skipped = 0 if result.applied else skipped + 1  # one bad batch is harmless, many are not
        if skipped and skipped >= config.max_skipped:
            what = f"{skipped} steps in a row were not finite"
            raise ValueError(f"{what}: start again with a lower --max_lr, or with other data")
        run.step, done = run.step + 1, set()  # a skipped step counts too


def main() -> None:
    cli.outlive_console("stdout", "stderr")
    with cli.quiet_interrupt():
        cli.run_command(TrainConfig, train, ranks.fail)


if __name__ == "__main__":
    main()
