"""Where text comes from: local files, the hub, or docstrings.

A source is a list of files at a fixed revision. It is cut into units: some rows of parquet, a range
of lines, or a text file. A worker process can read each unit independently of the others.
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
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.hub import HubFile, find_dataset, retry
from common.workers import count_cores, worker_pool

# -----------------------------------------------------------------------------
# the files of a source, and their units

UNIT_BYTES = 2 << 20  # of text: 0.15 s of work, so small sources keep all cores busy too
HUB_UNIT_BYTES = 16 << 20  # one request; 3,000 requests for 10BT, the hub's limit for 5 minutes
BIG_ROW_GROUP = 64 << 20  # the main process reads a larger one and sends its lines to workers
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files in a fixed order at a fixed revision."""

    name: str  # local, pydocs, or hub with data set, configuration and split
    revision: str  # changes when the text changes
    files: tuple[tuple[str, int], ...]  # path and size in bytes of each
    text_column: str = "text"
    dataset: str | None = None  # its name on the hub; None for other sources
    retry_minutes: float = 0  # how long to repeat a read from the hub that fails


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of one file.

    `start` and `stop` are rows of a parquet file, and bytes of any other file. In a compressed file
    they count bytes of the text, not of the file.
    """

    file: int
    start: int
    stop: int
    share: float  # part of the file (0 to 1), for the progress bar
    lines: bytes | None = None  # its JSON lines, if a worker cannot start reading in the middle


def find_source(
    source: str,
    *,
    dataset: str,
    name: str | None,
    split: str,
    text_column: str,
    retry_minutes: float,
    manifest: dict[str, Any] | None,
) -> Source:
    """Find the files to read. A hub source keeps the revision and files of its manifest."""
    if source == "pydocs":
        return find_pydocs()
    if source != "hub":
        return find_files(source, text_column)
    full_name = " ".join(["hub", dataset, name or "(default)", split])
    if manifest and manifest["source"] == full_name:
        revision, files = manifest["revision"], manifest["files"]
    else:
        revision, files = retry(lambda: find_dataset(dataset, name, split), retry_minutes)
    return Source(
        name=full_name,
        revision=revision,
        files=tuple((path, size) for path, size in files),
        text_column=text_column,
        dataset=dataset,
    )


def find_files(pattern: str, text_column: str = "text") -> Source:
    """Find the local files that match a path or glob, in sorted order."""
    fingerprint, files = hashlib.sha256(), []
    for path in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: name its files, as in '{path}/*.parquet'")
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file: check --source")
        with open(path, "rb") as file:  # size and both ends: nearly every change alters one of them
            size = os.fstat(file.fileno()).st_size
            fingerprint.update(f"{Path(path).name} {size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            fingerprint.update(file.read())
        files.append((path, size))
    revision = fingerprint.hexdigest()
    return Source(name="local", revision=revision, files=tuple(files), text_column=text_column)


def file_kind(path: str) -> tuple[str, str | None]:
    """Return the format of a file (parquet, json or txt) and its compression."""
    match = re.search(r"\.(parquet|json|txt)l?(\.gz|\.zst)?$", path.lower())
    if not match or match[0].startswith(".parquet."):
        raise ValueError(f"{path} is not .parquet, .jsonl or .txt (or .gz, .zst): convert it")
    return match[1], COMPRESSIONS.get(match[2])


def open_file(source: Source, file: int) -> BinaryIO:
    """Open a file of the source: a local file, one on the hub, or the docstrings in memory."""
    if source.name == "pydocs":
        return io.BytesIO(read_pydocs())
    if source.dataset:
        path, size = source.files[file]
        hub_file = HubFile(source.dataset, source.revision, path, size, source.retry_minutes)
        return io.BufferedReader(hub_file)
    return open(source.files[file][0], "rb")


def uncompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    """Return a stream of the text in a file."""
    import pyarrow

    return pyarrow.input_stream(raw, compression=compression) if compression else raw


@contextlib.contextmanager
def blame(path: str) -> Iterator[None]:
    """Put the name of the file before an error of reading it."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except (ValueError, OSError) as error:  # pyarrow's errors are all one or the other
        what = error if type(error) is ValueError else f"cannot be read ({error}): check the file"
        raise ValueError(f"{path} {what}") from None


