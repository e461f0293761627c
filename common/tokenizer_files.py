"""GPT-2's tokenizer as the files of a Hugging Face folder: written, and recognised."""

import functools
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from common.tokenizer import EOT, EOT_TEXT, get_tokenizer

BYTEWISE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# These files are text, but tokens are bytes. GPT-2 writes each byte as a visible character: itself
# if it is visible in Latin-1, else the next free one from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHARACTERS = {byte: chr(byte) for byte in VISIBLE}
CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}


def write_token(token: bytes) -> str:
    """Return a token as these files spell it."""
    return "".join(CHARACTERS[byte] for byte in token)


def vocabulary() -> dict[str, int]:
    """Return the id of every token of GPT-2."""
    tokenizer = get_tokenizer()
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(EOT))
    return {write_token(token): i for i, token in enumerate(tokens)} | {EOT_TEXT: EOT}


# -----------------------------------------------------------------------------
# writing


def merges(tokens: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield, for each token longer than one byte, the two tokens that BPE merges into it.

    tiktoken's file lists the tokens by rank, without these pairs. To find a pair, run BPE on the
    token's own bytes, the merge of lowest rank first, and stop when two parts are left.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


@functools.cache  # it takes a second
def merge_lines() -> list[str]:
    """Return the merges of GPT-2 as merges.txt lists them."""
    tokens = [get_tokenizer().decode_single_token_bytes(i) for i in range(EOT)]
    return [f"{write_token(a)} {write_token(b)}" for a, b in merges(tokens)]


def tokenizer_files(block_size: int) -> dict[str, str]:
    """Return the files, by name, that make `AutoTokenizer` encode as `get_tokenizer()` does."""
    vocab, lines = vocabulary(), merge_lines()
    special = {"id": EOT, "content": EOT_TEXT, "special": True, "normalized": False}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    fast = {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": {**BYTEWISE, "use_regex": True},  # GPT-2's split into words
        "post_processor": {**BYTEWISE, "trim_offsets": False},
        "decoder": BYTEWISE,
        "model": {"type": "BPE", "vocab": vocab, "merges": lines},
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    # GPT-2 has no token for padding. With <|endoftext|>, texts of several lengths make one batch.
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    settings |= {**dict.fromkeys(names, EOT_TEXT), "add_prefix_space": False}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


# -----------------------------------------------------------------------------
# comparing

WITH_VOCABULARY = ("tokenizer.json", "vocab.json")
NEVER_GPT2 = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def find_other_tokenizer(
    find: Callable[[str], Path | None], without_files: str | None = None
) -> str | None:
    """Return the file with a tokenizer that is not GPT-2's, None if there is no such file.

    `find` gives the path of a model's file. `without_files` is the answer if it finds none. Raises
    ValueError if a file is damaged.
    """
    paths = {name: path for name in WITH_VOCABULARY if (path := find(name))}
    for name, path in paths.items():
        if not has_gpt2_tokens(path):
            return name
    return None if paths else next((name for name in NEVER_GPT2 if find(name)), without_files)


def has_gpt2_tokens(path: Path) -> bool:
    """Tell whether a tokenizer.json or vocab.json has GPT-2's tokens under GPT-2's ids.

    Tokens that somebody has added, from id 50257 on, change nothing. Raises ValueError if the file
    is damaged.
    """
    try:
        tokens = json.loads(path.read_bytes())
        if path.name == "tokenizer.json":
            added = {token["content"]: token["id"] for token in tokens.get("added_tokens") or ()}
            tokens = {**dict(tokens["model"]["vocab"]), **added}
        return {token: i for token, i in tokens.items() if i <= EOT} == vocabulary()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"{path} is not a tokenizer ({type(error).__name__})"
        raise ValueError(f"{what}: get the file again") from None
