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
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.cli import advice, run_command
from common.files import write_atomically
from common.hardware import Device, Dtype
from common.tokenizer import EOT, encode

# -----------------------------------------------------------------------------
# configuration

Style = Literal["completion", "harness"]


@dataclass(frozen=True, kw_only=True)
class HellaSwagConfig:
    """Score a model on HellaSwag."""

    model: str | None = None  # checkpoint, folder or hub name (the newest in log/, else gpt2)
    style: Style = "completion"  # harness: text and normalisation of lm-evaluation-harness
    data: Path | None = None  # hellaswag_val.jsonl (downloaded once to the cache folder)
    limit: int | None = None  # score only the first so many examples
    device: Device = "auto"  # where to run
    dtype: Dtype = "auto"  # of matrix products
    out: Path | None = None  # write one JSON line for each example and a last one with the summary

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}: make it 1 or more")
        if self.out and (self.out.is_dir() or not os.access(self.out.absolute().parent, os.W_OK)):
            raise ValueError(
                f"--out {self.out} cannot be written: name a file in a folder of yours"
            )


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
        if not path.exists():
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
            f"HellaSwag cannot be downloaded to {path} ({reason}): put the file there by hand, "
            "or name one with --data"
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
    example = json.loads(line.decode().rstrip("\n"))
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
    texts = [clean(ending) for ending in example["endings"]]
    # an ending is what the whole has beyond the context's tokens; blanks in between belong to it
    ids = encode(context.rstrip()).tolist()
    wholes = [encode(f"{context} {text}").tolist() for text in texts]
    endings = [whole[min(len(ids), len(whole) - 1) :] for whole in wholes]
    return Question(ids or [EOT], endings, [len(t) or 1 for t in texts], int(example["label"]))


def clean(text: str) -> str:
    """Take out the markers that WikiHow's headings and steps left in the text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^]\n]*\]", "", text).replace("  ", " ")


# -----------------------------------------------------------------------------
# scoring


class Row(NamedTuple):
    """A context and endings behind it, and where each token of an ending is predicted."""

    tokens: list[int]  # T of them
    positions: list[int]  # T; those of every ending go on from the context's
    parts: list[int]  # T; 0 in the context, 1 in the first ending, ...
    sources: list[int]  # N; index in the row that predicts
    targets: list[int]  # N; token to predict
    endings: list[int]  # N; ending it belongs to: 4 * example + 0, 1, 2 or 3


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
    return Row(tokens, positions, parts, sources, targets, numbers)


def make_batches(questions: list[Question], block_size: int, max_tokens: int) -> list[list[Row]]:
    """Make rows of all questions, sort them by length, and cut batches of `max_tokens`, padded.

    Where a row would outgrow `block_size`, each ending has its own; what is still too long loses
    its beginning.
    """
    rows = []
    for i, (context, endings, _, _) in enumerate(questions):
        if len(context) + sum(map(len, endings)) - 4 <= block_size:
            rows.append(make_row(context, {4 * i + j: e for j, e in enumerate(endings)}))
        else:
            for j, ending in enumerate(endings):
                tail, n = (context + ending)[-block_size - 1 :], min(len(ending), block_size)
                rows.append(make_row(tail[:-n], {4 * i + j: tail[-n:]}))
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    batches = []
    while rows:
        n = max(1, max_tokens // len(rows[0].tokens))
        batches.append(rows[:n])
        rows = rows[n:]
    return batches


# Tokens of a batch, padding included. Enough for full speed: more would be more padding on the CPU
# (5% at 2048 and 8% at 4096, of 200 examples), more memory on a GPU.
CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 1024, 16384
HEAD_ROWS = 1024  # logits of so many positions exist at a time: 0.2 GB in float32


def token_losses(model: nn.Module, batch: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the loss of every predicted token of a batch, and the ending it is of: (N,) each."""
    columns = [[torch.tensor(values) for values in column] for column in zip(*batch, strict=True)]
    tokens, positions, parts = (
        pad_sequence(column, batch_first=True, padding_value=pad).to(device)
        for column, pad in zip(columns[:3], (0, 0, -1), strict=True)
    )  # (B, T)
    columns[3] = [sources + i * tokens.size(1) for i, sources in enumerate(columns[3])]
    sources, targets, endings = (torch.cat(column).to(device) for column in columns[3:])  # (N,)
    # Causal, and of the other parts only the context. Padding too sees the context: a query that
    # sees nothing would be NaN.
    mask = ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None])).tril()  # (B, T, T)
    x = model.hidden(tokens, positions, mask[:, None]).flatten(0, 1)  # (B*T, C)
    x, losses = x[sources], []  # (N, C)
    for part, y in zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.lm_head(part)[:, : model.config.vocab_size].float()  # less the padded ids
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.cat(losses), endings


