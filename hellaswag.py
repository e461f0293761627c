"""
HellaSwag: which of four endings continues a text? (Zellers et al., 2019)

    python hellaswag.py                                     # the newest checkpoint, else gpt2
    python hellaswag.py --model gpt2-xl --style harness     # as lm-evaluation-harness asks
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model log/ckpt_019073.pt

A model's choice is the ending with the smallest loss: the sum over its tokens (acc), or that sum
divided by the ending's length (acc_norm). A context is computed once for its four endings. They
follow it in one row, and a mask hides them from each other. The output head is a third of the
work, so it runs only at positions that predict a token of an ending.

Shapes: B rows of a batch, T tokens of a row, N predicted tokens of a batch, C width of the model.
"""

import gzip
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import parallel, ranks
from common.cli import advice, outlive_console, quiet_interrupt, run_command
from common.files import write_atomically
from common.hardware import Device, Dtype, OutOfMemory, attention_for_any_shape
from common.significance import plus_minus, standard_error
from common.tokenizer import EOT, encode
from common.weights import find_model

# -----------------------------------------------------------------------------
# configuration

Style = Literal["completion", "harness"]


@dataclass(frozen=True, kw_only=True)
class HellaSwagConfig:
    """Score a model on HellaSwag."""

    # checkpoint, run folder, Hugging Face folder, safetensors file or hub name (left out: the
    # newest checkpoint under log/, else gpt2)
    model: str | None = None
    style: Style = "completion"  # harness: text and normalisation of lm-evaluation-harness
    # examples: JSON lines, also .gz, or parquet (left out: the validation set, downloaded once)
    data: Path | None = None
    limit: int | None = None  # score only the first N examples
    device: Device = "auto"  # where to run
    dtype: Dtype = "auto"  # for matrix products
    out: Path | None = None  # JSON lines: one for each example, and a last one with the summary

    def __post_init__(self) -> None:
        if self.limit is not None and not 1 <= self.limit < 2**31:
            raise ValueError(f"--limit {self.limit}: give a number from 1 up to 2^31")


# -----------------------------------------------------------------------------
# the data

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
SIZE = 12_246_618  # bytes
MAX_LINE = 20_000  # bytes; the longest real line has 2,096


def ensure_data(path: Path | None = None) -> Path:
    """Return the file of examples: `path`, or the validation set in the cache.

    Downloads the set if it is not cached or damaged. Raises FileNotFoundError if `path` does not
    exist, OSError if the download fails.
    """
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return path
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "hellaswag", "hellaswag_val.jsonl")
    try:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
            return path
        with urllib.request.urlopen(URL, timeout=30) as response:
            data = response.read(SIZE + 1)
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise OSError("the download is damaged")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise OSError(f"HellaSwag cannot be downloaded to {path} ({reason})") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path.parent} cannot be made ({error.strerror})") from None
    write_atomically(path, data)
    return path


class Question(NamedTuple):
    """One example as tokens."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # of the endings, for acc_norm
    label: int  # index of the true ending


class Questions(NamedTuple):
    """Examples, and the style in which they are asked."""

    style: Style
    items: list[Question]


def load_questions(path: Path, style: Style, limit: int | None = None) -> Questions:
    """Read and tokenise the examples: JSON lines, plain or gzipped, or the hub's parquet.

    Raises ValueError with the number of the line or row if it is damaged, OSError if the file
    cannot be read.
    """
    make_question, items = {"completion": as_completion, "harness": as_harness}[style], []
    try:
        for where, example in itertools.islice(read_examples(path), limit):
            try:
                items.append(make_question(check_example(example)))
            except (ValueError, RecursionError) as error:  # RecursionError: [[[[[[...
                reason = str(error).split(": line 1 column")[0]
                what = f"{path}: {where} is not a HellaSwag example ({reason})"
                raise ValueError(f"{what}: correct it, or leave out --data") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be read ({reason}): check --data") from None
    if not items:
        raise ValueError(f"{path} holds no examples: give another file with --data")
    return Questions(style, items)


def read_examples(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yield where each example is, and the example: a line of JSON or a row of parquet."""
    with open(path, "rb") as file:
        start = file.peek(4)  # not read(4): a pipe cannot go back
        if start.startswith(b"PAR1"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                batches = pq.ParquetFile(file).iter_batches()
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            except pa.ArrowException as error:
                raise OSError(str(error)) from None
            return
        lines = gzip.GzipFile(fileobj=file) if start.startswith(b"\x1f\x8b") else file
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), 1):
            if not line.isspace():
                yield f"line {number}", line


