"""
Text to token shards, with the GPT-2 BPE:

    python fineweb.py                                  FineWeb-Edu, 10 billion tokens, from the hub
    python fineweb.py --source 'corpus/*.parquet'      local .parquet, .jsonl, .txt (.gz, .zst too)
    python fineweb.py --source pydocs                  docstrings that this machine already has
    python fineweb.py --verify --out_dir DIR           check the shards in a folder

The source is cut into units: a run of parquet rows, a range of lines, a text file. Workers read and
tokenise one unit each; the main process takes their tokens in source order, packs them into shards
and writes these. The manifest records with every shard the place in the source where it ends, so the
same command carries on from there after any interruption, and can make one damaged shard again.
"""

import bisect
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pyarrow.parquet
    import tiktoken

# -----------------------------------------------------------------------------
# configuration

DEFAULT_DATASET, DEFAULT_NAME = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def count_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Turn text into shards of GPT-2 tokens."""

    source: str = "hub"  # hub, pydocs, or a file or glob of .parquet, .jsonl, .txt (also .gz, .zst)
    dataset: str = DEFAULT_DATASET  # data set on the hub
    name: str | None = None  # its configuration (default: sample-10BT, or the other data set's own)
    split: str = "train"  # its split
    text_column: str = "text"  # parquet column or JSON field that holds the text
    out_dir: Path | None = None  # (default: edu_fineweb10B, or data/<source> for other sources)
    shard_size: int = 100_000_000  # tokens in a shard
    max_tokens: int | None = None  # stop after so many tokens
    num_proc: int = field(default_factory=count_cores)  # worker processes (default: every core)
    format: Literal["npy", "bin"] = "npy"  # bin: the files of llm.c and modded-nanogpt
    retry_minutes: float = 30  # how long to keep trying while the hub does not answer
    verify: bool = False  # check the shards in out_dir against the manifest, and stop

    def __post_init__(self):
        for name, least in (
            ("shard_size", 2),
            ("max_tokens", 2),
            ("num_proc", 1),
            ("retry_minutes", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}: make it {least} or more")

    @property
    def config_name(self) -> str | None:
        return self.name or (DEFAULT_NAME if self.dataset == DEFAULT_DATASET else None)

    @property
    def folder(self) -> Path:
        if self.out_dir:
            return self.out_dir
        if self.source != "hub":
            path = Path(self.source).resolve()
            # corpus/*.parquet goes to data/corpus, corpus/books.jsonl.gz to data/books
            return Path(
                "data", path.parent.name if glob.has_magic(path.name) else path.name.split(".")[0]
            )
        if (self.dataset, self.config_name) == (DEFAULT_DATASET, DEFAULT_NAME):
            return Path("edu_fineweb10B")
        return Path("data", "-".join(filter(None, [self.dataset.split("/")[-1], self.config_name])))


# -----------------------------------------------------------------------------
# command line (shared by every script)

Config = TypeVar("Config")


def run_command(config_class: type[Config], run: Callable[[Config], None]) -> None:
    """Parse the command line into `config_class` and call `run` with it.

    A user's mistake (a flag tyro refuses; ValueError or OSError from the configuration or from
    `run`) becomes one line on stderr, `<script>: error: <what>: <what to do>`, and exit code 2.
    Under torchrun rank 0 alone prints it.
    """
    import tyro

    script = Path(sys.argv[0]).name
    complaint = io.StringIO()  # tyro draws its errors as a box: kept here, printed as a line
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_class, prog=script)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
        end = next((i for i, line in enumerate(lines) if line.startswith("──") or not line), None)
        _fail(script, " ".join(lines[1:end]).rstrip(".") + f": see python {script} --help")
    except ValueError as error:
        _fail(script, str(error))
    try:
        run(config)
    except (ValueError, OSError) as error:
        _fail(script, str(error))


def _fail(script: str, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# tokenizer

RANKS_PATH = Path(__file__).parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
EOT = 50256  # <|endoftext|>, put before every document


@functools.cache
def get_tokenizer() -> "tiktoken.Encoding":
    """Return the GPT-2 byte-pair encoding, read from assets/: nothing is ever downloaded.

    Raises ValueError if the file of merge ranks is not the one OpenAI published.
    """
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    if hashlib.sha256(RANKS_PATH.read_bytes()).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_PATH} is damaged: restore it with `git checkout {RANKS_PATH}`")
    return tiktoken.Encoding(
        name="gpt2",
        # GPT-2's own split into words, numbers, punctuation and white space, in the form without
        # backtracking that tiktoken uses for it
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=load_tiktoken_bpe(str(RANKS_PATH)),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )


# Where a text may be cut without changing its tokens: GPT-2's pattern never has white space after
# anything else in one piece, and takes a run of white space but for its last character as one piece.
# \s without \x1c-\x1f is what the tokenizer's own regex engine calls white space.
SPACE = r"[^\S\x1c-\x1f]"
SAFE_CUT = re.compile(rf"(?<=\S)(?={SPACE})|(?<={SPACE})(?={SPACE}\S)")
PART_CHARS = 1 << 18  # tiktoken gives up at a million blanks in a row, and needs 15 bytes a byte


def encode(text: str) -> np.ndarray:
    """Return the uint16 tokens of one document, as `encode_ordinary` gives them.

    Long texts go through the tokenizer in parts. `<|endoftext|>` in the text is ordinary text.
    """
    tokenizer, parts, start = get_tokenizer(), [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + PART_CHARS)
        part = text[start : cut.start() if cut else len(text)]
        start += len(part)
        try:
            tokens = tokenizer.encode_to_numpy(part, disallowed_special=())
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can have: U+FFFD instead
            tokens = np.array(tokenizer.encode_ordinary(part))
        parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


# -----------------------------------------------------------------------------
# packing


def pack_shards(
    documents: Iterable[np.ndarray | list[int]], shard_size: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yield shards of `shard_size` uint16 tokens; the last one has what is left.

    A document is its tokens, without <|endoftext|>: that is put before each here, before an empty
    one as well. `skip` leaves out so many tokens at the start. A full shard is yielded only once
    there is a token for the next, so the last shard is never empty.
    """
    shard, filled = np.empty(shard_size, np.uint16), 0
    for document in documents:
        for piece in np.array([EOT], np.uint16), np.asarray(document, np.uint16):
            piece, skip = piece[skip:], max(0, skip - len(piece))
            while len(piece):
                if filled == shard_size:
                    yield shard
                    shard, filled = np.empty(shard_size, np.uint16), 0
                room = shard_size - filled
                shard[filled : filled + len(piece)] = piece[:room]
                filled, piece = min(shard_size, filled + len(piece)), piece[room:]
    if filled:
        yield shard[:filled]


