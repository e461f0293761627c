"""The GPT-2 byte-pair encoding (BPE): from text to token ids and back."""

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tiktoken

EOT = 50256  # <|endoftext|>, the largest id; it comes before every document
EOT_TEXT = "<|endoftext|>"  # how people and programs write it

RANKS_PATH = Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@functools.cache
def get_tokenizer() -> "tiktoken.Encoding":
    """Return the GPT-2 encoding, read from assets/: nothing is downloaded.

    Raises ValueError if the file of merge ranks is not the one that OpenAI published.
    """
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    if hashlib.sha256(RANKS_PATH.read_bytes()).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_PATH} is damaged: restore it with `git checkout {RANKS_PATH}`")
    return tiktoken.Encoding(
        name="gpt2",
        # How GPT-2 splits text into words, numbers, punctuation and white space. The possessive
        # form (++), which tiktoken uses too, gives the same pieces without backtracking.
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"""
        r"""| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=load_tiktoken_bpe(str(RANKS_PATH)),
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=50257,
    )


# Places where a text can be cut without changing its tokens. GPT-2's split never puts white space
# after another character in the same piece, and it splits a run of blanks before the last blank.
# tiktoken's regular expressions do not count \x1c-\x1f as white space, so \s without them.
SPACE = r"[^\S\x1c-\x1f]"
SAFE_CUT = re.compile(rf"(?<=\S)(?={SPACE})|(?<={SPACE})(?={SPACE}\S)")
PART_CHARS = 1 << 18  # tiktoken fails on a million blanks, and needs ten bytes for each character


def encode(text: str) -> np.ndarray:
    """Return the tokens of one document (uint16), equal to `encode_ordinary` of the whole text.

    <|endoftext|> in the text is ordinary text. Long texts are tokenised in parts.
    """
    tokenizer, parts, start = get_tokenizer(), [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + PART_CHARS)
        part = text[start : cut.start() if cut else len(text)]
        start += len(part)
        try:
            tokens = tokenizer.encode_to_numpy(part, disallowed_special=())  # no list: 10% faster
        except UnicodeEncodeError:  # half a surrogate pair, possible in JSON: becomes U+FFFD
            tokens = np.array(tokenizer.encode_ordinary(part))
        parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def encode_prompt(text: str) -> np.ndarray:
    """Return the tokens of a prompt (uint16). A written <|endoftext|> is the token of that name."""
    first, *others = (encode(part) for part in text.split(EOT_TEXT))
    pieces = [piece for part in others for piece in (np.array([EOT], np.uint16), part)]
    return np.concatenate([first, *pieces])


# White space in UTF-8 that is not ASCII. A text may not be cut after it: see SAFE_CUT.
WIDE_SPACE = (
    rb"\xc2\x85", rb"\xc2\xa0", rb"\xe1\x9a\x80", rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]",
    rb"\xe2\x81\x9f", rb"\xe3\x80\x80",
)  # fmt: skip
TEXT_CUT = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?=[\t-\r ])(?<!<\|endoftext\|>)"
    + b"".join(rb"(?<!%b)" % space for space in WIDE_SPACE)
)


def text_cut(text: bytes, start: int) -> int | None:
    """Return the first place from `start` on where UTF-8 text can be cut; None if there is none.

    The tokens of both parts together are those of the whole. A cut lies before white space and
    after another character, so no part but the last ends in white space. It is never right after
    a written <|endoftext|>.
    """
    cut = TEXT_CUT.search(text, start)
    return cut.start() if cut else None
