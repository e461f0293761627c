"""The text in files of JSON, CSV and plain text, also compressed or in UTF-16.

A text is a string, or None for a row without text. What cannot be read is a BadText among them.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from common.tokenizer import text_cut

ENDING = re.compile(r"\.(parquet|(?:(jsonl?|ndjson)|([ct]sv)|txt|md)(\.gz|\.zst)?)$", re.IGNORECASE)
READABLE = (
    "convert it to .parquet, .jsonl, .csv, .tsv, .txt or .md (all but parquet also .gz, .zst)"
)


def file_kind(path: str) -> tuple[str, str | None]:
    """Return the format of a file (parquet, json, csv or txt) and its compression."""
    if not (ending := ENDING.search(path.lower())):
        raise ValueError(f"{path} is not a file of text that can be read: {READABLE}")
    whole, json, table, packed = ending.groups()
    kind = "parquet" if whole == "parquet" else "json" if json else "csv" if table else "txt"
    return kind, {".gz": "gzip", ".zst": "zstd"}[packed] if packed else None


# what gzip, zstd, csv and pyarrow raise for damaged data
DAMAGE = (ValueError, OSError, EOFError, NotImplementedError, zlib.error, zstd.ZstdError, csv.Error)


class BadText(ValueError):  # noqa: N818 - like the end of an iteration, it is often a value
    """A line, row or file that holds no readable text. The message does not name the file."""


def until_damage(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items. If damage ends them, the last one is a BadText.

    Errors of the disk and of the hub are not about the text. They pass through.
    """
    try:
        yield from items
    except BadText as error:
        yield error
    except (ConnectionError, TimeoutError):
        raise
    except DAMAGE as error:
        if type(error) is ValueError or getattr(error, "errno", None):
            raise
        yield BadText(f"cannot be read ({error}): get it again")


def no_text(where: str, column: str, columns: Iterable[str], found: str = "") -> BadText:
    """Return the error for a row or file without text in the chosen field.

    `columns` are the fields that it has; `found` is what the chosen one holds.
    """
    names = list(columns)
    chats = {"messages", "conversations", "conversation"}.intersection(names)
    if chats or found.startswith(("list", "large_list")):
        lists = column if column in names else min(chats, default=column)
        hint = "join each list into one text, and name that with --text_column"
        return BadText(f"{where}has a list, not text, in field {lists}: {hint}")
    what = f"{where}has no text in field {column}{f' (it has {found})' if found else ''}"
    return BadText(f"{what}: --text_column is one of {', '.join(names)[:300]}")


# -----------------------------------------------------------------------------
# streams


def open_text(raw: BinaryIO, compression: str | None) -> BinaryIO:
    """Return a stream of the bytes in a file, from its beginning. UTF-16 becomes UTF-8.

    Raises BadText for UTF-32, and for UTF-16 without a byte-order mark.
    """
    stream = raw
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif compression == "zstd":
        window = {zstd.DecompressionParameter.window_log_max: 31}  # as for `zstd --long=31`
        stream = zstd.ZstdFile(raw, options=window)
    stream = io.BufferedReader(stream, 1 << 16)
    if is_utf16(stream.peek(4)):  # small files, as Notepad and PowerShell write them
        stream = io.BufferedReader(io.BytesIO(stream.read().decode("utf-16").encode()))
    return stream


def is_utf16(head: bytes) -> bool:
    """Tell whether a file has the byte-order mark of UTF-16. Raises BadText for other bytes."""
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise BadText("is compressed: let its name end in .gz (gzip) or .zst (zstd)")
    wide = head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))
    marked = not wide and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not marked and b"\0" in head[:4]:  # no format of text begins with a zero
        what = "UTF-32" if wide else f"not UTF-8 (byte {head.index(0)} is 0)"
        raise BadText(f"is {what}: convert it with iconv, or leave it out")
    return marked


def take(texts: Iterable[str | BadText | None], size: int) -> Iterator[list]:
    """Yield lists of texts of about `size` characters each."""
    held, room = [], size
    for text in until_damage(texts):
        held.append(text)
        room -= len(text) if isinstance(text, str) else 1
        if room <= 0:
            yield held
            held, room = [], size
    if held:
        yield held


def line_blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield blocks of whole lines, of about `size` bytes each."""
    while block := stream.read(size) + stream.readline():
        yield block


def text_blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield blocks of a text, of about `size` bytes each, cut where this changes no token."""
    block = stream.read(size)
    while block:
        more = stream.read(size)
        block += more
        if (cut := text_cut(block, size)) is None and more:
            continue
        yield block[:cut]
        block = block[cut:] if cut else b""