def take_tokens(documents: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield documents until, with the <|endoftext|> before each, they hold `count` tokens."""
    for document in documents:
        yield document[: count - 1]
        count -= 1 + len(document)
        if count <= 0:
            return


# -----------------------------------------------------------------------------
# sources

UNIT_BYTES = 2 << 20  # of text in a unit: 0.15 s of work, so that small sources use all cores
HUB_UNIT_BYTES = 16 << 20  # one request each: 3,000 for 10BT, what the hub grants in five minutes
BIG_ROW_GROUP = 64 << 20  # above this the main process reads the rows and hands them out as text
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PYDOCS_PACKAGES = ("numpy", "torch", "datasets")  # besides the standard library


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the documents come from: files in a fixed order, at a fixed revision."""

    kind: str  # hub, local or pydocs
    revision: str  # equal only if the text is equal
    files: tuple[tuple[str, int], ...]  # paths and sizes in bytes
    text_column: str
    dataset: str = ""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of one file that a worker turns into tokens.

    start and stop are rows of a parquet file, else bytes (of the text, where it is compressed).
    What only one process can read in turn comes along, as JSON lines or texts.
    """

    file: int
    start: int
    stop: int
    share: float  # of the file, for the progress bar
    lines: bytes | None = None
    texts: list[str | None] | None = None


def file_kind(path: str) -> tuple[str, str | None]:
    """Return the suffix that says how to read a file, and its compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = "".join(suffixes[-2:-1] if compression else suffixes[-1:])
    if kind not in (".jsonl", ".json", ".txt") and (kind, compression) != (".parquet", None):
        raise ValueError(
            f"{path}: fineweb.py reads .parquet, .jsonl and .txt (.gz, .zst): convert it"
        )
    return kind, compression


def find_files(config: DataConfig) -> Source:
    """Find the files of `--source PATH`, in sorted order."""
    paths = sorted(glob.glob(config.source, recursive=True)) or [config.source]
    fingerprint, files = hashlib.sha256(), []
    for path in paths:
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: name the files in it, as in '{path}/*.parquet'")
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file: check --source")
        file_kind(path)
        with open(path, "rb") as file:  # both ends and the size: a change rarely leaves all three
            size = os.fstat(file.fileno()).st_size
            fingerprint.update(f"{Path(path).name} {size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            fingerprint.update(file.read())
        files.append((path, size))
    return Source(
        kind="local",
        revision=fingerprint.hexdigest(),
        files=tuple(files),
        text_column=config.text_column,
    )


def open_file(source: Source, file: int) -> BinaryIO:
    """Open a file of the source for reading, wherever it is."""
    path, _ = source.files[file]
    if source.kind == "pydocs":
        return io.BytesIO(read_pydocs())
    return open(path, "rb")


@functools.lru_cache(maxsize=1)  # a worker reads one file for a long time
def open_parquet(source: Source, file: int) -> tuple["pyarrow.parquet.ParquetFile", list[int]]:
    """Open a parquet file; also return the row at which each row group starts."""
    import pyarrow
    import pyarrow.parquet

    path = source.files[file][0]
    try:
        parquet = pyarrow.parquet.ParquetFile(open_file(source, file), buffer_size=1 << 20)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): fetch it again") from None
    schema = parquet.schema_arrow
    if source.text_column not in schema.names:
        names = ", ".join(schema.names)
        raise ValueError(
            f"{path} has no column {source.text_column}: --text_column is one of {names}"
        )
    kind = schema.field(source.text_column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(
            f"{path}: column {source.text_column} is {kind}, not text: see --text_column"
        )
    rows = (parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
    return parquet, list(itertools.accumulate(rows, initial=0))


def parquet_texts(source: Source, file: int, start: int, stop: int) -> Iterator[list[str | None]]:
    """Yield the texts of rows start..stop, some at a time."""
    parquet, first_rows = open_parquet(source, file)
    group = bisect.bisect_right(first_rows, start) - 1
    groups = range(group, bisect.bisect_left(first_rows, stop))
    row = first_rows[group]
    batches = parquet.iter_batches(256, groups, columns=[source.text_column], use_threads=False)
    for batch in batches:
        rows = batch.column(0)[max(0, start - row) : stop - row]
        row += len(batch)
        if len(rows):
            yield rows.to_pylist()


def parquet_units(source: Source, file: int, start: int, unit_bytes: int) -> Iterator[Unit]:
    """Cut a parquet file into runs of row groups; hand out row groups that are too big as texts."""
    parquet, first_rows = open_parquet(source, file)
    schema, rows = parquet.metadata.schema, first_rows[-1]
    column = [schema.column(i).path for i in range(len(schema))].index(source.text_column)

    def unit(stop: int, texts: list[str | None] | None = None) -> Unit:
        return Unit(file=file, start=start, stop=stop, share=(stop - start) / rows, texts=texts)

    size = 0
    for group in range(bisect.bisect_right(first_rows, start) - 1, parquet.num_row_groups):
        first, stop = first_rows[group : group + 2]
        group_size = parquet.metadata.row_group(group).column(column).total_uncompressed_size
        if start < first and size + group_size > unit_bytes:
            yield unit(first)
            start, size = first, 0
        size += group_size
        if group_size > BIG_ROW_GROUP:
            texts, chars = [], 0
            for batch in parquet_texts(source, file, start, stop):
                texts += batch
                chars += sum(len(text or "") for text in batch)
                if chars > UNIT_BYTES or start + len(texts) == stop:
                    yield unit(start + len(texts), texts)
                    start, texts, chars = start + len(texts), [], 0
    if start < rows:
        yield unit(rows)


def stream_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut JSON lines that can only be read from the beginning into blocks of whole lines."""
    import pyarrow

    raw = open_file(source, file)
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    compression = file_kind(source.files[file][0])[1]
    stream = pyarrow.input_stream(raw, compression=compression) if compression else raw
    skip, seen, rest = start, 0, b""
    while block := stream.read(min(skip, UNIT_BYTES) or UNIT_BYTES):
        if skip:
            skip -= len(block)
            continue
        cut = block.rfind(b"\n") + 1
        lines, rest = (rest + block[:cut], block[cut:]) if cut else (b"", rest + block)
        if lines:
            share, seen = (raw.tell() - seen) / size, raw.tell()
            yield Unit(file=file, start=start, stop=start + len(lines), share=share, lines=lines)
            start += len(lines)
    if rest:
        yield Unit(file=file, start=start, stop=start + len(rest), share=0, lines=rest)


def source_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut the source into units, from a place where a unit starts on."""
    for at in range(file, len(source.files)):
        path, size = source.files[at]
        kind, compression = file_kind(path)
        unit_bytes = HUB_UNIT_BYTES if source.kind == "hub" else UNIT_BYTES
        if kind == ".parquet":
            yield from parquet_units(source, at, start, unit_bytes)
        elif kind == ".txt":
            yield Unit(file=at, start=0, stop=size, share=1)
        elif compression or source.kind == "pydocs":
            yield from stream_units(source, at, start)
        else:
            for begin in range(start, size, unit_bytes):
                stop = min(size, begin + unit_bytes)
                yield Unit(file=at, start=begin, stop=stop, share=(stop - begin) / size)
        start = 0


def json_texts(source: Source, unit: Unit) -> Iterator[str | None]:
    """Yield the text of each JSON line that begins in the unit."""
    path = source.files[unit.file][0]
    offset = unit.start
    with io.BytesIO(unit.lines) if unit.lines else open_file(source, unit.file) as file:
        if not unit.lines and offset:  # the line across the start belongs to the unit before
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < unit.stop and (line := file.readline()):
            try:
                row = json.loads(line) if line.strip() else {source.text_column: None}
            except ValueError as error:
                what = (
                    "is not UTF-8"
                    if isinstance(error, UnicodeDecodeError)
                    else "is cut off or damaged"
                )
                raise ValueError(
                    f"{path}: the JSON line at byte {offset} {what}: repair or remove it"
                ) from None
            if not isinstance(row, dict) or source.text_column not in row:
                names = ", ".join(row) if isinstance(row, dict) else "none: it is no object"
                raise ValueError(
                    f"{path}: the line at byte {offset} has no field {source.text_column}: --text_column is one of {names}"
                )
            text = row[source.text_column]
            yield text
            offset += len(line)


def unit_texts(source: Source, unit: Unit) -> Iterator[str | None]:
    """Yield the texts of a unit, None for a row that has none."""
    path = source.files[unit.file][0]
    kind, compression = file_kind(path)
    if unit.texts is not None:
        yield from unit.texts
    elif kind == ".parquet":
        for texts in parquet_texts(source, unit.file, unit.start, unit.stop):
            yield from texts
    elif kind == ".txt":
        import pyarrow

        with open_file(source, unit.file) as file:
            data = (
                pyarrow.input_stream(file, compression=compression) if compression else file
            ).read()
        if b"\0" in data:
            raise ValueError(f"{path} is not a text file (byte {data.index(0)} is 0): leave it out")
        try:
            yield data.decode() or None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {error.start}: convert it with iconv"
            ) from None
    else:
        yield from json_texts(source, unit)


# -----------------------------------------------------------------------------
# pydocs: the docstrings of the standard library and of this project's own requirements


def find_pydocs(config: DataConfig) -> Source:
    """Describe the embedded corpus by the versions that it is read from."""
    from importlib.metadata import version

    versions = [f"{name} {version(name)}" for name in PYDOCS_PACKAGES]
    revision = ", ".join([f"python {sys.version.split()[0]}", *versions])
    return Source(
        kind="pydocs", revision=revision, files=(("pydocs.jsonl", 1),), text_column="text"
    )


def read_pydocs() -> bytes:
    """Return one JSON line a module: its docstrings of more than three lines, without repeats.

    Modules are found and parsed, never imported, and come in a fixed shuffled order (by the sha256
    of their names), so that the first tenth of the tokens is a fair sample of all.
    """
    import importlib.util
    import sysconfig

    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in PYDOCS_PACKAGES]
    left_out = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
    modules = {}
    for root in roots:
        name = root.name if root is not roots[0] else "python"
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if left_out.isdisjoint(relative.parts):
                modules[f"{name}/{relative.as_posix()}"] = path
    names = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    with worker_pool(count_cores()) as pool:
        found = list(pool.map(docstrings, [modules[name] for name in names], chunksize=32))
    seen, lines = set(), []
    for texts in found:
        fresh = list(dict.fromkeys(text for text in texts if text not in seen))
        seen.update(fresh)
        if fresh:
            lines.append(json.dumps({"text": "\n\n".join(fresh)}) + "\n")
    return "".join(lines).encode()


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of more than three lines in a Python file, in their order."""
    import ast
    import warnings

    warnings.simplefilter("ignore")  # invalid escapes in old modules
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other versions
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return [text for text in texts if text and text.count("\n") >= 3]


# -----------------------------------------------------------------------------
# workers


def worker_pool(num_proc: int) -> ProcessPoolExecutor:
    """Start worker processes, in the one way that is the same on every system."""
    import multiprocessing

    return ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker)


def start_worker() -> None:
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    parent = multiprocessing.parent_process()  # workers must not outlive it, not even kill -9
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_unit(source: Source, unit: Unit) -> tuple[np.ndarray, int, int]:
    """Return a unit's documents as one array with EOT between them, their number, and of nulls."""
    parts, nulls = [], 0
    for text in unit_texts(source, unit):
        if text is None:
            nulls += 1
        else:
            parts += [np.array([EOT], np.uint16), encode(text)]
    tokens = np.concatenate(parts[1:]) if parts else np.empty(0, np.uint16)
    return tokens, len(parts) // 2, nulls


def retry(call: Callable[[], Any], minutes: float) -> Any:
    """Return call(); while it raises ConnectionError, go on trying with growing pauses."""
    give_up, pause = None, 1
    while True:
        try:
            return call()
        except (ConnectionError, TimeoutError) as error:
            give_up = give_up or time.monotonic() + 60 * minutes
            left = give_up - time.monotonic()
            if left < pause:
                raise ConnectionError(f"gave up after {minutes:g} minutes: {error}") from None
            say(f"{error}: trying again in {pause} s, for {left / 60:.0f} min more")
            time.sleep(pause)
            pause = min(60, 2 * pause)


class TokenStream:
    """The tokens of a source from some place on, a unit at a time, made by the workers of a pool.

    Up to `ahead` units are in flight, so memory is bounded; they come out in source order.
    """

    def __init__(self, config: DataConfig, source: Source, place: list[int], pool: Executor):
        file, start, self.skip = place  # skip: tokens of the first unit that are before the place
        self.source, self.pool, self.minutes = source, pool, config.retry_minutes
        self.ahead = 2 * config.num_proc + 2
        self.units = source_units(source, file, start)
        self.marks = [(0, file, start)]  # tokens before each unit, and where it starts
        self.drawn = self.nulls = 0
        self.read, self.to_read = 0.0, sum(size for _, size in source.files[file:])

    def __iter__(self) -> Iterator[np.ndarray]:
        flight, failed = deque(), False

        def first_result() -> tuple[np.ndarray, int, int]:
            nonlocal failed
            for item in flight if failed else ():  # send out again all that failed, at once
                if item[1].done() and item[1].exception():
                    item[1] = self.pool.submit(tokenize_unit, self.source, item[0])
            failed = True
            result = flight[0][1].result()
            failed = False
            return result

        while True:
            while len(flight) < self.ahead and (unit := next(self.units, None)):
                flight.append([unit, self.pool.submit(tokenize_unit, self.source, unit)])
            if not flight:
                return
            unit = flight[0][0]
            tokens, documents, nulls = retry(first_result, self.minutes)
            flight.popleft()
            self.marks.append((self.drawn, unit.file, unit.start))
            self.read += unit.share * self.source.files[unit.file][1]
            self.nulls += nulls
            if documents:
                self.drawn += 1 + len(tokens)
                yield tokens

    def expected_tokens(self) -> int:
        """Estimate the whole stream's tokens from the part of the source that has been read."""
        return int((self.drawn - self.skip) * max(1.0, self.to_read / (self.read or self.to_read)))

    def place(self, tokens: int) -> list[int]:
        """Return the place so many tokens into the stream; later calls must not go back."""
        del self.marks[: bisect.bisect_right(self.marks, (tokens, 1 << 62)) - 1]
        before, file, start = self.marks[0]
        return [file, start, tokens - before]


# -----------------------------------------------------------------------------
# the folder of shards

MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"


def say(message: str) -> None:
    """Print a line without tearing the progress bar."""
    from tqdm import tqdm

    tqdm.write(message)
    sys.stdout.flush()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go when it dies. Leave no empty folder."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): choose another --out_dir"
        ) from None
    try:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(f"{folder} is in use by another fineweb.py: wait for it") from None
        try:
            yield
        finally:
            lock.close()
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def write_atomically(path: Path, *parts: bytes | memoryview) -> str:
    """Write a file that is either whole or not there, whatever happens; return its sha256."""
    digest, temporary = hashlib.sha256(), path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(
                f"{path} cannot be written ({error.strerror}): make room and run the same command "
                "again, which carries on after the last whole shard"
            ) from None
        raise
    if os.name != "nt":  # the new name, too, is to survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return digest.hexdigest()


