"""
Text from a trained GPT-2:

    python sample.py --prompt "Hello, I'm a language model,"    the newest checkpoint under log/
    python sample.py --model gpt2 --int8 < prompt.txt           OpenAI's weights, in 8 bits

Shapes as in train_gpt2.py; B is the number of samples.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.cli import advice, quiet_interrupt, run_command
from common.generate import stream_text
from common.hardware import Device, OutOfMemory
from common.tokenizer import encode_prompt
from train_gpt2 import GPT, TrainConfig, load_model, set_up_machine

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Continue a prompt."""

    # checkpoint, run folder, Hugging Face folder, safetensors file or hub name (left out: the
    # newest checkpoint under log/, else gpt2)
    model: str | None = None
    prompt: str | None = None  # text to continue (standard input, unless it is a terminal)
    num_samples: int = 4  # number of continuations, written at the same time
    max_new_tokens: int = 100  # length of each; <|endoftext|> ends it earlier
    temperature: float = 1.0  # below 1: likely tokens become likelier; 0: the likeliest
    top_k: int = 50  # choose among this many of the likeliest tokens; 0: all
    top_p: float = 1.0  # of these, the likeliest that reach this probability together; 1: all
    seed: int = 42  # for the random choices: the same seed writes the same text
    int8: bool = False  # weights in 8 bits: a quarter of the memory, and faster on a CPU
    device: Device = "auto"  # where to run
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # for weights and arithmetic

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if not value <= given < 2**63:  # torch's limit for seeds; the others never reach it
                raise ValueError(f"{name} {given}: give a number of {value} or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: give a number above 0 and at most 1")


# -----------------------------------------------------------------------------
# weights for sampling: in 8 bits, or by columns


class Int8Linear(nn.Module):
    """A linear layer whose matrix (out, in) is 8-bit integers with one scale for each row.

    To write one token, a CPU reads every weight once and multiplies it once. Reading takes longer,
    so a quarter of the bytes is up to 2.5 times as fast (benchmarks/sample.md).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        # Round the scale before the division: then the integers correct its rounding error.
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        rows = (weight / scale[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("scale", scale)  # (out,)
        self.register_buffer("rows", rows.to(torch.int8))  # (out, in)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (B*T, in)
        if x.device.type == "cpu" and len(flat) <= 8:
            # Few tokens: this kernel reads the integers and never makes a float matrix.
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.rows, self.scale)
        else:  # many tokens share the cost of the conversion to floats
            y = F.linear(flat, self.rows.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """The token embedding: the rows of the output head plus their mean.

    The head stores its rows without their mean. This changes all logits of a position by the same
    amount, so no probability changes. It is needed because the kernel computes in bfloat16: GPT-2's
    logits lie around -100, where bfloat16 has steps of 0.5.
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
    """Convert the matrices of a model to 8 bits, in place; return the model.

    The padded rows are dropped. Position embeddings, gains and biases keep their precision: they
    are a hundredth of the whole.
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

    A CPU then multiplies one float32 token a quarter faster. Storing by rows is better for several
    tokens at a time, and for bfloat16.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    return model


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; shared memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


# -----------------------------------------------------------------------------
# command


def cut_note(model: GPT, prompt: str) -> str:
    """Return a note if the prompt is longer than the model's context, else an empty string."""
    tokens, context = len(encode_prompt(prompt)), model.config.block_size
    if tokens <= context:
        return ""
    return f"note: the prompt has {tokens} tokens, the context {context}: only its end is read"


def read_prompt(config: SampleConfig) -> str:
    """Return --prompt, or standard input without the line end that echo adds.

    Standard input is UTF-8 in every locale. PowerShell begins it with a byte-order mark, or writes
    UTF-16. The lines of Windows end as in the text that models read.
    """
    if config.prompt is not None or sys.stdin is None or sys.stdin.isatty():
        return config.prompt or ""
    data = sys.stdin.buffer.read()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        note = f"note: byte {error.start} of the prompt is not {error.encoding}: read as \ufffd"
        print(note, file=sys.stderr)
        text = data.decode(encoding, "replace")
    return text.replace("\r\n", "\n").removesuffix("\n")


def continuations(model: GPT, prompt: str, config: SampleConfig) -> Iterator[list[str]]:
    """Yield the next characters of every sample."""
    settings = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    with advice("give a model with GPT-2's vocabulary"):
        yield from stream_text(model, prompt, **{name: getattr(config, name) for name in settings})


def sample(config: SampleConfig) -> None:
    """Print the continuations one below the other. A terminal shows the first while it is written.

    Raises ValueError or OSError for what the user has to correct.
    """
    prompt = read_prompt(config)
    settings = TrainConfig(device=config.device, dtype=config.dtype)
    smaller = advice("give fewer --num_samples, another --model, or --device cpu", OutOfMemory)
    with smaller, set_up_machine(settings, alone=True) as machine:
        model = load_model(config.model, machine.device).to(machine.dtype)
        if config.int8:
            quantize(model)
        elif machine.device.type == "cpu" and (config.num_samples, config.dtype) == (1, "float32"):
            by_columns(model)
        if note := cut_note(model, prompt):
            print(note, file=sys.stderr)
        texts, live = [prompt] * config.num_samples, sys.stdout.isatty()
        for i, pieces in enumerate(continuations(model, prompt, config)):
            if live:
                print(pieces[0] if i else prompt + pieces[0], end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print("" if live else texts[0])
        for text in texts[1:]:
            print("-" * 80, text, sep="\n")


def main() -> None:
    with quiet_interrupt():
        run_command(SampleConfig, sample)


if __name__ == "__main__":
    main()
