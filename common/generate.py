"""Text from a model: the KV cache and the sampling loop.

A language model gives probabilities for the next token. To write text, choose a token, append it,
and ask again. Shapes as in train_gpt2.py; B is the number of samples.
"""

import codecs
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import ranks
from common.hardware import attention_for_any_shape
from common.parallel import evaluating, is_sharded
from common.tokenizer import EOT, encode, encode_prompt, get_tokenizer


class LayerCache:
    """The keys and values of one layer for all tokens so far (the KV cache).

    Attention is causal: a new token does not change what earlier tokens have computed. The new
    query needs their keys and values, so these are kept. A new token then costs one
    position instead of the whole text. In float32, GPT-2 124M keeps 74 KB a token.
    """

    def __init__(self, room: int):
        self.room, self.used = room, 0  # in tokens; memory for all of them is taken once

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, nh, T, hs); return all so far (B, nh, used, hs)."""
        B, nh, T, hs = k.shape
        if self.used == 0:
            self.keys, self.values = (k.new_empty(B, nh, self.room, hs) for _ in range(2))
        start, self.used = self.used, self.used + T
        self.keys[:, :, start : self.used] = k
        self.values[:, :, start : self.used] = v
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def repeat(self, B: int) -> None:
        """Copy the one row of the prompt for each of B samples."""
        self.keys, self.values = (t.repeat(B, 1, 1, 1) for t in (self.keys, self.values))


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """Return one token id (B,) for each row of logits (B, vocabulary).

    `temperature` 0 takes the most likely token; `top_k` 0 and `top_p` 1 choose among all tokens.
    """
    if temperature < 1e-6:  # the limit of the softmax below: all probability goes to the largest
        return logits.argmax(dim=-1)
    # Each of 50,000 unlikely tokens has little probability, but together they have some. In a long
    # text one of them is chosen sooner or later, and the model then continues from that mistake.
    # top_k removes them (Fan et al., 2018; GPT-2 paper: k = 40).
    values, ids = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)))
    # Logits are log-probabilities plus a constant. Dividing them by the temperature raises each
    # probability to the power 1/temperature: below 1 likely tokens gain, above 1 unlikely ones do.
    # The softmax ignores a constant, so subtract the maximum before: then nothing overflows.
    probs = F.softmax((values - values[:, :1]) / temperature, dim=-1)
    if top_p < 1:
        # How many tokens make sense differs: one after "New Yor", hundreds after "I saw a". top_k
        # is the same number everywhere. The nucleus is the likeliest tokens that together reach
        # top_p (Holtzman et al., 2020), so the token that crosses top_p is in it. topk has sorted
        # the tokens already, and multinomial needs no sum of 1.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= max(top_p, 1e-6), 0)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def stream(
    model: nn.Module,
    prompt: list[int],
    num_samples: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 42,
) -> Iterator[list[int | None]]:
    """Yield the next token id of every sample; None for a sample that has ended.

    <|endoftext|> ends a sample. It also replaces an empty prompt, because it comes before every
    document in training. If the prompt is longer than the context, only its end is read. Ids from
    50257 on are never chosen: GPT-2's tokenizer has no text for them. Raises ValueError if a token
    of the prompt is not in the model's vocabulary.
    """
    context, vocab_size = model.config.block_size, model.config.vocab_size
    prompt = (prompt or [EOT])[-context:]
    if max(prompt) >= vocab_size:
        raise ValueError(
            f"token {max(prompt)} of the prompt is not among the model's {vocab_size} tokens"
        )
    device = model.transformer.wpe.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    room = min(context, len(prompt) + max_new_tokens)
    idx = torch.tensor([prompt], device=device)  # (1, T): the prompt is read once for all samples
    new, ended = idx, torch.zeros(num_samples, dtype=torch.bool, device=device)
    caches: list[LayerCache] = []
    sharded = is_sharded(model)  # then a pass is work of all ranks, and they do equally many
    for _ in range(max_new_tokens):
        if caches and caches[0].used == context:
            # The context is full, and there is no vector for a further position. Dropping only the
            # oldest token would move all others to new positions: their keys and values would be
            # wrong, and every token would cost a whole context. So drop the oldest half and read
            # the newest half again: one extra position a token, on average.
            new, caches = idx[:, -max(1, context // 2) :], []
        if not caches:
            caches = [LayerCache(room) for _ in model.transformer.h]
        used = caches[0].used
        positions = torch.arange(used, used + new.size(1), device=device)
        # Only the last position predicts a token that we do not have yet.
        with attention_for_any_shape():
            x = model.hidden(new, positions, caches=caches)[:, -1]  # (B, C)
        # A resized or padded embedding has more rows than GPT-2 has tokens.
        logits = model.lm_head(x)[:, : min(vocab_size, EOT + 1)]  # (B, vocabulary)
        if len(idx) < num_samples:
            idx, logits = idx.expand(num_samples, -1), logits.expand(num_samples, -1)
            for cache in caches:
                cache.repeat(num_samples)
        choice = choose(logits, temperature, top_k, top_p, generator)
        ended |= choice == EOT
        yield [None if end else id for id, end in zip(choice.tolist(), ended.tolist(), strict=True)]
        if ended.all() and not sharded:
            return
        # An ended sample stays in the batch, because the others need it. It is not shown.
        new = choice[:, None]  # (B, 1)
        idx = torch.cat([idx[:, -context:], new], dim=1)


def generate(model: nn.Module, prompt: list[int], **settings: int | float) -> list[list[int]]:
    """Return a list of token ids for each continuation; for the settings see `stream`."""
    steps = list(stream(model, prompt, **settings))
    return [[id for id in sample if id is not None] for sample in zip(*steps, strict=True)]


def stream_text(model: nn.Module, prompt: str, **settings: int | float) -> Iterator[list[str]]:
    """Yield the next characters of every sample; for the settings see `stream`.

    A written <|endoftext|> in the prompt is the token. Raises ValueError if the model has fewer
    tokens than GPT-2: its ids are those of another tokenizer.
    """
    tokenizer, size = get_tokenizer(), model.config.vocab_size
    if size <= EOT:
        raise ValueError(f"vocab_size {size}: text needs GPT-2's {EOT + 1} tokens")
    decoders = []  # a character may need several tokens: its decoder waits for all its bytes
    for ids in stream(model, encode_prompt(prompt).tolist(), **settings):
        decoders = decoders or [codecs.getincrementaldecoder("utf-8")("replace") for _ in ids]
        pieces = [b"" if id is None else tokenizer.decode_single_token_bytes(id) for id in ids]
        yield [d.decode(piece) for d, piece in zip(decoders, pieces, strict=True)]
    yield [d.decode(b"", final=True) for d in decoders]


def sample_text(model: nn.Module, seed: int, autocast: torch.autocast | None = None) -> list[str]:
    """Return two continuations of a fixed prompt: samples of one run can be compared.

    All ranks must call it, because a sharded model needs all of them in every pass. They write the
    same text. Rank 0 alone needs the tokenizer, which it may have to download.
    """
    prompt = "Hello, I'm a language model,"
    ids = ranks.on_rank_0(lambda: encode(prompt).tolist())
    # not compiled: torch would compile again for every new length
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), autocast or nullcontext(), eager:
        rows = generate(model, ids, num_samples=2, max_new_tokens=32, seed=seed)
    return ranks.on_rank_0(lambda: [prompt + get_tokenizer().decode(row) for row in rows])
