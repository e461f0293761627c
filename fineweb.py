"""
Text to token shards, with the GPT-2 BPE:

    python fineweb.py                                FineWeb-Edu, 10 billion tokens, from the hub
    python fineweb.py --source 'corpus/*.parquet'    local .parquet, .jsonl, .txt (.gz, .zst too)
    python fineweb.py --source pydocs                docstrings that this machine already has
    python fineweb.py --verify --out_dir DIR         check the shards in a folder

The source is cut into units: a run of parquet rows, a range of lines, a text file. Workers read
and tokenise one unit each; the main process takes their tokens in source order, packs them into
shards and writes these. The manifest records with each shard the place in the source where it
ends, so the same command carries on from there after any interruption, and can make one damaged
shard again.
"""

import bisect
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    import tiktoken

# -----------------------------------------------------------------------------
# configuration

FINEWEB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"


def count_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Turn text into shards of GPT-2 tokens."""

    source: str = "hub"  # hub, pydocs, or a file or glob of .parquet, .jsonl, .txt (also .gz, .zst)
    dataset: str = FINEWEB  # data set on the hub
    name: str | None = None  # its configuration (sample-10BT, or another data set's own default)
    split: str = "train"  # its split
    text_column: str = "text"  # parquet column or JSON field that holds the text
    out_dir: Path | None = None  # (edu_fineweb10B for the default data, else data/<source>)
    shard_size: int = 100_000_000  # tokens in a shard
    max_tokens: int | None = None  # stop after so many tokens
    num_proc: int = field(default_factory=count_cores)  # worker processes (as many as cores)
    format: Literal["npy", "bin"] = "npy"  # bin: the files of llm.c and modded-nanogpt
    retry_minutes: float = 30  # how long to keep trying while the hub fails
    verify: bool = False  # check the shards in out_dir against their manifest, and stop

    def __post_init__(self):
        least = {"shard_size": 2, "max_tokens": 2, "num_proc": 1, "retry_minutes": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"--{name} is {given}: make it {value} or more")

    @property
    def config_name(self) -> str | None:
        return self.name or (SAMPLE if self.dataset == FINEWEB else None)

    @property
    def folder(self) -> Path:
        if self.out_dir:
            return self.out_dir
        if self.source == "hub":
            if (self.dataset, self.config_name) == (FINEWEB, SAMPLE):
                return Path("edu_fineweb10B")
            name = "-".join(filter(None, [self.dataset.split("/")[-1], self.config_name]))
        else:  # corpus/*.parquet: data/corpus, corpus/books.jsonl.gz: data/books
            path = Path(self.source).resolve()
            name = path.parent.name if glob.has_magic(path.name) else path.name.split(".")[0]
        return Path("data", name)


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
        message = " ".join(lines[1:end])
        raised = f"Error parsing {config_class.__name__}: "
        if message.startswith(raised):  # by the configuration, which says what to do
            _fail(script, message.removeprefix(raised))
        _fail(script, message.rstrip(".") + f": see python {script} --help")
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
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"""
        r"""| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=load_tiktoken_bpe(str(RANKS_PATH)),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )


# Where a text may be cut without changing its tokens: in no piece of GPT-2's split does white space
# follow anything else, and a run of white space before a word is one piece but for its last blank.
# \s without \x1c-\x1f is what the tokenizer's regex engine calls white space.
SPACE = r"[^\S\x1c-\x1f]"
SAFE_CUT = re.compile(rf"(?<=\S)(?={SPACE})|(?<={SPACE})(?={SPACE}\S)")
PART_CHARS = 1 << 18  # tiktoken fails at a million blanks in a row and takes ten bytes for each


def encode(text: str) -> np.ndarray:
    """Return the uint16 tokens of one document, equal to `encode_ordinary` of the whole.

    <|endoftext|> in the text is ordinary text. Long texts are tokenised in parts.
    """
    tokenizer, parts, start = get_tokenizer(), [], 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + PART_CHARS)
        part = text[start : cut.start() if cut else len(text)]
        start += len(part)
        try:
            tokens = tokenizer.encode_to_numpy(part, disallowed_special=())  # 10% faster, no list
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can have: becomes U+FFFD
            tokens = np.array(tokenizer.encode_ordinary(part))
        parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


# -----------------------------------------------------------------------------
# packing


def pack_shards(
    documents: Iterable[np.ndarray | list[int]], shard_size: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yield shards of `shard_size` uint16 tokens; the last has what is left.

    A document is its tokens without <|endoftext|>, which is put before each (an empty one too).
    The first `skip` tokens of the result are left out. A full shard comes only when there is a
    token for the next one, so the last is never empty.
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
    """Yield documents until they hold `count` tokens, <|endoftext|> before each included."""
    for document in documents:
        yield document[: count - 1]
        count -= 1 + len(document)
        if count <= 0:
            return


# -----------------------------------------------------------------------------
# the source: its files, and the units that they are cut into

UNIT_BYTES = 2 << 20  # of text: 0.15 s of work, so that small sources keep all cores busy
HUB_UNIT_BYTES = 16 << 20  # a request each: 3,000 for 10BT, what the hub grants in five minutes
BIG_ROW_GROUP = 64 << 20  # one above this is read by the main process and handed out as lines
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files in a fixed order at a fixed revision."""

    name: str  # local, pydocs, or hub with data set, configuration and split
    revision: str  # another one when the text is another
    files: tuple[tuple[str, int], ...]  # paths, and sizes in bytes
    text_column: str = "text"
    dataset: str | None = None  # on the hub
    retry_minutes: float = 0  # for reads from there


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of one file: some rows of parquet, else some bytes (of the text, if compressed)."""

    file: int
    start: int
    stop: int
    share: float  # of the file, for the progress bar
    lines: bytes | None = None  # JSON lines in hand, where workers cannot read from the middle


def find_files(config: DataConfig) -> Source:
    """Find the files of `--source PATH`, in sorted order."""
    fingerprint, files = hashlib.sha256(), []
    for path in sorted(glob.glob(config.source, recursive=True)) or [config.source]:
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: name its files, as in '{path}/*.parquet'")
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file: check --source")
        with open(path, "rb") as file:  # size and both ends: few changes leave all of them alike
            size = os.fstat(file.fileno()).st_size
            fingerprint.update(f"{Path(path).name} {size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            fingerprint.update(file.read())
        files.append((path, size))
    revision, column = fingerprint.hexdigest(), config.text_column
    return Source(name="local", revision=revision, files=tuple(files), text_column=column)


def file_kind(path: str) -> tuple[str, str | None]:
    """Return how to read a file, parquet, json or txt, and its compression."""
    match = re.search(r"\.(parquet|json|txt)l?(\.gz|\.zst)?$", path.lower())
    if not match or match[0].startswith(".parquet."):
        raise ValueError(f"{path} is not .parquet, .jsonl or .txt (or .gz, .zst): convert it")
    return match[1], COMPRESSIONS.get(match[2])


def open_file(source: Source, file: int) -> BinaryIO:
    """Open a file of the source, wherever it is."""
    if source.name == "pydocs":
        return io.BytesIO(read_pydocs())
    if source.dataset:
        return io.BufferedReader(HubFile(source, file))
    return open(source.files[file][0], "rb")


def uncompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    import pyarrow

    return pyarrow.input_stream(raw, compression=compression) if compression else raw


@contextlib.contextmanager
def blame(path: str) -> Iterator[None]:
    """Put the name of the file before what is wrong with it."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except (ValueError, OSError) as error:  # pyarrow's errors are all one or the other
        what = error if type(error) is ValueError else f"cannot be read ({error}): is it whole?"
        raise ValueError(f"{path} {what}") from None


