"""
The time per token of sampling at batch 1, and the effect of 8-bit weights on the loss:

    python benchmarks/sample_speed.py [ROUNDS] [TOKENS]
    python benchmarks/sample_speed.py CHECKPOINT.pt DATA_DIR

A round runs every variant once, so a busy machine slows all of them down: read the ratios.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.generate import LayerCache, generate
from sample import by_columns, model_bytes, quantize
from train_gpt2 import GPT, GPTConfig, Windows, load_model

PROMPT = list(range(1000, 1032))


def speed(rounds: int, tokens: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50304)).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {n: p.t() if n.endswith(linear) else p for n, p in model.named_parameters()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    variants = {
        "float32": by_columns(copy.deepcopy(model)),
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "int8": quantize(copy.deepcopy(model)),
    }

    def run(name: str, count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        if name == "transformers":
            new = theirs.generate(
                torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)),
                max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(PROMPT) :].tolist()  # fmt: skip
        else:
            (new,) = generate(variants[name], PROMPT, max_new_tokens=count, temperature=0)
        assert len(new) == count, f"{name}: {len(new)} tokens"
        return time.perf_counter() - start, new

    names = ["transformers", *variants]
    first = {name: run(name, tokens)[1] for name in names}  # warms up
    print(f"greedy float32 equal to transformers: {first['float32'] == first['transformers']}")
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            read = run(name, 1)[0]  # the prompt and one token
            times[name].append((run(name, tokens + 1)[0] - read) / tokens)
    full = model_bytes(model)
    print("variant       best ms/token   median   speed, median of ratios to float32   memory")
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(times["float32"], times[name], strict=True))
        memory = model_bytes(variants.get(name, theirs)) / full
        best, median = min(times[name]) * 1e3, statistics.median(times[name]) * 1e3
        print(f"{name:13} {best:13.1f} {median:8.1f} {ratio:37.2f} {memory:8.3f}")


@torch.no_grad()
def losses(checkpoint: str, data_dir: str, count: int = 100_000) -> None:
    model = load_model(checkpoint)
    T = model.config.block_size
    windows = Windows(Path(data_dir), "val", T, model.config.vocab_size)
    x, y = windows.read(torch.arange(min(len(windows), -(-count // T))).numpy())
    variants = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    variants["int8"] = quantize(copy.deepcopy(model))
    base = None
    for name, m in variants.items():
        # int8 uses another kernel for up to 8 tokens: measure both
        for stepwise in (False, True)[: 1 + (name == "int8")]:
            total = 0.0
            for a, b in zip(x.split(8), y.split(8), strict=True):
                logits = logits_in_steps(m, a) if stepwise else m(a)
                logits = logits[..., : m.config.vocab_size].float().flatten(0, 1)
                total += F.cross_entropy(logits, b.flatten(), reduction="sum").item()
            loss = total / y.numel()
            base = base or loss
            way = "token by token" if stepwise else "whole rows"
            print(f"{name:9} {way:15} loss {loss:.5f}  {100 * (loss / base - 1):+.3f}%", flush=True)
    print(f"{y.numel():,} tokens of {data_dir}, {checkpoint}")


def logits_in_steps(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V), computed one token at a time, as in sampling."""
    caches = [LayerCache(x.size(1)) for _ in model.transformer.h]
    steps = [
        model.lm_head(model.hidden(x[:, t : t + 1], torch.tensor([t]), caches=caches))
        for t in range(x.size(1))
    ]
    return torch.cat(steps, dim=1)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".pt"):
        losses(*sys.argv[1:])
    else:
        speed(*map(int, [*sys.argv[1:], "10", "48"][:2]))