def check_example(example: bytes | dict[str, Any]) -> dict[str, Any]:
    """Return an example whose fields are all checked. Raises ValueError that says what is wrong."""
    if isinstance(example, bytes):
        if len(example) > MAX_LINE:
            raise ValueError(f"longer than {MAX_LINE:,} bytes")
        example = json.loads(example.decode("utf-8-sig").rstrip("\n"))  # sig: saved on Windows
    if not isinstance(example, dict):
        raise ValueError("not a JSON object")
    for name in "activity_label", "ctx", "ctx_a", "ctx_b":
        if not isinstance(example.get(name), str):
            raise ValueError(f"{name} is not a string" if name in example else f"no {name}")
    endings = example.get("endings")
    if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * 4:
        raise ValueError("endings is not a list of four strings")
    if str(example.get("label")) not in ("0", "1", "2", "3"):
        raise ValueError("label is not 0, 1, 2 or 3")
    return example


def as_completion(example: dict[str, Any]) -> Question:
    """Let the model complete the context. A blank begins each ending; lengths are in tokens."""
    endings = [encode(" " + ending).tolist() for ending in example["endings"]]
    context = encode(example["ctx"]).tolist() or [EOT]
    return Question(context, endings, [len(e) for e in endings], int(example["label"]))


def as_harness(example: dict[str, Any]) -> Question:
    """Ask as the task `hellaswag` of lm-evaluation-harness does; lengths are in characters."""
    setting = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context = clean(example["activity_label"] + ": " + setting)
    texts = [clean(ending) for ending in example["endings"]]
    # An ending is the tokens of the whole text after those of the context. Blanks between the two
    # belong to the ending.
    ids = encode(context.rstrip()).tolist()
    wholes = [encode(f"{context} {text}").tolist() for text in texts]
    endings = [whole[min(len(ids), len(whole) - 1) :] for whole in wholes]
    return Question(ids or [EOT], endings, [len(t) or 1 for t in texts], int(example["label"]))


def clean(text: str) -> str:
    """Remove the markers of WikiHow's headings and steps, such as [step]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^]\n]*\]", "", text).replace("  ", " ")


# -----------------------------------------------------------------------------
# scoring


class Row(NamedTuple):
    """A context with endings behind it, and the places that predict the tokens of the endings."""

    tokens: list[int]  # T
    positions: list[int]  # T; each ending continues the positions of the context
    parts: list[int]  # T; 0 in the context, 1 in the first ending, ...
    sources: list[int]  # N; index in the row of the token that predicts
    targets: list[int]  # N; token to predict
    endings: list[int]  # N; ending of the target: 4 * example + 0, 1, 2 or 3


def make_row(context: list[int], endings: dict[int, list[int]]) -> Row:
    """Return the row of a context and its endings; `endings` maps an ending's number to tokens."""
    tokens, positions, parts = list(context), list(range(len(context))), [0] * len(context)
    sources, targets, numbers = [], [], []
    for part, (number, ending) in enumerate(endings.items(), 1):
        # The context's last token predicts the first token of each ending. An ending's last token
        # predicts nothing, so it is left out.
        sources += [len(context) - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]
        targets += ending
        numbers += [number] * len(ending)
        tokens += ending[:-1]
        positions += range(len(context), len(context) + len(ending) - 1)
        parts += [part] * (len(ending) - 1)
    return Row(tokens, positions, parts, sources, targets, numbers)