def source_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut the source into units, from a place on where one starts."""
    for at, (path, size) in enumerate(source.files[file:], file):
        kind, compression = file_kind(path)
        with blame(path):
            if kind == "parquet":
                yield from open_parquet(source, at).units(start)
            elif kind == "txt":
                yield Unit(file=at, start=0, stop=size, share=1)
            elif compression or source.name == "pydocs":
                yield from stream_units(source, at, start)
            else:
                step = HUB_UNIT_BYTES if source.dataset else UNIT_BYTES
                for begin in range(start, size, step):
                    stop = min(size, begin + step)
                    yield Unit(file=at, start=begin, stop=stop, share=(stop - begin) / size)
        start = 0


def stream_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut JSON lines that can only be read from the beginning into blocks of whole lines."""
    with open_file(source, file) as raw:
        size, seen, rest = raw.seek(0, os.SEEK_END), raw.seek(0), b""
        text = uncompressed(raw, file_kind(source.files[file][0])[1])
        for skipped in range(0, start, UNIT_BYTES):
            text.read(min(UNIT_BYTES, start - skipped))
        while block := text.read(UNIT_BYTES) or (rest and b"\n"):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                share, seen = (raw.tell() - seen) / size, raw.tell()
                stop = start + len(whole) + 1
                yield Unit(file=file, start=start, stop=stop, share=share, lines=whole + newline)
                start = stop