def source_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut the source into units; begin at `start` in `file`, where a unit must start."""
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
    """Cut a file that can only be read from its beginning into blocks of whole JSON lines."""
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
    """Yield the texts of a unit; None for a row or file without text."""
    kind, compression = file_kind(source.files[unit.file][0])
    if kind == "parquet" and unit.lines is None:
        yield from open_parquet(source, unit.file).texts(unit.start, unit.stop)
    elif kind == "txt":
        with open_file(source, unit.file) as raw:
            data = uncompressed(raw, compression).read()
        if b"\0" in data:
            raise ValueError(f"is not a text file (byte {data.index(0)} is 0): leave it out")
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
            file.raw.fetch(
                max(0, at - 1), unit.stop + (1 << 16)
            )  # most last lines end within 64 KiB
        if at:  # a line that begins before `start` belongs to the unit before
            file.seek(at - 1)
            at += len(file.readline()) - 1
    while (unit.lines or at < unit.stop) and (line := file.readline()):
        try:
            row = json.loads(line) if line.strip() else {field: None}
        except UnicodeDecodeError:
            raise ValueError(f"line at byte {at} is not UTF-8: convert the file") from None
        except ValueError:
            raise ValueError(f"line at byte {at} is cut off or not JSON: repair it") from None
        if not isinstance(row, dict) or not isinstance(row.get(field, 0), str | None):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            hint = f"--text_column is one of {fields}"
            raise ValueError(f"line at byte {at} has no text in field {field}: {hint}")
        yield row[field]
        at += len(line)


class ParquetText:
    """The text column of a parquet file, read by row numbers."""

    def __init__(self, source: Source, file: int):
        import pyarrow.parquet

        self.source, self.number, self.raw = source, file, open_file(source, file)
        self.file = pyarrow.parquet.ParquetFile(self.raw, buffer_size=1 << 20)
        schema, name = self.file.schema_arrow, source.text_column
        if name not in schema.names:
            columns = ", ".join(schema.names)
            raise ValueError(f"has no column {name}: --text_column is one of {columns}")
        if str(kind := schema.field(name).type) not in ("string", "large_string"):
            raise ValueError(f"has {kind}, not text, in column {name}: check --text_column")
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
                self.raw.raw.fetch(begin, end)  # fetches all columns: most bytes are text
        for batch in self.file.iter_batches(256, groups, [self.source.text_column]):
            rows = batch.column(0)[max(0, start - row) : max(0, stop - row)]
            row += len(batch)
            yield from rows.to_pylist()

    def group_of(self, row: int) -> int:
        """Return the number of the row group that holds a row."""
        return bisect.bisect_right(self.first_rows, row) - 1

    def units(self, start: int) -> Iterator[Unit]:
        """Cut the rows from `start` on into units: runs of row groups, and parts of big groups."""
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


# a worker's next unit is usually in the same file
open_parquet = functools.lru_cache(maxsize=1)(ParquetText)


# -----------------------------------------------------------------------------
# pydocs: the docstrings of the standard library and of packages that this project requires

PYDOCS_PACKAGES = ("numpy", "torch", "datasets")  # besides the standard library


def find_pydocs() -> Source:
    """Return the source of docstrings; the versions of Python and the packages are its revision."""
    from importlib.metadata import version

    versions = [f"{name} {version(name)}" for name in PYDOCS_PACKAGES]
    revision = ", ".join([f"python {sys.version.split()[0]}", *versions])
    files = (("pydocs.jsonl", 1),)  # this file exists only in memory
    return Source(name="pydocs", revision=revision, files=files, text_column="text")


def read_pydocs() -> bytes:
    """Return one JSON line for each module: its docstrings of more than three lines, no repeats.

    Modules are parsed, never imported. Their order is shuffled but fixed (by the sha256 of their
    names), so the first tenth of the tokens, the validation split, is a fair sample.
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
    """Return the docstrings of more than three lines in a Python file, in order."""
    import ast
    import warnings

    warnings.simplefilter("ignore")  # invalid escapes in old modules
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files for other versions of Python
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return [text for text in texts if text and text.count("\n") >= 3]
