"""
HellaSwag: which of four endings goes on from a text? (Zellers et al., 2019)

    python hellaswag.py                                     # the newest checkpoint, else gpt2
    python hellaswag.py --model gpt2-xl --style harness     # as lm-evaluation-harness asks
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model log/ckpt_019073.pt

A model is right where the true ending gets the smallest loss of the four: summed over its tokens
(acc), or divided by its length (acc_norm). A context is computed once for its four endings: they
lie behind it in one row, the mask hides them from one another, and the output head, a third of
the work, sees only the places where a token of an ending is predicted.

Shapes: B rows of a batch, T tokens of a row, N predicted tokens of a batch.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fineweb import EOT, encode, run_command, write_atomically
from train_gpt2 import GPT, Machine, TrainConfig, load_model, set_up_machine

# -----------------------------------------------------------------------------
# configuration

Style = Literal["completion", "harness"]


@dataclass(frozen=True, kw_only=True)
class HellaSwagConfig:
    """Score a model on HellaSwag."""

    model: str | None = None  # checkpoint, Hugging Face folder or hub name (newest in log/, or gpt2)
    style: Style = "completion"  # harness: text and normalisation of lm-evaluation-harness
    data: Path | None = None  # hellaswag_val.jsonl (downloaded once to the cache folder)
    limit: int | None = None  # score only the first so many examples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to run
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products
    out: Path | None = None  # write one JSON line for each example and a last one with the summary

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}: make it 1 or more")
        if self.out and (self.out.is_dir() or not os.access(self.out.absolute().parent, os.W_OK)):
            raise ValueError(f"{self.out} cannot be written: give --out a file in a folder of yours")


# -----------------------------------------------------------------------------
# the data

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
SIZE = 12_246_618  # bytes
MAX_LINE = 20_000  # bytes; the longest real line has 2,096


def ensure_data(path: Path | None = None) -> Path:
    """Return the file of examples: `path`, or the validation set, downloaded if it is not cached.

    Raises FileNotFoundError if there is no such file, OSError if the download fails.
    """
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file: check --data")
        return path
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "hellaswag", "hellaswag_val.jsonl")
    try:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
            return path
        with urllib.request.urlopen(URL, timeout=30) as response:
            data = response.read(SIZE + 1)
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise OSError("it arrived damaged")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise OSError(
            f"HellaSwag cannot be downloaded to {path} ({reason}): try again, or give --data"
        ) from None
    return path


class Question(NamedTuple):
    """One example as tokens."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, for acc_norm
    label: int  # index of the true ending


class Questions(NamedTuple):
    """Examples, and the style they are asked in."""

    style: Style
    items: list[Question]


def load_questions(path: Path, style: Style, limit: int | None = None) -> Questions:
    """Read and tokenise the examples, one JSON object a line.

    Raises ValueError that names the line where one is damaged, OSError if there is no file.
    """
    make_question, items = {"completion": as_completion, "harness": as_harness}[style], []
    try:
        with open(path, "rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                try:
                    items.append(make_question(parse_line(line)))
                except (ValueError, RecursionError) as error:  # the latter: [[[[[[...
                    reason = str(error).split(": line 1 column")[0]
                    what = f"{path}: line {number} is no HellaSwag example ({reason})"
                    raise ValueError(f"{what}: mend it, or leave out --data") from None
                if len(items) == limit:
                    break
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): check --data") from None
    if not items:
        raise ValueError(f"{path} holds no examples: name another file with --data")
    return Questions(style, items)


def parse_line(line: bytes) -> dict[str, Any]:
    """Return an example with all its fields checked; ValueError says what is wrong with it."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes")
    example = json.loads(line.decode())
    if not isinstance(example, dict):
        raise ValueError("not a JSON object")
    for name in "activity_label", "ctx", "ctx_a", "ctx_b":
        if not isinstance(example.get(name), str):
            raise ValueError(f"{name} is not a text" if name in example else f"it has no {name}")
    endings = example.get("endings")
    if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * 4:
        raise ValueError("endings is not a list of four texts")
    if str(example.get("label")) not in ("0", "1", "2", "3"):
        raise ValueError("label is not 0, 1, 2 or 3")
    return example


def as_completion(example: dict[str, Any]) -> Question:
    """Ask for the context and a blank to be completed; lengths are in tokens."""
    endings = [encode(" " + ending).tolist() for ending in example["endings"]]
    context = encode(example["ctx"]).tolist() or [EOT]
    return Question(context, endings, [len(e) for e in endings], int(example["label"]))


def as_harness(example: dict[str, Any]) -> Question:
    """Ask as lm-evaluation-harness does in its task `hellaswag`; lengths are in characters."""
    setting = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context = clean(example["activity_label"] + ": " + setting)
    stem = context.rstrip()  # GPT-2's tokens carry the blank before a word, so it goes to the ending
    texts, endings = [clean(ending) for ending in example["endings"]], []
    ids = encode(stem).tolist()
    for text in texts:
        whole = encode(f"{context} {text}").tolist()
        endings.append(whole[min(len(ids), len(whole) - 1) :])
    return Question(ids or [EOT], endings, [len(t) or 1 for t in texts], int(example["label"]))


def clean(text: str) -> str:
    """Take out the markers that WikiHow's headings and steps left in the text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^]\n]*\]", "", text).replace("  ", " ")


# -----------------------------------------------------------------------------
# scoring


class Row(NamedTuple):
    """A context and endings behind it, and where each token of an ending is predicted."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,) those of every ending go on from the context's
    parts: Tensor  # (T,) 0 in the context, 1 in the first ending, ...
    sources: Tensor  # (N,) index in the row that predicts
    targets: Tensor  # (N,) token to predict
    endings: Tensor  # (N,) ending it belongs to: 4 * example + 0, 1, 2 or 3


def make_row(context: list[int], endings: dict[int, list[int]]) -> Row:
    """Lay endings, given with their numbers, behind their context."""
    tokens, positions, parts = list(context), list(range(len(context))), [0] * len(context)
    sources, targets, numbers = [], [], []
    for part, (number, ending) in enumerate(endings.items(), 1):
        # the context's last token predicts an ending's first; an ending's last predicts nothing
        sources += [len(context) - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]
        targets += ending
        numbers += [number] * len(ending)
        tokens += ending[:-1]
        positions += range(len(context), len(context) + len(ending) - 1)
        parts += [part] * (len(ending) - 1)
    return Row(*map(torch.tensor, (tokens, positions, parts, sources, targets, numbers)))


def make_batches(questions: list[Question], block_size: int, max_tokens: int) -> list[list[Row]]:
    """Make rows of all questions, sort them by length, and cut batches of `max_tokens`, padded.

    What does not fit into `block_size` loses its beginning; its endings then have a row each, for
    they see different parts of the context.
    """
    rows = []
    for i, (context, endings, _, _) in enumerate(questions):
        if len(context) + max(map(len, endings)) - 1 <= block_size:
            rows.append(make_row(context, {4 * i + j: e for j, e in enumerate(endings)}))
        else:
            for j, ending in enumerate(endings):
                ending = ending[-block_size:]
                start = max(0, len(context) + len(ending) - 1 - block_size)
                rows.append(make_row(context[start:], {4 * i + j: ending}))
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    batches = []
    while rows:
        n = max(1, max_tokens // len(rows[0].tokens))
        batches.append(rows[:n])
        rows = rows[n:]
    return batches