def unit_texts(source: Source, unit: Unit) -> Iterator[str | None]:
    """Yield the texts of a unit, None for a row or file that has none."""
    kind, compression = file_kind(source.files[unit.file][0])
    if kind == "parquet" and unit.lines is None:
        yield from open_parquet(source, unit.file).texts(unit.start, unit.stop)
    elif kind == "txt":
        with open_file(source, unit.file) as raw:
            data = uncompressed(raw, compression).read()
        if b"\0" in data:
            raise ValueError(f"is no text file (byte {data.index(0)} is 0): leave it out")
        try:
            yield data.decode() or None
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 at byte {error.start}: convert it with iconv") from None
    else:
        with io.BytesIO(unit.lines) if unit.lines else open_file(source, unit.file) as file:
            yield from json_texts(file, source.text_column, unit)


def json_texts(file: BinaryIO, field: str, unit: Unit) -> Iterator[str | None]:
    """Yield the text of each JSON line that starts in the unit."""
    at = unit.start
    if unit.lines is None:
        if isinstance(file, io.BufferedReader) and isinstance(file.raw, HubFile):
            file.raw.fetch(max(0, at - 1), unit.stop + (1 << 16))  # most last lines end there
        if at:  # a line across the start belongs to the unit before
            file.seek(at - 1)
            at += len(file.readline()) - 1
    while (unit.lines or at < unit.stop) and (line := file.readline()):
        try:
            row = json.loads(line) if line.strip() else {field: None}
        except UnicodeDecodeError:
            raise ValueError(f"line at byte {at} is not UTF-8: convert the file") from None
        except ValueError:
            raise ValueError(f"line at byte {at} is cut off or no JSON: repair it") from None
        if not isinstance(row, dict) or not isinstance(row.get(field, 0), str | None):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            hint = f"--text_column is one of {fields}"
            raise ValueError(f"line at byte {at} has no text in field {field}: {hint}")
        yield row[field]
        at += len(line)


class ParquetText:
    """The text column of a parquet file, by rows."""

    def __init__(self, source: Source, file: int):
        import pyarrow.parquet

        self.source, self.number, self.raw = source, file, open_file(source, file)
        self.file = pyarrow.parquet.ParquetFile(self.raw, buffer_size=1 << 20)
        schema, name = self.file.schema_arrow, source.text_column
        if name not in schema.names:
            columns = ", ".join(schema.names)
            raise ValueError(f"has no column {name}: --text_column is one of {columns}")
        if str(kind := schema.field(name).type) not in ("string", "large_string"):
            raise ValueError(f"has {kind}, not text, in column {name}: see --text_column")
        leaves = [self.file.schema.column(i).path for i in range(len(self.file.schema))]
        groups = [self.file.metadata.row_group(i) for i in range(self.file.num_row_groups)]
        self.chunks = [group.column(leaves.index(name)) for group in groups]
        self.first_rows = list(itertools.accumulate((g.num_rows for g in groups), initial=0))

    def texts(self, start: int, stop: int) -> Iterator[str | None]:
        """Yield the texts of rows start to stop."""
        groups = range(self.group_of(start), bisect.bisect_left(self.first_rows, stop))
        row = self.first_rows[groups[0]]
        if self.source.dataset:
            first, last = self.chunks[groups[0]], self.chunks[groups[-1]]
            begin, end = (c.dictionary_page_offset or c.data_page_offset for c in (first, last))
            if (end := end + last.total_compressed_size) - begin < BIG_ROW_GROUP:
                self.raw.raw.fetch(begin, end)  # other columns come along; most bytes are text
        for batch in self.file.iter_batches(256, groups, [self.source.text_column]):
            rows = batch.column(0)[max(0, start - row) : max(0, stop - row)]
            row += len(batch)
            yield from rows.to_pylist()

    def group_of(self, row: int) -> int:
        return bisect.bisect_right(self.first_rows, row) - 1

    def units(self, start: int) -> Iterator[Unit]:
        """Cut the rows from start on into runs of row groups, and too big groups into lines."""
        limit = HUB_UNIT_BYTES if self.source.dataset else UNIT_BYTES
        rows, held = self.first_rows[-1], 0

        def unit(stop: int, lines: bytes | None = None) -> Unit:
            share = (stop - start) / rows
            return Unit(file=self.number, start=start, stop=stop, share=share, lines=lines)

        for group in range(self.group_of(start), len(self.chunks)):
            first, stop = self.first_rows[group : group + 2]
            size = self.chunks[group].total_uncompressed_size
            if start < first and held + size > limit:
                yield unit(first)
                start, held = first, 0
            held += size
            lines, big = bytearray(), size > BIG_ROW_GROUP
            for row, text in enumerate(self.texts(start, stop) if big else (), start + 1):
                lines += json.dumps({self.source.text_column: text}).encode() + b"\n"
                if len(lines) > UNIT_BYTES or row == stop:
                    yield unit(row, bytes(lines))
                    start, held, lines = row, 0, bytearray()
        if start < rows:
            yield unit(rows)