def shard_header(tokens: int, format: str) -> bytes:
    """Return what comes before the tokens in a shard."""
    if format == "bin":
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, tokens  # llm.c: magic, version, number of tokens
        return header.tobytes()
    header = io.BytesIO()
    layout = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def shard_bytes(tokens: np.ndarray, format: str) -> tuple[bytes, memoryview]:
    """Return a shard as it is in its file: header and tokens."""
    little_endian = tokens.astype("<u2", copy=False)
    return shard_header(len(tokens), format), memoryview(little_endian).cast("B")


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the folder's manifest, if there is one, and whether all its shards were made."""
    for name in MANIFEST, PARTIAL:
        with contextlib.suppress(FileNotFoundError):
            try:
                return json.loads((folder / name).read_bytes()), name == MANIFEST
            except ValueError:
                raise ValueError(
                    f"{folder / name} is damaged: delete {folder}, start afresh"
                ) from None
    return None, False


def write_manifest(folder: Path, manifest: dict[str, Any], finished: bool = False) -> None:
    """Replace the manifest of an unfinished folder; when all is done it gets its final name."""
    manifest["tokens"] = sum(shard["tokens"] for shard in manifest["shards"])
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(folder / PARTIAL, text.encode())
    if finished:
        os.replace(folder / PARTIAL, folder / MANIFEST)


