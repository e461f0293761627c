"""The GPT-2 byte-pair encoding (BPE): from text to token ids and back."""

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from common.workers import resident_memory

if TYPE_CHECKING:
    import tiktoken

EOT = 50256  # <|endoftext|>, the largest id; it comes before every document
EOT_TEXT = "<|endoftext|>"  # how people and programs write it

RANKS_PATH = Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def read_ranks() -> bytes:
    """Return the file of merge ranks: a token in base64 and its rank on each line.

    Raises ValueError if it is not the one that OpenAI published.
    """
    data = RANKS_PATH.read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_PATH} is damaged: restore it with `git checkout {RANKS_PATH}`")
    return data


@functools.cache
def get_tokenizer() -> "tiktoken.Encoding":
    """Return the GPT-2 encoding, read from assets/: nothing is downloaded.

    Raises ValueError if the file of merge ranks is not the one that OpenAI published.
    """
    import tiktoken

    # tiktoken's own function for this prefers an old copy in the folder for temporary files
    lines = (line.split() for line in read_ranks().splitlines())
    return tiktoken.Encoding(
        name="gpt2",
        # How GPT-2 splits text into words, numbers, punctuation and white space. The possessive
        # form (++), which tiktoken uses too, gives the same pieces without backtracking.
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"""
        r"""| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=50257,
    )


# Places where a text can be cut without changing its tokens. GPT-2's split never puts white space
# after another character in the same piece, and it splits a run of blanks before the last blank.
# tiktoken's regular expressions do not count \x1c-\x1f as white space, so \s without them.
SPACE = r"[^\S\x1c-\x1f]"
SAFE_CUT = re.compile(rf"(?<=\S)(?={SPACE})|(?<={SPACE})(?={SPACE}\S)")
PART_CHARS = 1 << 18  # tiktoken fails on a million blanks, and needs ten bytes for each character


@functools.cache
def bytes_of_tokens() -> np.ndarray:
    """Return the bytes of text that each id stands for (uint16 ids, so 65536 of them).

    <|endoftext|>, and ids that GPT-2 does not have, stand for no text: 0.
    """
    sizes = np.zeros(1 << 16, np.int64)
    for token, rank in (line.split() for line in read_ranks().splitlines()):
        sizes[int(rank)] = len(base64.b64decode(token))
    return sizes


def count_bytes(ids: np.ndarray) -> int:
    """Return the bytes of text that token ids stand for, in UTF-8."""
    return int(bytes_of_tokens()[ids].sum())


def tiktoken_ids(text: str) -> np.ndarray:
    """Return tiktoken's tokens of a text that is not too long (uint16)."""
    tokenizer = get_tokenizer()
    try:
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())  # no list: 10% faster
    except UnicodeEncodeError:  # half a surrogate pair, possible in JSON: becomes U+FFFD
        tokens = np.array(tokenizer.encode_ordinary(text))
    return tokens.astype(np.uint16)


def encode(text: str, ids: Callable[[str], np.ndarray] = tiktoken_ids) -> np.ndarray:
    """Return the tokens of one document (uint16), equal to `encode_ordinary` of the whole text.

    <|endoftext|> in the text is ordinary text. Long texts are tokenised in parts, each by `ids`.
    """
    if len(text) <= PART_CHARS:
        return ids(text)
    parts, start = [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + PART_CHARS)
        part = text[start : cut.start() if cut else len(text)]
        start += len(part)
        parts.append(ids(part))
    return np.concatenate(parts)


def encode_prompt(text: str) -> np.ndarray:
    """Return the tokens of a prompt (uint16). A written <|endoftext|> is the token of that name."""
    first, *others = (encode(part) for part in text.split(EOT_TEXT))
    pieces = [piece for part in others for piece in (np.array([EOT], np.uint16), part)]
    return np.concatenate([first, *pieces])


# -----------------------------------------------------------------------------
# a second engine: gigatoken gives the same ids, twenty times as fast

Engine = Literal["gigatoken", "tiktoken"]

# Letters and numbers of Unicode 17, which gigatoken knows and tiktoken does not. How a text is cut
# into pieces depends on what is a letter. So texts with such characters are left to tiktoken.
UNICODE_17 = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959"
    "\U00010ec5-\U00010ec7\U00011db0-\U00011de9\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6"
    "\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff"
    "\U0002b73a-\U0002b73f\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
# How their UTF-8 begins. To look for the first byte alone, and then for this, is much faster.
UNICODE_17_BYTES = {
    b"\xe0": re.compile(rb"\xe0(?:\xa2\x8f|[\xb1\xb3]\x9c)"),
    b"\xea": re.compile(rb"\xea\x9f"),
    b"\xf0": re.compile(rb"\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]"),
}


class GigatokenError(Exception):
    """gigatoken fails, or gives other ids than tiktoken."""


class Gigatoken:
    """The GPT-2 encoding of gigatoken.

    It remembers the ids of every word it has seen. For each byte of English that takes a quarter of
    a byte of memory, for random letters twelve. So it begins anew from time to time.
    """

    MOST_MEMORY = 64 << 20  # bytes that it may add to this process
    MOST_CHARS = 16 << 20  # instead, where the memory of a process is not known

    def __init__(self):
        read_ranks()  # raises if they are damaged
        self.begin()

    def begin(self) -> None:
        import gigatoken

        self.tokenizer = gigatoken.Tokenizer.from_tiktoken(RANKS_PATH, pretokenizer="gpt2")
        self.chars, self.look_at, self.memory = 0, 1 << 20, 0

    def ids(self, text: str) -> np.ndarray:
        """Return the tokens of a text (uint16). Raises GigatokenError."""
        try:
            return self.encode(text)
        except BaseException as error:  # whatever it is (Rust's panic is no Exception)
            raise GigatokenError(f"gigatoken fails ({one_line(error)})") from None

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text. It may raise anything, even what is no Exception."""
        self.chars += len(text)
        if self.chars >= self.look_at:
            self.look_at = self.chars + (1 << 20)
            now = resident_memory()
            self.memory = self.memory or now  # the first time: by now all libraries are loaded
            grown = now - self.memory > self.MOST_MEMORY if now else self.chars > self.MOST_CHARS
            if grown:
                self.begin()
        if text.isascii():
            return self.tokenizer.encode(text).astype(np.uint16)
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return tiktoken_ids(text)
        likely = any(byte in data and rest.search(data) for byte, rest in UNICODE_17_BYTES.items())
        if likely and UNICODE_17.search(text):
            return tiktoken_ids(text)
        return self.tokenizer.encode(data).astype(np.uint16)


get_gigatoken = functools.cache(Gigatoken)


def engine_ids(engine: Engine) -> Callable[[str], np.ndarray]:
    """Return the function that `encode` gets for this engine. Raises GigatokenError."""
    if engine == "tiktoken":
        return tiktoken_ids
    try:
        return get_gigatoken().ids
    except BaseException as error:
        raise GigatokenError(f"gigatoken does not start ({one_line(error)})") from None


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def choose_engine() -> tuple[Engine, str]:
    """Return the fastest engine that can be imported here, and why it is not gigatoken."""
    try:
        from gigatoken import Tokenizer  # noqa: F401
    except (Exception, SystemExit) as error:  # not installed, or made for another system
        return "tiktoken", one_line(error)
    return "gigatoken", ""


# -----------------------------------------------------------------------------
# where bytes of a text can be cut

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