def make_batches(questions: list[Question], block_size: int, max_tokens: int) -> list[list[Row]]:
    """Return batches of at least one row and, unless that is longer, at most `max_tokens` tokens.

    Padding counts, so rows of similar length share a batch. If a question does not fit into
    `block_size`, each ending gets its own row. If that is still too long, its beginning is cut.
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


# Tokens of a batch with padding: enough for full speed. Larger batches need more padding on a CPU
# (5% at 2048 and 8% at 4096, for 200 examples) and more memory on a GPU.
CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 1024, 16384
HEAD_ROWS = 1024  # the logits of this many positions are in memory at a time: 0.2 GB in float32


def token_losses(model: nn.Module, batch: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the loss of every predicted token of a batch, and its ending's number: (N,) each."""
    columns = [[torch.tensor(values) for values in column] for column in zip(*batch, strict=True)]
    tokens, positions, parts = (
        pad_sequence(column, batch_first=True, padding_value=pad).to(device)
        for column, pad in zip(columns[:3], (0, 0, -1), strict=True)
    )  # (B, T)
    columns[3] = [sources + i * tokens.size(1) for i, sources in enumerate(columns[3])]
    sources, targets, endings = (torch.cat(column).to(device) for column in columns[3:])  # (N,)
    # A token sees only tokens before it: those of the context and of its own ending. Padding also
    # sees the context, because attention to nothing gives NaN.
    mask = ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None])).tril()  # (B, T, T)
    x = model.hidden(tokens, positions, mask[:, None]).flatten(0, 1)  # (B*T, C)
    x, losses = x[sources], []  # (N, C)
    for part, y in zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        # All ids that the model has, as lm-evaluation-harness and transformers do: those from 50257
        # on took part in the softmax in training. Only the padding of memory stays out.
        logits = model.lm_head(part)[:, : model.config.vocab_size].float()
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    return torch.cat(losses), endings


@torch.no_grad()
def ending_losses(
    model: nn.Module, questions: Questions, machine: Any, signals: Sequence[int] = ()
) -> Tensor:
    """Return the loss of every ending, summed over its tokens: (n, 4), the same on every rank.

    Batches are made first and then shared out to the ranks, so the result does not depend on the
    number of ranks. Raises ValueError if the model's vocabulary is too small, and StopAsked, on all
    ranks, if a signal has arrived on one of them.
    """
    from tqdm import tqdm

    items, config, device = questions.items, model.config, machine.device
    if config.vocab_size <= EOT:
        raise ValueError(
            f"vocab_size {config.vocab_size}: HellaSwag needs GPT-2's tokens: give another model"
        )
    max_tokens = CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
    batches = make_batches(items, config.block_size, max_tokens)
    own = batches[machine.rank :: machine.world_size]
    # A sharded model's passes are work of all ranks together: as many on every rank. A rank without
    # a last batch does one that does not count.
    own += [[]] * (math.ceil(len(batches) / machine.world_size) - len(own))
    dtype = torch.float32 if device.type == "mps" else torch.float64  # sums reach hundreds of nats
    losses = torch.zeros(4 * len(items), dtype=dtype, device=device)
    hidden = None if machine.is_main else True  # None: a progress bar on terminals only
    # every batch has another shape: a compiled model would be compiled again for each
    eager = torch.compiler.set_stance("force_eager")
    with parallel.evaluating(model, signals) as passes, machine.autocast, eager:
        for batch in passes(tqdm(own, desc="HellaSwag", leave=False, disable=hidden)):
            with attention_for_any_shape():
                of_tokens, endings = token_losses(model, batch or batches[0], device)
            if batch:
                losses.index_add_(0, endings, of_tokens.to(dtype))
    if machine.world_size > 1:
        dist.all_reduce(losses)
    return losses.view(-1, 4).cpu()


def choices(questions: Questions, losses: Tensor) -> tuple[list[int], list[int]]:
    """Return each question's ending with the smallest loss: by sum, and by sum / length."""
    lengths = torch.tensor([q.lengths for q in questions.items])
    return losses.argmin(1).tolist(), (losses / lengths).argmin(1).tolist()