def write_shard(
    config: DataConfig, manifest: dict[str, Any], tokens: np.ndarray, end: list[int]
) -> None:
    """Write the next shard, then record it."""
    index = len(manifest["shards"])
    name = f"edufineweb_{'train' if index else 'val'}_{index:06d}.{config.format}"
    sha256 = write_atomically(config.folder / name, *shard_bytes(tokens, config.format))
    manifest["shards"].append({"name": name, "tokens": len(tokens), "sha256": sha256, "end": end})
    write_manifest(config.folder, manifest)


def is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a recorded shard is there, in the right length."""
    path = folder / shard["name"]
    size = len(shard_header(shard["tokens"], path.suffix[1:])) + 2 * shard["tokens"]
    return path.is_file() and path.stat().st_size == size


def verify_shards(config: DataConfig) -> None:
    """Check every shard against the manifest; put damaged ones aside as NAME.damaged.

    Raises ValueError that names the damaged ones. The next run makes again what is missing.
    """
    from tqdm import tqdm

    folder = config.folder
    manifest, _ = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: name the folder with --out_dir")
    damaged = []
    bar = tqdm(total=manifest["tokens"], unit="tok", unit_scale=True, disable=None)
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        header = shard_header(shard["tokens"], path.suffix[1:])
        fault = None if is_whole(folder, shard) else "missing, or not in its length"
        if not fault:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(len(header)))
                fault = None if digest.digest() == hashlib.sha256(header).digest() else "header"
                while block := file.read(1 << 24):
                    digest.update(block)
                    ids = np.frombuffer(block, "<u2")
                    if not fault and ids.max() > EOT:
                        fault = f"id {ids.max()}"
                    bar.update(len(ids))
            fault = fault or (None if digest.hexdigest() == shard["sha256"] else "sha256")
        if fault:
            damaged.append(f"{shard['name']} ({fault})")
            if path.exists():
                path.replace(path.with_name(path.name + ".damaged"))
    bar.close()
    if damaged:
        raise ValueError(
            f"{folder}: damaged: {', '.join(damaged)}: make them again with the same command as before"
        )
    say(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, all whole")


# -----------------------------------------------------------------------------
# all together


def tokenize(config: DataConfig) -> None:
    """Make the shards of `config`, or go on making them."""
    if config.verify:
        return verify_shards(config)
    with locked(config.folder):
        manifest, finished = read_manifest(config.folder)
        source = find_source(config, manifest)
        settings = describe(config, source)
        if manifest is None:
            manifest = {**settings, "tokens": 0, "shards": []}
        for key, value in settings.items():
            if manifest.get(key) != value:
                raise ValueError(
                    f"{config.folder} was made with {key} {manifest.get(key)}, not {value}: "
                    "choose another --out_dir, or delete it"
                )
        broken = [
            i for i, shard in enumerate(manifest["shards"]) if not is_whole(config.folder, shard)
        ]
        if finished and not broken:
            return say(
                f"{config.folder} is finished: {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards"
            )
        with worker_pool(config.num_proc) as pool:
            try:
                for index in broken:
                    repair_shard(config, manifest, source, index, pool)
                if not finished:
                    make_shards(config, manifest, source, pool)
            except BrokenProcessPool:
                raise OSError(
                    "a worker was killed, most likely for want of memory: try a lower --num_proc"
                ) from None
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                say(f"stopped after {len(manifest['shards'])} shards: the same command carries on")
                sys.exit(130)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def find_source(config: DataConfig, manifest: dict[str, Any] | None) -> Source:
    """Find what to read; for the hub, at the revision of the manifest if there is one."""
    if config.source == "hub":
        raise NotImplementedError
    return find_pydocs(config) if config.source == "pydocs" else find_files(config)


def describe(config: DataConfig, source: Source) -> dict[str, Any]:
    """Return the settings that decide what is in the shards, as the manifest records them."""
    return {
        "source": source.kind,
        "revision": source.revision,
        "text_column": source.text_column,
        "tokenizer": f"gpt2 {RANKS_SHA256}",
        "shard_size": config.shard_size,
        "max_tokens": config.max_tokens,
        "format": config.format,
        "files": [[Path(path).name, size] for path, size in source.files],
    }


def make_shards(
    config: DataConfig, manifest: dict[str, Any], source: Source, pool: Executor
) -> None:
    """Write the shards that are still missing, then the final manifest."""
    from tqdm import tqdm

    shards, done, began = manifest["shards"], manifest["tokens"], time.monotonic()
    stream = TokenStream(config, source, shards[-1]["end"] if shards else [0, 0, 0], pool)
    limit, given = config.max_tokens or 1 << 62, 0
    bar = tqdm(initial=done, unit=" tokens", unit_scale=True, disable=None)

    def documents() -> Iterator[np.ndarray]:
        nonlocal given
        for tokens in take_tokens(stream, stream.skip + limit - done):
            bar.total = min(limit, done + stream.expected_tokens())
            bar.update(1 + len(tokens))
            given += 1 + len(tokens)
            yield tokens

    place = stream.skip
    if done < limit:
        for tokens in pack_shards(documents(), config.shard_size, stream.skip):
            if not shards and given == len(tokens) > 1:  # no more to come: one shard is all
                parts = tokens[: max(1, len(tokens) // 10)], tokens[max(1, len(tokens) // 10) :]
            else:
                parts = (tokens,)
            for part in parts:
                place += len(part)
                write_shard(config, manifest, part, stream.place(place))
                rate = (manifest["tokens"] - done) / (time.monotonic() - began)
                say(f"{shards[-1]['name']}: {len(part):,} tokens, {rate:,.0f} a second")
            del tokens, parts, part  # before the next shard is filled
    bar.close()
    if not shards:
        raise ValueError(f"{config.source}: there is no text in it: check --source")
    write_manifest(config.folder, manifest, finished=True)
    if stream.nulls:
        say(f"{stream.nulls:,} rows without text were left out")
    say(f"{config.folder}: {manifest['tokens']:,} tokens in {len(shards)} shards")


def repair_shard(
    config: DataConfig, manifest: dict[str, Any], source: Source, index: int, pool: Executor
) -> None:
    """Make one recorded shard again."""
    shards = manifest["shards"]
    shard, path = shards[index], config.folder / shards[index]["name"]
    stream = TokenStream(config, source, shards[index - 1]["end"] if index else [0, 0, 0], pool)
    documents = take_tokens(stream, stream.skip + shard["tokens"])
    tokens = next(pack_shards(documents, shard["tokens"], stream.skip), np.empty(0, np.uint16))
    if write_atomically(path, *shard_bytes(tokens, config.format)) != shard["sha256"]:
        path.unlink()
        raise ValueError(f"{path}: the source gives other tokens now: delete {config.folder}")
    path.with_name(path.name + ".damaged").unlink(missing_ok=True)
    say(f"{path.name}: made again")


def main() -> None:
    """Tokenise, or verify."""
    run_command(DataConfig, tokenize)


if __name__ == "__main__":
    main()
