"""Text from a model: the KV cache and the sampling loop."""

import codecs
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.tokenizer import EOT, encode, get_tokenizer


class LayerCache:
    """The keys and values that one layer has computed, in room for all that will come."""

    def __init__(self, room: int):
        self.room, self.used = room, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, nh, T, hs) of keys and values; return all there are."""
        B, nh, T, hs = k.shape
        if self.used == 0:
            self.keys, self.values = (k.new_empty(B, nh, self.room, hs) for _ in range(2))
        start, self.used = self.used, self.used + T
        self.keys[:, :, start : self.used] = k
        self.values[:, :, start : self.used] = v
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def repeat(self, B: int) -> None:
        """Give each of B samples a copy of what one row has computed."""
        self.keys, self.values = (t.repeat(B, 1, 1, 1) for t in (self.keys, self.values))


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Return one token id (B,) for each row of logits (B, vocabulary)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)))
    # The largest is 0 before the division, so that no temperature makes it overflow.
    probs = F.softmax((values - values[:, :1]) / temperature, dim=-1)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def stream(
    model: nn.Module,
    prompt: list[int],
    num_samples: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 42,
) -> Iterator[list[int | None]]:
    """Yield the next token id of every sample, None for those that have ended.

    An empty prompt stands for <|endoftext|>, which also ends a sample. Of a prompt longer than the
    context, its end is read.
    """
    context, vocab_size = model.config.block_size, model.config.vocab_size
    prompt = (prompt or [EOT])[-context:]
    if max(prompt) >= vocab_size:
        raise ValueError(
            f"token {max(prompt)} of the prompt is beyond the model's {vocab_size}: "
            "give another prompt, or a model with GPT-2's vocabulary"
        )
    device = model.transformer.wpe.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    room = min(context, len(prompt) + max_new_tokens)
    idx = torch.tensor([prompt], device=device)  # read once for all samples
    new, ended = idx, torch.zeros(num_samples, dtype=torch.bool, device=device)
    caches: list[LayerCache] = []
    for _ in range(max_new_tokens):
        if caches and caches[0].used == context:
            # Full: start again from the newest half. Sliding by one token would move all of them
            # to other positions, so that nothing kept would hold; this costs one position a token.
            new, caches = idx[:, -max(1, context // 2) :], []
        if not caches:
            caches = [LayerCache(room) for _ in model.transformer.h]
        used = caches[0].used
        positions = torch.arange(used, used + new.size(1), device=device)
        x = model.hidden(new, positions, caches=caches)[:, -1]  # (B, C)
        logits = model.lm_head(x)[:, :vocab_size]  # the padded ids are none to choose
        if len(idx) < num_samples:
            idx, logits = idx.expand(num_samples, -1), logits.expand(num_samples, -1)
            for cache in caches:
                cache.repeat(num_samples)
        choice = choose(logits, temperature, top_k, generator)
        ended |= choice == EOT
        yield [None if end else id for id, end in zip(choice.tolist(), ended.tolist(), strict=True)]
        if ended.all():
            return
        new = choice[:, None]  # (B, 1)
        idx = torch.cat([idx[:, -context:], new], dim=1)


def generate(model: nn.Module, prompt: list[int], **settings: int | float) -> list[list[int]]:
    """Return the prompt's continuations, a list of token ids each; settings as of `stream`."""
    steps = list(stream(model, prompt, **settings))
    return [[id for id in sample if id is not None] for sample in zip(*steps, strict=True)]


def stream_text(model: nn.Module, prompt: str, **settings: int | float) -> Iterator[list[str]]:
    """Yield the next characters of every sample; settings as of `stream`."""
    tokenizer = get_tokenizer()
    if model.config.vocab_size > tokenizer.n_vocab:
        raise ValueError(f"{model.config.vocab_size} tokens are not GPT-2's: give another model")
    decoders = []  # a character may be spread over several tokens
    for ids in stream(model, encode(prompt).tolist(), **settings):
        decoders = decoders or [codecs.getincrementaldecoder("utf-8")("replace") for _ in ids]
        pieces = [b"" if id is None else tokenizer.decode_single_token_bytes(id) for id in ids]
        yield [d.decode(piece) for d, piece in zip(decoders, pieces, strict=True)]
    yield [d.decode(b"", final=True) for d in decoders]


def sample_text(model: nn.Module, seed: int) -> list[str]:
    """Return two continuations of a fixed prompt, so that those of a run can be compared."""
    prompt, training = "Hello, I'm a language model,", model.training
    ids = encode(prompt).tolist()
    model.eval()
    # not compiled: every new length would be compiled again
    with torch.compiler.set_stance("force_eager"):
        rows = generate(model, ids, num_samples=2, max_new_tokens=32, seed=seed)
    model.train(training)
    return [prompt + get_tokenizer().decode(row) for row in rows]