@torch.no_grad()
def ending_losses(model: nn.Module, questions: Questions, machine: Any) -> Tensor:
    """Return the summed loss (n, 4) of every question's endings, the same on every rank.

    Batches are formed first and dealt to the ranks afterwards, so that the number of ranks changes
    nothing. Raises ValueError if the model's vocabulary is too small.
    """
    from tqdm import tqdm

    items, config, device = questions.items, model.config, machine.device
    if config.vocab_size <= EOT:
        raise ValueError(f"vocab_size {config.vocab_size}: HellaSwag needs a model of GPT-2 tokens")
    max_tokens = CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
    batches = make_batches(items, config.block_size, max_tokens)[machine.rank :: machine.world_size]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # of sums of hundreds of nats
    losses = torch.zeros(4 * len(items), dtype=dtype, device=device)
    hidden = None if machine.is_main else True  # None: a bar on a terminal only
    training = model.training
    model.eval()
    # a compiled model would be compiled anew for the shape of every batch
    with machine.autocast, torch.compiler.set_stance("force_eager"):
        for batch in tqdm(batches, desc="HellaSwag", leave=False, disable=hidden):
            of_tokens, endings = token_losses(model, batch, device)
            losses.index_add_(0, endings, of_tokens.to(dtype))
    model.train(training)
    if machine.world_size > 1:
        dist.all_reduce(losses)
    return losses.view(-1, 4).cpu()


def choices(questions: Questions, losses: Tensor) -> tuple[list[int], list[int]]:
    """Return for each question the ending of the smallest loss: summed, and for its length."""
    lengths = torch.tensor([q.lengths for q in questions.items])
    return losses.argmin(1).tolist(), (losses / lengths).argmin(1).tolist()


def summarize(questions: Questions, losses: Tensor) -> dict[str, Any]:
    """Return style, acc, acc_norm and n."""
    n, labels = len(questions.items), [q.label for q in questions.items]
    acc, acc_norm = (
        sum(map(int.__eq__, chosen, labels)) / n for chosen in choices(questions, losses)
    )
    return {"style": questions.style, "acc": acc, "acc_norm": acc_norm, "n": n}


def score(model: nn.Module, questions: Questions, machine: Any) -> dict[str, Any]:
    """Return style, acc, acc_norm and n, the same on every rank."""
    return summarize(questions, ending_losses(model, questions, machine))


def questions_for_training(machine: Any) -> Questions | None:
    """Return the questions in completion style; None, said once, where they are not to be had.

    Rank 0 alone downloads them, the others wait.
    """
    missing = False
    if machine.is_main:
        try:
            ensure_data()
        except OSError as error:
            missing = True
            machine.print(f"note: no HellaSwag in this run: {error}")
    if machine.sum(missing):
        return None
    return load_questions(ensure_data(), "completion")


# -----------------------------------------------------------------------------
# the command


def evaluate(config: HellaSwagConfig, machine: Any, load_model: Callable[..., nn.Module]) -> None:
    """Score a model, print the result, and write it to a file if asked."""
    if machine.is_main:
        ensure_data(config.data)
    machine.sum(0)  # the other ranks wait for the download
    questions = load_questions(ensure_data(config.data), config.style, config.limit)
    model = load_model(config.model, machine.device)
    start = time.perf_counter()
    losses = ending_losses(model, questions, machine)
    if not losses.isfinite().all():
        raise ValueError("some losses are not finite: try --dtype float32, or another --model")
    result = summarize(questions, losses) | {"seconds": time.perf_counter() - start}
    machine.print(
        f"HellaSwag, style {config.style}: acc {result['acc']:.4f}, acc_norm "
        f"{result['acc_norm']:.4f} ({result['n']:,} examples, {result['seconds']:.1f} s)"
    )
    if config.out and machine.is_main:
        chosen = zip(*choices(questions, losses), strict=True)
        lines = [
            {"index": i, "label": q.label, "losses": loss, "pred": pred, "pred_norm": pred_norm}
            for i, (q, loss, (pred, pred_norm)) in enumerate(
                zip(questions.items, losses.tolist(), chosen, strict=True)
            )
        ]
        lines.append(result | {"model": config.model})
        with advice("make room, or give another --out"):
            write_atomically(config.out, "".join(json.dumps(x) + "\n" for x in lines).encode())


def main() -> None:
    # not at the top of this file: training imports it, to score the model while it learns
    from train_gpt2 import TrainConfig, load_model, set_up_machine

    def run(config: HellaSwagConfig) -> None:
        with set_up_machine(TrainConfig(device=config.device, dtype=config.dtype)) as machine:
            evaluate(config, machine, load_model)

    run_command(HellaSwagConfig, run)


if __name__ == "__main__":
    sys.modules["hellaswag"] = sys.modules["__main__"]  # train_gpt2 imports this copy, not a second
    main()
