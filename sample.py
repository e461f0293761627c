"""
Text from a trained GPT-2: `python sample.py`.
"""

import torch
import torch.nn.functional as F

from train_gpt2 import GPT


class LayerCache:
    """The keys and values that one layer has computed: each (B, nh, tokens so far, hs)."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        return k, v


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    num_samples: int = 1,
    max_new_tokens: int = 100,
    top_k: int = 50,
    seed: int = 42,
) -> list[list[int]]:
    """Return `num_samples` continuations of the prompt's token ids."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([prompt] * num_samples, device=device)
    caches = [LayerCache() for _ in model.transformer.h]
    positions = torch.arange(len(prompt), device=device)
    step = idx
    for _ in range(max_new_tokens):
        x = model.hidden(step, positions, caches=caches)[:, -1]
        logits = model.lm_head(x)[:, : model.config.vocab_size].float()
        values, ids = logits.topk(min(top_k, logits.size(-1)))
        choice = torch.multinomial(F.softmax(values, dim=-1), 1, generator=generator)
        step = ids.gather(1, choice)  # (B, 1)
        idx = torch.cat([idx, step], dim=1)
        positions = positions[-1:] + 1
    return [row[len(prompt) :] for row in idx.tolist()]
