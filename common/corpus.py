"""Where text comes from: local files, the hub, or docstrings.

A source is a list of files at a fixed revision. It is cut into units: some rows of parquet, a range
of lines, or a part of a text. A worker process can read each unit independently of the others.
"""

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from common.formats import (
    BadText,
    csv_texts,
    decode_text,
    file_kind,
    holds_values,
    is_utf16,
    json_lines,
    json_values,
    line_blocks,
    no_text,
    open_text,
    take,
    text_blocks,
    until_damage,
)
from common.hub import AHEAD, HubFile, find_dataset, retry
from common.paths import expand_path, local_names
from common.pydocs import find_pydocs, read_pydocs
from common.tokenizer import text_cut

# -----------------------------------------------------------------------------
# the files of a source

UNIT_BYTES = 2 << 20  # of text: 0.02 s of work, so small sources keep all cores busy too
HUB_UNIT_BYTES = 16 << 20  # of text, about 10 MB of parquet: one request, and so 2,700 for 10BT
BIG_ROW_GROUP = 64 << 20  # the main process reads a larger one and sends its texts to workers


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files in a fixed order at a fixed revision."""

    name: str  # local, pydocs, or hub with data set, configuration and split
    revision: str  # changes when the text changes
    files: tuple[tuple[str, int], ...]  # path and size in bytes of each
    text_column: str = "text"
    on_error: Literal["stop", "skip"] = "stop"  # skip: go on after text that cannot be read
    dataset: str | None = None  # its name on the hub; None for other sources
    retry_minutes: float = 0  # how long to repeat a read from the hub that fails


def find_source(
    paths: tuple[str, ...],
    *,
    dataset: str,
    name: str | None,
    split: str,
    text_column: str,
    retry_minutes: float,
    on_error: Literal["stop", "skip"],
    manifest: dict[str, Any] | None,
) -> Source:
    """Find the files to read. A hub source keeps the revision and files of its manifest."""
    for special in {"hub", "pydocs"}.intersection(paths):
        if len(paths) > 1:
            raise ValueError(f"--source {special} stands alone: for a file use ./{special}")
    if paths == ("pydocs",):
        files = (("pydocs.jsonl", 1),)  # this file exists only in memory
        return Source(name="pydocs", revision=find_pydocs(), files=files)
    if paths != ("hub",):
        return find_files(paths, text_column, on_error)
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
        on_error=on_error,
        dataset=dataset,
    )


def find_files(
    paths: tuple[str, ...], text_column: str = "text", on_error: Literal["stop", "skip"] = "stop"
) -> Source:
    """Find the local files that paths, folders and globs stand for, each once, in sorted order."""
    found = {os.path.abspath(path): path for given in paths for path in expand_path(given)}
    chosen, fingerprint, files = [found[path] for path in sorted(found)], hashlib.sha256(), []
    for path, name in zip(chosen, local_names(chosen), strict=True):
        file_kind(path)
        # size and both ends: nearly every change alters one of them
        with blame(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            fingerprint.update(os.fsencode(f"{name} {size}\n") + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            fingerprint.update(file.read())
        files.append((path, size))
    return Source(
        name="local",
        revision=fingerprint.hexdigest(),
        files=tuple(files),
        text_column=text_column,
        on_error=on_error,
    )


# -----------------------------------------------------------------------------
# units


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of one file.

    `start` and `stop` are bytes in JSON lines and in text files (of the text, if it is compressed),
    and rows in all other files. A unit of a text file that starts after 0 continues the document.
    """

    file: int
    start: int
    stop: int
    share: float  # part of the file (0 to 1), for the progress bar
    # its bytes or its texts, if a worker cannot start reading in the middle
    data: bytes | None = None
    texts: list[str | BadText | None] | None = None


def open_file(source: Source, file: int, start: int = 0, stop: int = 0) -> BinaryIO:
    """Open a file of the source. On the hub, one request gets the bytes from start to stop."""
    if source.name == "pydocs":
        return io.BytesIO(read_pydocs())
    path, size = source.files[file]
    if not source.dataset:
        return open(path, "rb")
    hub_file = HubFile(source.dataset, source.revision, path, size, source.retry_minutes)
    hub_file.fetch(start, stop)
    return io.BufferedReader(hub_file)