def summarize(questions: Questions, losses: Tensor) -> dict[str, Any]:
    """Return style, acc and acc_norm with their standard errors, and n."""
    n, labels = len(questions.items), [q.label for q in questions.items]
    result: dict[str, Any] = {"style": questions.style}
    for name, chosen in zip(("acc", "acc_norm"), choices(questions, losses), strict=True):
        result[name] = sum(map(int.__eq__, chosen, labels)) / n
        error = standard_error(result[name], n)
        result[f"{name}_stderr"] = error if math.isfinite(error) else None  # one example has none
    return result | {"n": n}


def score(
    model: nn.Module, questions: Questions, machine: Any, signals: Sequence[int] = ()
) -> dict[str, Any]:
    """Return style, acc, acc_norm, their standard errors and n, the same on every rank.

    Raises StopAsked, on all ranks, if a signal has arrived on one of them.
    """
    return summarize(questions, ending_losses(model, questions, machine, signals))


def questions_for_training(machine: Any) -> Questions | None:
    """Return the questions in completion style, or None, with a note, if they are not available.

    Rank 0 downloads and reads them for all ranks.
    """

    def load() -> Questions | None:
        try:
            return load_questions(ensure_data(), "completion")
        except OSError as error:
            machine.print(f"note: no HellaSwag in this run: {error}: put the file there yourself")
            return None

    return ranks.on_rank_0(load)


# -----------------------------------------------------------------------------
# the command


def find_questions(config: HellaSwagConfig, model: str) -> Questions:
    """Return the questions that are asked for, once it is clear that --out can be written."""
    out, what_to_do = config.out, "put the file there, or give one with --data"
    if out and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise ValueError(
            f"--out {out} cannot be written: give a file in a folder that you may write to"
        )
    taken = [Path(path) for path in (model, config.data) if path]
    taken += [file for path in taken if path.is_dir() for file in path.iterdir()]
    if out and out.exists() and any(path.exists() and out.samefile(path) for path in taken):
        raise ValueError(f"--out {out} is the model or the data itself: give another file")
    with advice("check --data" if config.data else what_to_do):
        path = ensure_data(config.data)
    return load_questions(path, config.style, config.limit)


def evaluate(config: HellaSwagConfig, machine: Any, load_model: Callable[..., nn.Module]) -> None:
    """Score a model, print the result, and write it to --out if given."""
    name = ranks.on_rank_0(find_model, config.model)
    questions = ranks.on_rank_0(find_questions, config, name)
    model = load_model(name, machine.device)
    start = time.perf_counter()
    losses = ending_losses(model, questions, machine)
    if not losses.isfinite().all():
        raise ValueError("some losses are not finite: try --dtype float32, or another --model")
    result = summarize(questions, losses) | {"seconds": time.perf_counter() - start}
    machine.print(
        f"HellaSwag, style {config.style}: acc {result['acc']:.4f}, acc_norm "
        f"{result['acc_norm']:.4f}{plus_minus(result['acc_norm_stderr'])} "
        f"({result['n']:,} examples, {result['seconds']:.1f} s)"
    )
    if config.out:
        chosen = zip(*choices(questions, losses), strict=True)
        lines = [
            {"index": i, "label": q.label, "losses": loss, "pred": pred, "pred_norm": pred_norm}
            for i, (q, loss, (pred, pred_norm)) in enumerate(
                zip(questions.items, losses.tolist(), chosen, strict=True)
            )
        ]
        lines.append(result | {"model": name})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with advice("make room, or give another --out"):
            ranks.on_rank_0(write_atomically, config.out, text.encode())


def main() -> None:
    # not at the top of this file: train_gpt2.py imports this file, to score the model in training
    from train_gpt2 import TrainConfig, load_model, set_up_machine

    def run(config: HellaSwagConfig) -> None:
        with (
            advice("give another --model, or --device cpu", OutOfMemory),
            set_up_machine(TrainConfig(device=config.device, dtype=config.dtype)) as machine,
        ):
            evaluate(config, machine, load_model)

    outlive_console("stderr")  # stdout is the result: it must not get lost
    with quiet_interrupt():
        run_command(HellaSwagConfig, run, ranks.fail)


if __name__ == "__main__":
    sys.modules["hellaswag"] = sys.modules["__main__"]  # train_gpt2 imports this copy, not a second
    main()