def decode_text(data: bytes, start: int) -> str:
    """Return bytes that begin at `start` of a file as text. Raises BadText if they are not text."""
    if (zero := data.find(b"\0")) >= 0:
        hint = "leave it out, or convert it with iconv if it is UTF-16"
        raise BadText(f"is not a text file (byte {start + zero} is 0): {hint}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = start + error.start
        raise BadText(f"is not UTF-8 at byte {where}: convert it with iconv") from None


# -----------------------------------------------------------------------------
# JSON

GAP = re.compile(r"[ \t\r\n,]*")


def holds_values(head: bytes) -> bool:
    """Tell from a file's beginning whether it is an array, or has objects that are not lines."""
    text = head.decode(errors="replace").removeprefix("\ufeff").lstrip()
    if not text.startswith("{"):
        return text.startswith("[")
    first, _, rest = text.partition("\n")
    try:
        _, end = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):  # a line that is cut off, or an object of several lines
        return rest.lstrip()[:1] not in ("", "{")
    return first[end:].lstrip()[:1] in ("{", ",")


def json_lines(lines: bytes, at: int, column: str) -> Iterator[str | BadText | None]:
    """Yield the text of each JSON line; the first begins at byte `at`."""
    for line in io.BytesIO(lines):
        where = f"line at byte {at}"
        try:
            text = line.decode("utf-8-sig")
            yield json_text(json.loads(text), column, where) if text.strip() else None
        except UnicodeDecodeError:
            yield BadText(f"{where} is not UTF-8: convert the file with iconv")
        except (ValueError, RecursionError):
            yield BadText(f"{where} is cut off or not JSON: repair it")
        at += len(line)


def json_values(stream: BinaryIO, column: str) -> Iterator[str | BadText | None]:
    """Yield the text of each value of an array, or of values one after the other.

    Raises BadText where the file is no JSON. Memory holds one value, and up to 2 MB.
    """
    text, decode = io.TextIOWrapper(stream, "utf-8-sig"), json.JSONDecoder().raw_decode
    held = text.read(1 << 20).lstrip()
    array, row, end = held.startswith("["), 0, False
    held = held[array:]
    while True:
        place = GAP.match(held).end()
        try:
            while True:
                value, after = decode(held, place)
                yield json_text(value, column, f"row {row}")
                row, place = row + 1, GAP.match(held, after).end()
        except (ValueError, RecursionError):  # here the block ends, or the array, or the JSON
            held = held[place:]
        if end:
            break
        more = text.read(max(1 << 20, len(held)))  # twice as much for a long value
        held, end = held + more, not more
    if held.strip() != "]" * array:
        raise BadText(f"row {row} is cut off or not JSON: repair it")


def json_text(row: Any, column: str, where: str) -> str | BadText | None:
    """Return the text of a row. `meta.text` is the field text inside meta."""
    value = row
    for name in [column] if isinstance(row, dict) and column in row else column.split("."):
        if not isinstance(value, dict) or name not in value:
            return no_field(row, column, where)
        value = value[name]
        if value is None:
            break
    if isinstance(value, str | None):
        return value
    return no_text(f"{where} ", column, row, type(value).__name__)


def no_field(row: Any, column: str, where: str) -> BadText:
    """Return the error for a row that does not have the field."""
    if not isinstance(row, dict):
        hint = f'write each row as {{"{column}": "..."}}'
        return BadText(f"{where} has no text in field {column} (it is not an object): {hint}")
    for name, value in row.items():  # {"data": [...]}: the object holds all rows
        if isinstance(value, list) and value and isinstance(value[0], dict) and column in value[0]:
            hint = f"write each on a line of its own, as `jq -c '.{name}[]'` does"
            return BadText(f"{where} is one object with rows in {name}: {hint}")
    names = [f"{name}.{n}" for name, v in row.items() if isinstance(v, dict) for n in v]
    return no_text(f"{where} ", column, [*row, *names])


# -----------------------------------------------------------------------------
# tables


def csv_texts(stream: BinaryIO, column: str, delimiters: str) -> Iterator[str | BadText | None]:
    """Yield the text of each row of a table, whose first line has the names of the columns.

    The delimiter is the first one that gives a column of the right name.
    """
    csv.field_size_limit((1 << 31) - 1)
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    if not (first := next(lines, "")):
        return  # an empty part of a table
    headers = {d: next(csv.reader([first], delimiter=d), []) for d in delimiters}
    headers = {d: [name.strip() for name in header] for d, header in headers.items()}
    delimiter = next((d for d in delimiters if column in headers[d]), delimiters[0])
    header = headers[delimiter]
    if column not in header:
        raise no_text("", column, header)
    place = header.index(column)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    for row in itertools.count(1):
        try:
            cells = next(table, None)
        except csv.Error as error:
            yield BadText(f"row {row} is not CSV ({error}): put its text in quotes")
            continue
        if cells is None:
            return
        if len(cells) < len(header) or any(cells[len(header) :]):
            what = f"row {row} has {len(cells)} columns, not {len(header)}"
            yield BadText(f"{what}: put its text in quotes") if cells else None
        elif re.search("[\udc80-\udcff]", cells[place]):
            yield BadText(f"row {row} is not UTF-8: convert the file with iconv")
        else:
            yield cells[place]