def read_range(source: Source, file: int, start: int, stop: int) -> bytes:
    """Return the bytes of a file from start to stop, or to its end."""
    with open_file(source, file, start, stop) as buffered:
        # on the hub, the buffer would read on behind the bytes that are fetched
        raw = buffered.raw if source.dataset else buffered
        raw.seek(start)
        return raw.read(stop - start)


def source_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut the source into units; begin at `start` in `file`, where a unit must start.

    If a file is damaged, the last of its units has a BadText.
    """
    for at, (path, _) in enumerate(source.files[file:], file):
        with blame(path):
            for unit in until_damage(file_units(source, at, start)):
                if isinstance(unit, BadText):
                    unit = Unit(file=at, start=start, stop=start, share=0, texts=[unit])
                yield unit
                start = unit.stop
        start = 0


def file_units(source: Source, file: int, start: int) -> Iterator[Unit]:
    """Cut one file into units."""
    path, size = source.files[file]
    if file_kind(path)[0] == "parquet":
        yield from open_parquet(source, file).units(start)
    elif is_small(source, file) and not start:
        yield Unit(file=file, start=0, stop=size, share=1)
    elif not has_ranges(source, file):
        yield from streamed_units(source, file, start)
    else:
        step = HUB_UNIT_BYTES if source.dataset else UNIT_BYTES
        for begin in range(start, size, step):
            stop = min(size, begin + step)
            yield Unit(file=file, start=begin, stop=stop, share=(stop - begin) / size)


def is_small(source: Source, file: int) -> bool:
    """Tell whether a worker reads the whole file at once. All other files have smaller units."""
    path, size = source.files[file]
    limit = HUB_UNIT_BYTES if source.dataset else UNIT_BYTES
    if file_kind(path)[1]:
        limit //= 8  # text is seldom compressed to less than an eighth
    return size <= limit and source.name != "pydocs"


def has_ranges(source: Source, file: int) -> bool:
    """Tell whether workers can begin to read in the middle of a file."""
    kind, compression = file_kind(source.files[file][0])
    if compression or kind == "csv" or source.name == "pydocs":
        return False
    head = read_range(source, file, 0, 1 << 16)
    return not is_utf16(head) and not (kind == "json" and holds_values(head))


def streamed_units(source: Source, file: int, start: int = 0) -> Iterator[Unit]:
    """Cut a file that can only be read from its beginning; the units hold what they read."""
    path, size = source.files[file]
    kind, compression = file_kind(path)
    with open_file(source, file, 0, size if is_small(source, file) else 0) as raw:
        size, _ = max(1, raw.seek(0, os.SEEK_END)), raw.seek(0)
        stream = open_text(raw, compression)

        def progress(_: int) -> float:
            return 1.0 if raw.closed else raw.tell() / size  # the reader closes it at its end

        if kind == "csv":
            delimiters = "\t,;" if ".tsv" in path.lower() else ",;\t"
            texts = csv_texts(stream, source.text_column, delimiters)
        elif kind == "json" and holds_values(stream.peek(1 << 16)):
            texts = json_values(stream, source.text_column)
        else:
            blocks = (text_blocks if kind == "txt" else line_blocks)(stream, UNIT_BYTES)
            yield from collect(file, blocks, start, progress)
            return
        yield from collect(file, take(texts, UNIT_BYTES), start, progress)


def collect(
    file: int, parts: Iterator[bytes | list], start: int, progress: Callable[[int], float]
) -> Iterator[Unit]:
    """Yield units that hold parts of a file, bytes or texts, from the one that begins at `start`.

    The parts before are read too: a damaged file then breaks at the same place as the last time.
    `progress` of the end of a unit is the part of the file (0 to 1) that has been read.
    """
    at, before = 0, 0.0
    for part in parts:
        stop, now = at + len(part), progress(at + len(part))
        what = {"data": part} if isinstance(part, bytes) else {"texts": part}
        if at >= start:
            yield Unit(file=file, start=at, stop=stop, share=now - before, **what)
        at, before = stop, now


# -----------------------------------------------------------------------------
# texts


def unit_texts(source: Source, unit: Unit) -> Iterator[str | BadText | None]:
    """Yield the texts of a unit; None for a row without text, a BadText for what cannot be read."""
    for text in until_damage(read_texts(source, unit)):  # a byte-order mark has no meaning
        yield text.removeprefix("\ufeff") if isinstance(text, str) else text


@contextlib.contextmanager
def blame(path: str) -> Iterator[None]:
    """Put the name of the file before an error of the disk."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error})") from None