open_parquet = functools.lru_cache(maxsize=1)(ParquetText)  # a worker stays in a file for long


# -----------------------------------------------------------------------------
# the hub

READ_AHEAD = 8 << 20  # bytes, where a file is read in turn


class HubFile(io.RawIOBase):
    """A file on the hub, read by byte ranges: nothing is kept on disk."""

    def __init__(self, source: Source, file: int):
        self.source, (self.path, self.size) = source, source.files[file]
        self.at, self.begin, self.data = 0, 0, b""

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        stop = min(self.size, self.at + len(buffer))
        if not self.begin <= self.at <= stop <= self.begin + len(self.data):
            self.fetch(self.at, max(stop, self.at + READ_AHEAD))
        data = self.data[self.at - self.begin : stop - self.begin]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def fetch(self, begin: int, stop: int) -> None:
        """Get some bytes in one request, for the reads that follow."""
        self.begin, self.data = begin, b""
        if begin < (stop := min(stop, self.size)):
            self.data = retry(lambda: self.request(begin, stop), self.source.retry_minutes)

    def request(self, begin: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT  # 10 s without a byte
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        source, data = self.source, b""
        url = hf_hub_url(source.dataset, self.path, repo_type="dataset", revision=source.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{stop - 1}"}
        stream = functools.partial(get_session().stream, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        with hub_errors(), stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if response.status_code == 206:
                data = response.read()
        if len(data) != stop - begin:
            raise ConnectionError(
                f"the hub sent {len(data)} of {stop - begin} bytes of {self.path}"
            )
        return data


@contextlib.contextmanager
def hub_errors() -> Iterator[None]:
    """Turn what the hub's client raises into ConnectionError, if trying again may help."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        hint = "unset it, or give files that you have with --source"
        raise ValueError(f"HF_HUB_OFFLINE keeps fineweb.py from the hub: {hint}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise ConnectionError(f"the hub answers {status}") from None
        raise ValueError(f"{error}: check --dataset, or set HF_TOKEN") from None
    except RuntimeError as error:  # data sets that are a program
        raise ValueError(f"{error}: choose another --dataset") from None
    except (httpx2.TransportError, LocalEntryNotFoundError, json.JSONDecodeError) as error:
        what = str(error) or type(error).__name__
        raise ConnectionError(f"the hub does not answer ({what})") from None


def find_dataset(config: DataConfig) -> tuple[str, list[tuple[str, int]]]:
    """Return the data set's revision, and the paths and sizes of the files of name and split."""
    import datasets
    import httpx2
    from huggingface_hub import HfApi, get_session, set_client_factory
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    settings = {"event_hooks": get_session().event_hooks, "follow_redirects": True}
    set_client_factory(lambda: httpx2.Client(**settings, timeout=HF_HUB_DOWNLOAD_TIMEOUT))
    datasets.disable_progress_bars()
    with hub_errors():
        revision = HfApi().dataset_info(config.dataset).sha
        builder = datasets.load_dataset_builder(
            config.dataset, config.config_name, revision=revision
        )
        splits = builder.config.data_files or {}
        if config.split not in splits:
            names = ", ".join(splits)
            raise ValueError(f"{config.dataset} has no {config.split}: --split is one of {names}")
        paths = [str(url).split(f"@{revision}/", 1)[1] for url in splits[config.split]]
        files = HfApi().get_paths_info(
            config.dataset, paths, revision=revision, repo_type="dataset"
        )
    sizes = {file.path: file.size for file in files}
    return revision, [(path, sizes[path]) for path in paths]


# -----------------------------------------------------------------------------
# pydocs: the docstrings of the standard library and of this project's own requirements


PYDOCS_PACKAGES = ("numpy", "torch", "datasets")  # besides the standard library


def find_pydocs() -> Source:
    """Describe the embedded corpus by the versions that it is read from."""
    from importlib.metadata import version

    versions = [f"{name} {version(name)}" for name in PYDOCS_PACKAGES]
    revision = ", ".join([f"python {sys.version.split()[0]}", *versions])
    files = (("pydocs.jsonl", 1),)  # a file that is only ever in memory
    return Source(name="pydocs", revision=revision, files=files, text_column="text")


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


@contextlib.contextmanager
def worker_pool(num_proc: int) -> Iterator[Executor]:
    """Run worker processes, started in the one way that is the same on every system."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, spawn, initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise OSError("a worker died, as for want of memory: try a lower --num_proc") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and do not outlive it, not even kill -9."""
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_unit(source: Source, unit: Unit) -> tuple[np.ndarray | None, int]:
    """Return a unit's tokens, EOT between its documents (None: it has none), and its nulls."""
    parts, nulls = [], 0
    with blame(source.files[unit.file][0]):
        for text in unit_texts(source, unit):
            if text is None:
                nulls += 1
            else:
                parts += [np.array([EOT], np.uint16), encode(text)]
    return np.concatenate(parts[1:]) if parts else None, nulls


def retry(call: Callable[[], Any], minutes: float) -> Any:
    """Return call(), trying again with growing pauses while it raises ConnectionError."""
    give_up, pause = None, 1
    while True:
        try:
            return call()
        except (ConnectionError, TimeoutError) as error:
            if not minutes:
                raise
            give_up = give_up or time.monotonic() + 60 * minutes
            if (left := give_up - time.monotonic()) < pause:
                raise ConnectionError(f"{error}, for {minutes:g} minutes") from None
            say(f"{error}: trying again in {pause} s, for {left / 60:.0f} minutes more")
            time.sleep(pause)
            pause = min(60, 2 * pause)


class TokenStream:
    """The tokens of the source from some place on, unit after unit, made by the workers.

    A place is a file, the start of a unit in it, and a number of tokens after that.
    """

    def __init__(self, config: DataConfig, source: Source, place: list[int], pool: Executor):
        file, start, self.skip = place  # the tokens skipped are those of the shard before
        self.source, self.pool, self.retry_minutes = source, pool, config.retry_minutes
        self.units = source_units(replace(source, retry_minutes=config.retry_minutes), file, start)
        self.in_flight = 2 * config.num_proc + 2  # bounds memory, whatever the source's size
        self.starts = [(0, file, start)]  # of units: tokens of the stream before it, and its place
        self.tokens = self.nulls = 0
        self.read, self.to_read = 0.0, sum(size for _, size in source.files[file:])

    def __iter__(self) -> Iterator[np.ndarray]:
        flight, failed = deque(), False

        def submit(unit: Unit) -> tuple[Unit, Future]:
            return unit, self.pool.submit(tokenize_unit, self.source, unit)

        def first_result() -> tuple[np.ndarray | None, int]:
            nonlocal failed
            for i, (unit, result) in enumerate(flight if failed else ()):
                if result.done() and result.exception():  # all that failed goes out again at once
                    flight[i] = submit(unit)
            failed = True
            result = flight[0][1].result()
            failed = False
            return result

        while True:
            while len(flight) < self.in_flight and (unit := next(self.units, None)):
                flight.append(submit(unit))
            if not flight:
                return
            tokens, nulls = retry(first_result, self.retry_minutes)
            unit, _ = flight.popleft()
            self.starts.append((self.tokens, unit.file, unit.start))
            self.read += unit.share * self.source.files[unit.file][1]
            self.nulls += nulls
            if tokens is not None:
                self.tokens += 1 + len(tokens)
                yield tokens

    def place(self, tokens: int) -> list[int]:
        """Return the place so many tokens into the stream; calls must go forward."""
        del self.starts[: bisect.bisect_right(self.starts, (tokens, 1 << 62)) - 1]
        before, file, start = self.starts[0]
        return [file, start, tokens - before]

    def expected_tokens(self) -> int:
        """Estimate the tokens of the whole stream from the part that has been read."""
        return int((self.tokens - self.skip) * max(1.0, self.to_read / (self.read or self.to_read)))


# -----------------------------------------------------------------------------
# the folder of shards

MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
UNFINISHED = ".unfinished"  # ends the temporary name of a file while it is written


def say(message: str) -> None:
    """Print a line, and leave the progress bar whole."""
    from tqdm import tqdm

    tqdm.write(message)
    sys.stdout.flush()


def take_lock(folder: Path) -> BinaryIO:
    """Make the folder and lock it for this process, until the file is closed or it dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror})"
        raise OSError(f"{what}: choose another --out_dir") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        what = f"{folder} is in use by another run ({error.strerror})"
        raise ValueError(f"{what}: wait for it, or choose another --out_dir") from None
    return lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock; leave neither it behind nor, where nothing was written, a new folder.

    What a killed run was just writing is removed: nobody else can be writing it now.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with take_lock(folder):
            for leftover in folder.glob(f".*{UNFINISHED}"):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    (folder / ".lock").unlink()
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is either there and whole in the end or not there at all."""
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if os.name != "nt":  # the name has to survive a power cut as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path: Path, *parts: bytes | memoryview) -> str:
    """Write a whole file or none; return its sha256."""
    digest = hashlib.sha256()
    try:
        with atomic_write(path) as file:
            for part in parts:
                file.write(part)
                digest.update(part)
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror}), all before it is kept"
        raise OSError(f"{what}: make room and run the same command to carry on") from None
    return digest.hexdigest()


def shard_header(tokens: int, format: str) -> bytes:
    """Return the bytes of a shard file that come before its tokens."""
    if format == "bin":  # llm.c: magic, version and number of tokens in 256 int32
        return np.array([20240520, 1, tokens] + [0] * 253, "<i4").tobytes()
    header, layout = io.BytesIO(), {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write a shard in the format of its suffix; return the sha256 of the file."""
    header = shard_header(len(tokens), path.suffix[1:])
    return write_atomically(path, header, memoryview(tokens.astype("<u2", copy=False)).cast("B"))


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the folder's manifest, if it has one, and whether it is finished."""
    for name in MANIFEST, PARTIAL:
        try:
            return json.loads((folder / name).read_bytes()), name == MANIFEST
        except FileNotFoundError:
            continue
        except ValueError:
            raise ValueError(
                f"{folder / name} is damaged: delete {folder} and start anew"
            ) from None
    return None, False


def write_manifest(folder: Path, manifest: dict[str, Any], finished: bool = False) -> None:
    """Record what is done; a finished manifest gets its final name."""
    manifest["tokens"] = sum(shard["tokens"] for shard in manifest["shards"])
    write_atomically(folder / PARTIAL, (json.dumps(manifest, indent=1) + "\n").encode())
    if finished:
        os.replace(folder / PARTIAL, folder / MANIFEST)


def shard_fault(folder: Path, shard: dict[str, Any], thorough: bool = True) -> str | None:
    """Return what is wrong with a shard on disk; its length alone, if not `thorough`."""
    path, tokens = folder / shard["name"], shard["tokens"]
    header = shard_header(tokens, path.suffix[1:])
    if not path.is_file():
        return "missing"
    if path.stat().st_size != len(header) + 2 * tokens:
        return f"{path.stat().st_size:,} bytes, not {len(header) + 2 * tokens:,}"
    if thorough:
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                return "damaged header"
            top = np.memmap(path, "<u2", "r", len(header)).max()
            if top > EOT:
                return f"id {top}, beyond {EOT}"
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                return "other sha256"
    return None


def verify(config: DataConfig) -> None:
    """Check every shard against the manifest; rename damaged ones to NAME.damaged.

    Raises ValueError that names them. The next run finds them missing and makes them again.
    """
    from tqdm import tqdm

    folder, faults = config.folder, []
    manifest, _ = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: name the folder with --out_dir")
    with tqdm(total=manifest["tokens"], unit=" tokens", unit_scale=True, disable=None) as bar:
        for shard in manifest["shards"]:
            if fault := shard_fault(folder, shard):
                faults.append(f"{shard['name']} ({fault})")
                if (path := folder / shard["name"]).exists():
                    path.replace(f"{path}.damaged")
            bar.update(shard["tokens"])
    if faults:
        names = (
            f"{len(faults)} of {len(manifest['shards'])} shards are damaged: {', '.join(faults)}"
        )
        raise ValueError(f"{folder}: {names}: run the command that made them to repair them")
    say(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, all whole")


# -----------------------------------------------------------------------------
# reading the shards (used by train_gpt2.py)


def read_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens (uint16). Raises ValueError if the file is not a whole shard.

    `.npy` is what fineweb.py writes; `.bin` is llm.c's format: 256 int32 of header (magic, version,
    token count), then the tokens.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("not a version 1 llm.c shard")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(int(header[2]),))
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{tokens.ndim}-dimensional {tokens.dtype}, not a row of uint16")
        if tokens.nbytes + tokens.offset != path.stat().st_size:
            raise ValueError("its length is not what its header says")
        if hasattr(mmap, "MADV_RANDOM"):  # a window is a page or two: no megabytes ahead of it
            tokens.base.madvise(mmap.MADV_RANDOM)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises many kinds on a damaged header
        raise ValueError(f"{path}: not a whole token shard ({error}): make it again") from None
    return tokens.view(np.ndarray)  # slicing a memmap as such is several times slower


def open_shards(data_dir: Path, split: str, vocab_size: int = 50257) -> list[np.ndarray]:
    """Memory-map a split's shards in sorted order, after every check that costs next to nothing.

    Raises FileNotFoundError or ValueError, naming file and remedy, where a shard is missing or cut
    short, disagrees with the manifest, or holds ids outside the vocabulary (looked for in 16
    places of each shard; `--verify` looks everywhere).
    """
    paths = sorted(p for p in data_dir.glob(f"*_{split}_*") if p.suffix in (".npy", ".bin"))
    if not paths:
        raise FileNotFoundError(f"{data_dir}: no *_{split}_* shards: make them with fineweb.py")
    shards = {path.name: read_shard(path) for path in paths}
    manifest = data_dir / "manifest.json"
    if manifest.exists():
        try:
            promised = {s["name"]: s["tokens"] for s in json.loads(manifest.read_bytes())["shards"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{manifest}: damaged: make the data again") from None
        for name, tokens in promised.items():
            if f"_{split}_" in name and (name not in shards or len(shards[name]) != tokens):
                found = len(shards[name]) if name in shards else "no"
                raise ValueError(
                    f"{data_dir / name}: {found} tokens, {tokens} in manifest.json: "
                    "run fineweb.py again to repair it"
                )
    for name, shard in shards.items():
        for start in range(0, len(shard), max(8192, len(shard) // 16)):
            top = int(shard[start : start + 8192].max())
            if top >= vocab_size:
                raise ValueError(
                    f"{data_dir / name}: token id {top}, but vocab_size is {vocab_size}: "
                    "make the data again with the GPT-2 tokenizer, or give --vocab_size"
                )
    return list(shards.values())


def fingerprint(data_dir: Path) -> str:
    """Identify the data: the manifest's sha256, or one over the shards' names and sizes."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder: make the data with fineweb.py")
    manifest = data_dir / "manifest.json"
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(p for p in data_dir.iterdir() if p.suffix in (".npy", ".bin"))
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


# -----------------------------------------------------------------------------
# the run


def find_source(config: DataConfig, manifest: dict[str, Any] | None) -> Source:
    """Find what to read; from the hub, the revision and files that a manifest has pinned."""
    if config.source == "pydocs":
        return find_pydocs()
    if config.source != "hub":
        return find_files(config)
    name = " ".join(["hub", config.dataset, config.config_name or "(default)", config.split])
    if manifest and manifest["source"] == name:
        revision, files = manifest["revision"], manifest["files"]
    else:
        revision, files = retry(lambda: find_dataset(config), config.retry_minutes)
    return Source(
        name=name,
        revision=revision,
        files=tuple((path, size) for path, size in files),
        text_column=config.text_column,
        dataset=config.dataset,
    )


def check_space(config: DataConfig, source: Source, done: int) -> None:
    """Say how much room the shards will take; raise OSError if there is less.

    An estimate: 0.35 tokens to a byte of parquet is FineWeb-Edu's, 0.25 to one of text is English.
    """
    ratios = {".parquet": 0.35, "gzip": 0.75, "zstd": 0.75}
    tokens = 0.0
    for path, size in source.files:
        kind, compression = file_kind(path)
        tokens += size * ratios.get(compression or kind, 0.25)
    need = 2 * (min(tokens, config.max_tokens or tokens) - done)
    free = shutil.disk_usage(config.folder).free
    say(f"{config.folder}: about {need / 1e9:.2f} GB to write, {free / 1e9:.0f} GB free")
    if need > free:
        raise OSError(f"{config.folder} is on a disk too small: make room, or set --max_tokens")


def tokenize(config: DataConfig) -> None:
    """Make the shards, or go on with making them, or repair them."""
    folder = config.folder
    with locked(folder):
        manifest, finished = read_manifest(folder)
        source = find_source(config, manifest)
        settings = {
            "source": source.name,
            "text_column": config.text_column,
            "tokenizer": f"gpt2 {RANKS_SHA256}",
            "shard_size": config.shard_size,
            "max_tokens": config.max_tokens,
            "format": config.format,
            "revision": source.revision,
        }
        for key, value in settings.items() if manifest else ():
            if manifest.get(key) != value:
                what = f"{folder} was made with {key} {manifest.get(key)}, not {value}"
                raise ValueError(f"{what}: choose another --out_dir, or delete it")
        files = [[path if source.dataset else Path(path).name, size] for path, size in source.files]
        manifest = manifest or {**settings, "files": files, "tokens": 0, "shards": []}
        shards = manifest["shards"]
        damaged = [i for i, shard in enumerate(shards) if shard_fault(folder, shard, False)]
        if not finished:
            check_space(config, source, manifest["tokens"])
        try:
            with worker_pool(config.num_proc) as pool:  # starts processes only when there is work
                for index in damaged:
                    repair_shard(config, manifest, source, index, pool)
                if not finished:
                    make_shards(config, manifest, source, pool)
        except (ConnectionError, TimeoutError) as error:
            kept = f"{len(shards)} shards in {folder} are kept"
            raise OSError(f"{error}, {kept}: run the same command to carry on") from None
    say(f"{folder}: finished, {manifest['tokens']:,} tokens in {len(shards)} shards")


def make_shards(
    config: DataConfig, manifest: dict[str, Any], source: Source, pool: Executor
) -> None:
    """Write the shards that the manifest does not have yet."""
    from tqdm import tqdm

    shards, done, began = manifest["shards"], manifest["tokens"], time.monotonic()
    stream = TokenStream(config, source, shards[-1]["end"] if shards else [0, 0, 0], pool)
    limit, given, place = config.max_tokens or 1 << 62, 0, stream.skip

    def documents() -> Iterator[np.ndarray]:
        nonlocal given
        for tokens in take_tokens(stream, stream.skip + limit - done) if done < limit else ():
            bar.total = min(limit, done + stream.expected_tokens())
            bar.update(1 + len(tokens))
            given += 1 + len(tokens)
            yield tokens

    with tqdm(initial=done, unit=" tokens", unit_scale=True, disable=None) as bar:
        for tokens in pack_shards(documents(), config.shard_size, stream.skip):
            all_in_one = not shards and given == len(tokens) > 1
            cut = len(tokens) // 10 or 1  # of a source that ends in its first shard
            for part in (tokens[:cut], tokens[cut:]) if all_in_one else (tokens,):
                split = "train" if shards else "val"
                name = f"edufineweb_{split}_{len(shards):06d}.{config.format}"
                place += len(part)
                sha256, end = write_shard(config.folder / name, part), stream.place(place)
                shards.append({"name": name, "tokens": len(part), "sha256": sha256, "end": end})
                write_manifest(config.folder, manifest)
                rate = (manifest["tokens"] - done) / (time.monotonic() - began)
                say(f"{name}: {len(part):,} tokens; {rate:,.0f} tokens a second so far")
            del tokens, part  # before the next shard fills up
    if not shards:
        raise ValueError(f"{config.source} holds no text: check the file, or --text_column")
    write_manifest(config.folder, manifest, finished=True)
    if stream.nulls:
        say(f"{stream.nulls:,} rows or files without text were left out")


def repair_shard(
    config: DataConfig, manifest: dict[str, Any], source: Source, index: int, pool: Executor
) -> None:
    """Make one recorded shard again."""
    shards = manifest["shards"]
    shard, path = shards[index], config.folder / shards[index]["name"]
    stream = TokenStream(config, source, shards[index - 1]["end"] if index else [0, 0, 0], pool)
    documents = take_tokens(stream, stream.skip + shard["tokens"])
    tokens = next(pack_shards(documents, shard["tokens"], stream.skip))
    if write_shard(path, tokens) != shard["sha256"]:
        path.unlink()
        raise ValueError(f"{path}: its source gives other tokens now: delete {config.folder}")
    Path(f"{path}.damaged").unlink(missing_ok=True)
    say(f"{path.name}: made again")


def main() -> None:
    """Tokenise or verify, as the command line says."""
    try:
        run_command(DataConfig, lambda config: (verify if config.verify else tokenize)(config))
    except KeyboardInterrupt:
        print("\nstopped: the same command carries on after the last whole shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
