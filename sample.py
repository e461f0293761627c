"""
Text from a trained GPT-2:

    python sample.py --prompt "Hello, I'm a language model,"      the newest checkpoint in log/
    python sample.py --model gpt2 --int8 < prompt.txt             OpenAI's weights, in a quarter

Shapes as in train_gpt2.py; B is the number of samples.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.cli import run_command
from common.generate import stream_text
from common.hardware import Device
from common.tokenizer import encode
from train_gpt2 import GPT, TrainConfig, load_model, set_up_machine

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text that goes on from a prompt."""

    model: str | None = None  # checkpoint, Hugging Face folder or hub name (newest in log/)
    prompt: str | None = None  # text to go on from; left out: standard input, unless a terminal
    num_samples: int = 4  # continuations, made side by side
    max_new_tokens: int = 100  # length of each, unless it ends by itself
    temperature: float = 1.0  # below 1 the likely becomes likelier; 0: always the likeliest
    top_k: int = 50  # choose among so many of the likeliest tokens; 0: among all
    seed: int = 42  # of the choices
    int8: bool = False  # weights in 8 bits: a quarter of the memory, and faster on a CPU
    device: Device = "auto"  # where to run
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and arithmetic

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if not value <= given < 2**63:  # torch's limit for seeds, and none for the others
                raise ValueError(f"{name} {given}: give a number of {value} or more")


# -----------------------------------------------------------------------------
# weights for reading: in eight bits, or by columns


class Int8Linear(nn.Module):
    """A linear layer with its matrix (out, in) in 8-bit integers and a scale for each row."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        # The scale is rounded first, so that the integers make up for what it loses.
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        rows = (weight / scale[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("scale", scale)  # (out,)
        self.register_buffer("rows", rows.to(torch.int8))  # (out, in)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (B*T, in)
        if x.device.type == "cpu" and len(flat) <= 8:
            # A token needs every weight once: the time goes into reading them, now a quarter.
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.rows, self.scale)
        else:  # many tokens share the cost of turning the weights back
            y = F.linear(flat, self.rows.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """The rows of the output head, which has them less their mean.

    Without the mean, all logits of a position are lower by the same amount. No probability notices,
    but bfloat16 does: GPT-2's logits lie around -100, where its steps are 0.5.
    """

    def __init__(self, head: Int8Linear, mean: Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("mean", mean)  # (C,)

    def forward(self, idx: Tensor) -> Tensor:
        rows = self.head.rows[idx] * self.head.scale[idx].float()[..., None]  # (B, T, C)
        return (rows + self.mean).to(self.mean.dtype)


@torch.no_grad()
def quantize(model: GPT) -> GPT:
    """Put the matrices of a model in 8 bits, in place, without the padded rows; return the model.

    Position embeddings, gains and biases, a hundredth of the whole, stay as they are.
    """
    for block in model.transformer.h:
        for part in block.attn, block.mlp:
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear(layer.weight, layer.bias))
    embedding = model.transformer.wte.weight[: model.config.vocab_size]
    mean = embedding.mean(dim=0)
    model.lm_head = Int8Linear(embedding - mean, None)
    model.transformer.wte = Int8Embedding(model.lm_head, mean)
    return model


def by_columns(model: GPT) -> GPT:
    """Store the matrices of a model by columns, in place; return the model.

    A CPU multiplies one float32 token with them a quarter faster. Rows are better for several
    tokens at a time, and for bfloat16.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    return model


def model_bytes(model: nn.Module) -> int:
    """Return the memory that parameters and buffers take, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


# -----------------------------------------------------------------------------
# command


def cut_note(model: GPT, prompt: str) -> str:
    """Return a note if the prompt is longer than the model's context, else an empty string."""
    tokens, context = len(encode(prompt)), model.config.block_size
    if tokens <= context:
        return ""
    return f"note: the prompt has {tokens} tokens, the context {context}: only its end is read"


def read_prompt(config: SampleConfig) -> str:
    """Return --prompt, or what is on standard input, less the line end that echo adds."""
    if config.prompt is not None or sys.stdin is None or sys.stdin.isatty():
        return config.prompt or ""
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")


def sample(config: SampleConfig) -> None:
    """Print the continuations one below the other; on a terminal, the first as it is made."""
    prompt = read_prompt(config)
    with set_up_machine(TrainConfig(device=config.device, dtype=config.dtype)) as machine:
        model = load_model(config.model, machine.device).to(machine.dtype)
        if config.int8:
            quantize(model)
        elif machine.device.type == "cpu" and (config.num_samples, config.dtype) == (1, "float32"):
            by_columns(model)
        if note := cut_note(model, prompt):
            print(note, file=sys.stderr)
        settings = ("num_samples", "max_new_tokens", "temperature", "top_k", "seed")
        steps = stream_text(model, prompt, **{name: getattr(config, name) for name in settings})
        texts, live = [prompt] * config.num_samples, sys.stdout.isatty()
        for i, pieces in enumerate(steps):
            if live:
                print(pieces[0] if i else prompt + pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print("" if live else texts[0])
        for text in texts[1:]:
            print("-" * 80, text, sep="\n")


def main() -> None:
    try:
        run_command(SampleConfig, sample)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