def read_texts(source: Source, unit: Unit) -> Iterator[str | BadText | None]:
    """Yield the texts of a unit, up to the first place that cannot be read."""
    kind, _ = file_kind(source.files[unit.file][0])
    if unit.texts is not None:
        yield from unit.texts
    elif kind == "parquet":
        yield from open_parquet(source, unit.file).texts(unit.start, unit.stop)
    elif unit.data is not None:
        yield from bytes_texts(source, kind, unit.data, unit.start)
    elif not is_small(source, unit.file):
        yield from bytes_texts(source, kind, *read_part(source, unit))
    elif kind == "txt":
        parts = streamed_units(source, unit.file)
        yield decode_text(b"".join(part.data for part in parts), 0)
    else:
        for part in streamed_units(source, unit.file):
            yield from read_texts(source, part)


def bytes_texts(
    source: Source, kind: str, data: bytes, start: int
) -> Iterator[str | BadText | None]:
    """Yield the texts in JSON lines, or the one in a part of a text file."""
    if kind == "json":
        yield from json_lines(data, start, source.text_column)
    else:
        yield decode_text(data, start)


def read_ahead(source: Source, unit: Unit) -> None:
    """Begin to download what a later `unit_texts` reads, if it is a range of a file on the hub."""
    path, size = source.files[unit.file]
    kind, compression = file_kind(path)
    if unit.data or unit.texts or compression:
        return
    if kind == "parquet":
        file = open_parquet(source, unit.file)
        begin, stop = file.span(unit.start, unit.stop)
        if stop - begin < BIG_ROW_GROUP:
            file.raw.raw.fetch_ahead(begin, stop)
    elif kind != "csv" and not is_small(source, unit.file):
        begin, stop = max(0, unit.start - CONTEXT), unit.stop + TAIL
        HubFile(source.dataset, source.revision, path, size, 0).fetch_ahead(begin, stop)


CONTEXT = 16  # bytes before a place that tell whether a text can be cut there
TAIL = 1 << 16  # bytes after a range: most last lines end within them


def read_part(source: Source, unit: Unit) -> tuple[bytes, int]:
    """Return the lines, or the part of a text, that begin in a range of a file, and their place."""
    path, size = source.files[unit.file]
    cut = text_cut if file_kind(path)[0] == "txt" else line_start
    begin = max(0, unit.start - CONTEXT)
    data = read_range(source, unit.file, begin, unit.stop + TAIL)
    if begin + len(data) < min(size, unit.stop + TAIL):
        raise OSError("it has become shorter")
    first = cut(data, unit.start - begin) if unit.start else 0
    if first is None or begin + first >= unit.stop:
        return b"", unit.start
    while (last := cut(data, unit.stop - begin)) is None and begin + len(data) < size:
        more = read_range(source, unit.file, begin + len(data), begin + 2 * len(data))
        if not more:
            raise OSError("it has become shorter")
        data += more
    return data[first:last], begin + first


def line_start(data: bytes, start: int) -> int | None:
    """Return the first start of a line from `start` on; None if there is none."""
    return data.find(b"\n", start - 1) + 1 or None


TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


class ParquetText:
    """The text column of a parquet file, read by row numbers."""

    def __init__(self, source: Source, file: int):
        import pyarrow.parquet

        self.source, self.number, self.raw = source, file, open_file(source, file)
        self.file = pyarrow.parquet.ParquetFile(self.raw, buffer_size=1 << 20)
        leaves = [self.file.schema.column(i) for i in range(len(self.file.schema))]
        kind, name = self.file.schema_arrow, source.text_column
        flat = [leaf.path for leaf in leaves if not leaf.max_repetition_level]
        columns = dict.fromkeys([*kind.names, *flat])  # meta and meta.text
        self.place = [name] if name in kind.names else name.split(".")  # meta.text: in a struct
        for part in self.place:
            if list(getattr(kind, "names", ())).count(part) != 1:
                raise no_text("", name, columns)
            kind = kind.field(part).type
        value = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
        if str(value) not in (*TEXT_TYPES, "null", "extension<arrow.json>"):
            raise no_text("", name, columns, str(kind)[:80])
        groups = [self.file.metadata.row_group(i) for i in range(self.file.num_row_groups)]
        place = [leaf.path for leaf in leaves].index(name)
        self.chunks = [group.column(place) for group in groups]
        self.first_rows = list(itertools.accumulate((g.num_rows for g in groups), initial=0))

    def groups(self, start: int, stop: int) -> range:
        """Return the row groups that hold rows start to stop."""
        return range(self.group_of(start), bisect.bisect_left(self.first_rows, stop))

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes of rows start to stop: of all columns, as most bytes are text."""
        groups = self.groups(start, stop)
        first, last = self.chunks[groups[0]], self.chunks[groups[-1]]
        begin, end = (c.dictionary_page_offset or c.data_page_offset for c in (first, last))
        return begin, end + last.total_compressed_size

    def texts(self, start: int, stop: int) -> Iterator[str | BadText | None]:
        """Yield the texts of rows start to stop."""
        groups = self.groups(start, stop)
        row = self.first_rows[groups[0]]
        if self.source.dataset:
            begin, end = self.span(start, stop)
            if end - begin < BIG_ROW_GROUP:
                self.raw.raw.fetch(begin, end)
        # its threads would only compete with the other workers
        batches = self.file.iter_batches(256, groups, [self.source.text_column], use_threads=False)
        for batch in batches:
            top, *inside = self.place
            column = batch.column(top)
            if inside:
                import pyarrow.compute  # 0.04 s, and seldom needed

                column = pyarrow.compute.struct_field(column, inside)
            rows = column[max(0, start - row) : max(0, stop - row)]
            try:
                values = rows.to_pylist()
            except UnicodeDecodeError:
                values = rows.cast("binary").to_pylist()
            for at, value in enumerate(values, max(start, row)):
                try:
                    yield value.decode() if isinstance(value, bytes) else value
                except UnicodeDecodeError:
                    yield BadText(
                        f"row {at} is not UTF-8 in column {self.source.text_column}: convert it"
                    )
            row += len(batch)

    def group_of(self, row: int) -> int:
        """Return the number of the row group that holds a row."""
        return bisect.bisect_right(self.first_rows, row) - 1

    def units(self, start: int) -> Iterator[Unit]:
        """Cut the rows from `start` on into units: runs of row groups, and parts of big groups."""
        limit = HUB_UNIT_BYTES if self.source.dataset else UNIT_BYTES
        rows, held = self.first_rows[-1], 0

        def unit(stop: int) -> Unit:
            return Unit(file=self.number, start=start, stop=stop, share=(stop - start) / rows)

        for group in range(self.group_of(start), len(self.chunks)):
            first, stop = self.first_rows[group : group + 2]
            size = self.chunks[group].total_uncompressed_size
            if start < first and held + size > limit:
                yield unit(first)
                start, held = first, 0
            held += size
            if size > BIG_ROW_GROUP:
                parts = take(self.texts(first, stop), UNIT_BYTES)
                for part in collect(self.number, parts, start - first, lambda n: n / rows):
                    yield replace(part, start=first + part.start, stop=first + part.stop)
                start, held = stop, 0
        if start < rows:
            yield unit(rows)


# A worker's next unit is mostly in the same file, or in the next one. On the hub it looks at the
# units that it will read later, too.
open_parquet = functools.lru_cache(maxsize=1 + AHEAD)(ParquetText)
