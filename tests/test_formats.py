"""common/formats.py: texts come out of JSON, CSV and plain text as they are, or with a reason."""

import gzip
import io
import json
import random
from collections.abc import Iterator
from itertools import islice

import pytest

from common.corpus import line_start
from common.formats import (
    BadText,
    csv_texts,
    decode_text,
    file_kind,
    holds_values,
    json_lines,
    json_values,
    line_blocks,
    open_text,
    text_blocks,
    until_damage,
    zstd,
)
from common.tokenizer import encode


def read(name: str, data: bytes, column: str = "text", start: int = 0) -> list:
    """Return the texts of a file, or those from a row on. What cannot be read is its message."""
    kind, compression = file_kind(name)

    def texts() -> Iterator[str | BadText | None]:
        stream, at = open_text(io.BytesIO(data), compression), 0
        if kind == "csv":
            yield from csv_texts(stream, column, "\t,;" if ".tsv" in name else ",;\t")
        elif kind == "txt":
            yield decode_text(stream.read(), 0)
        elif holds_values(stream.peek(1 << 16)):
            yield from json_values(stream, column)
        else:
            for block in line_blocks(stream, 4000):
                yield from json_lines(block, at, column)
                at += len(block)

    found = islice(until_damage(texts()), start, None)
    return [str(t) if isinstance(t, BadText) else t for t in found]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.PARQUET", ("parquet", None)),
        ("b.jsonl", ("json", None)),
        ("b.ndjson", ("json", None)),
        ("b.json.gz", ("json", "gzip")),
        ("b.CSV.GZ", ("csv", "gzip")),
        ("b.tsv", ("csv", None)),
        ("b.md", ("txt", None)),
        ("b.txt.zst", ("txt", "zstd")),
    ],
)
def test_the_name_of_a_file_tells_its_format(path, kind):
    assert file_kind(path) == kind


@pytest.mark.parametrize("path", ["a.xlsx", "parquet", "a.parquet.gz", "a.txt.bz2", "a.jsonx"])
def test_a_file_of_another_format_is_refused_with_those_there_are(path):
    with pytest.raises(ValueError, match=rf"^{path} is not .*: convert it to .parquet, .*\.zst\)$"):
        file_kind(path)


# -----------------------------------------------------------------------------
# compression and encodings

LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(3000))
TEXTS = [f"line {i}" for i in range(3000)]


def test_every_member_of_a_compressed_file_is_read():
    parts = [LINES[i : i + 9999] for i in range(0, len(LINES), 9999)]
    members = [b"", *parts, b""]
    assert read("a.jsonl.gz", b"".join(map(gzip.compress, members)) + b"\0" * 512) == TEXTS
    assert read("a.jsonl.zst", b"".join(map(zstd.compress, members))) == TEXTS
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # pzstd writes such frames
    assert read("a.jsonl.zst", skippable + zstd.compress(LINES)) == TEXTS


def test_zstd_with_a_window_of_2_gib_is_read():
    settings = {zstd.CompressionParameter.content_size_flag: 0}
    data = bytearray(zstd.compress(LINES, options=settings))
    assert not data[4] & 0x20  # it has a byte for the window
    data[5] = (31 - 10) << 3  # as `zstd --long=31` has it (RFC 8878, 3.1.1.1.2)
    with pytest.raises(zstd.ZstdError, match="memory"):
        zstd.ZstdFile(io.BytesIO(data)).read()
    assert read("a.jsonl.zst", bytes(data)) == TEXTS


@pytest.mark.parametrize("cut", [1, 20, 3000])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_cut_compressed_file_gives_its_whole_blocks_and_says_so(ending, cut):
    text = random.Random(0).randbytes(200_000).hex()
    lines = [text[i : i + 80] for i in range(0, len(text), 80)]
    data = b"".join(b'{"text": "%b"}\n' % line.encode() for line in lines)
    compress = gzip.compress if ending == "gz" else zstd.compress
    whole = compress(data[:299999]) + compress(data[299999:])
    *texts, fault = read(f"a.jsonl.{ending}", whole[:-cut])
    assert texts == lines[: len(texts)]
    assert len(texts) > 50
    assert fault.startswith("cannot be read (Compressed file ended")


def test_damaged_compression_is_not_text():
    data = bytearray(gzip.compress(LINES))
    data[-6] ^= 1  # the checksum
    assert "cannot be read (CRC check failed" in read("a.jsonl.gz", bytes(data))[-1]
    assert "cannot be read (Unable to decompress" in read("a.jsonl.zst", b"no zstd at all")[-1]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_marked_encodings_are_converted_without_the_mark(encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    data = (mark + '{"text": "naïve 🙂"}\n').encode(encoding)
    assert read("a.jsonl", data) == ["naïve 🙂"]
    assert read("a.json", (mark + '[{"text": "東京"}]').encode(encoding)) == ["東京"]
    assert read("a.csv", (mark + "text,b\n東京,1\n").encode(encoding)) == ["東京"]
    (text,) = read("a.txt", (mark + "東京").encode(encoding))
    assert text.removeprefix("\ufeff") == "東京"


def test_encodings_that_cannot_be_told_are_refused():
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert "is UTF-32: convert" in read(name, "text".encode("utf-32"))[0]
        assert "is not UTF-8 (byte 1 is 0)" in read(name, "text".encode("utf-16-le"))[0]
        assert "is not UTF-8 (byte 0 is 0)" in read(name, "text".encode("utf-16-be"))[0]
    assert "cannot be read ('utf-16" in read("a.txt", "text".encode("utf-16")[:-1])[-1]


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_compressed_data_under_another_name_says_how_to_name_it(compress):
    for name in ("a.txt", "a.jsonl", "a.csv", "a.jsonl.gz"):
        data = compress(LINES)
        data = gzip.compress(data) if name.endswith("gz") else data  # compressed twice
        assert "is compressed: let its name end in .gz" in read(name, data)[0]


# -----------------------------------------------------------------------------
# JSON

ROWS = [
    {"text": "a, [b] {c}\n\t\"'\\", "n": [1, {"x": None}]},
    {"text": "東京 \ud83d"},
    {"text": ""},
]
ROWS += [{"text": "x" * 9000}, {"text": None}, {"text": "end"}]
JSON_FORMS = {
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "lines with blank ones": "\n\n\r\n".join(json.dumps(row) for row in ROWS),
    "lines with commas": ",\n".join(json.dumps(row) for row in ROWS),
    "array": json.dumps(ROWS),
    "array of lines": "\n[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "pretty objects, dos": "\r\n".join(json.dumps(r, indent=1) for r in ROWS).replace("\n", "\r\n"),
    "objects on one line": "".join(json.dumps(row) for row in ROWS),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_every_form_of_json_gives_its_rows_from_any_row_on(form):
    data = JSON_FORMS[form].encode()
    expected = [row["text"] for row in ROWS]
    found = read("a.json", data)
    if form == "lines with blank ones":
        assert [text for text in found if text is not None] == [
            t for t in expected if t is not None
        ]
    else:
        assert found == expected
    assert holds_values(data) == (not form.startswith("lines") or "commas" in form)


def test_one_value_of_a_large_array_is_in_memory_at_a_time():
    class Endless(io.RawIOBase):
        """An array without an end."""

        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            data = (b'{"text": "x"},' * (len(buffer) // 14 + 1))[: len(buffer) // 14 * 14]
            data = data if self.given else b"[" + data[14:]
            buffer[: len(data)] = data
            self.given += len(data)
            return len(data)

    raw = Endless()
    texts = json_values(io.BufferedReader(raw, 1 << 20), "text")
    for i in range(400_000):
        assert next(texts) == "x"
        assert raw.given <= 14 * i + (4 << 20)


BAD_ROWS = {
    b'{"text": "cu': "line at byte 16 is cut off or not JSON: repair it",
    b'{"text": "a" "b"}': "is cut off or not JSON: repair it",
    b"[" * 100000: "is cut off or not JSON: repair it",
    b'{"text": "caf\xe9"}': "line at byte 16 is not UTF-8: convert the file",
    b'{"text": 5}': "has no text in field text (it has int): --text_column is one of text",
    b'{"text": ["a"]}': "has a list, not text, in field text: join each list into one text",
    b'{"id": 1, "meta": {"body": "x"}}': "in field text: --text_column is one of id, meta, meta.b",
    b"{}": "has no text in field text",
    b"null": "has no text in field text (it is not an object): write each row as",
    b'"text"': "has no text in field text (it is not an object): write each row as",
    b'{"messages": [{"role": "user", "content": "x"}]}': "list, not text, in field messages: join",
    b'{"conversations": [{"value": "x"}]}': "list, not text, in field conversations: join each",
    b'{"data": [{"text": "x"}]}': "one object with rows in data: write each on a line of its own",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_line_says_where_and_why_and_the_others_are_read(bad):
    found = read("a.jsonl", b'{"text": "one"}\n' + bad + b'\n{"text": "two"}\n')
    assert [found[0], found[2]] == ["one", "two"]
    assert BAD_ROWS[bad] in found[1]
    assert len(found) == 3


def test_a_bad_row_of_an_array_is_named_and_a_broken_array_ends_there():
    one, fault, two = read("a.json", b'[{"text": "one"}, {"body": 1}, {"text": "two"}]')
    assert (one, two) == ("one", "two")
    assert fault == "row 1 has no text in field text: --text_column is one of body"
    for data in (
        b'[{"text": "one"}, {"text": "a" "b"}, {"text": "two"}]',
        b'[{"text": "one"}, {"text": "a',
        b'[{"text": "one"},',
        b'[{"text": "one"}]\n[{"text": "two"}]',
        b'{\n"text": "one"}\n{"text": }',
    ):
        text, fault = read("a.json", data)
        assert (text, fault) == ("one", "row 1 is cut off or not JSON: repair it")
    assert "rows in data" in read("a.json", b'{\n"data": [\n{"text": "a"}\n]}')[0]


def test_nested_fields_are_named_with_dots_and_a_field_with_a_dot_wins():
    rows = [
        {"meta": {"text": "x", "deep": {"er": "y"}}},
        {"meta": None},
        {"meta.text": "z", "meta": {"text": "x"}},
        {"meta": {}},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    assert read("a.jsonl", lines, "meta.text")[:3] == ["x", None, "z"]
    assert "no text in field meta.text" in read("a.jsonl", lines, "meta.text")[3]
    assert read("a.jsonl", lines, "meta.deep.er")[:2] == ["y", None]
    hint = read("a.jsonl", lines)[0]
    assert hint.endswith("--text_column is one of meta, meta.text, meta.deep")


# -----------------------------------------------------------------------------
# CSV


def test_csv_keeps_quoted_lines_commas_quotes_and_long_fields():
    long = "word " * 50000
    data = f'id, text \n1,"a, ""b""\n\r\nc"\r\n2,\n3,"{long}"\r\n\n4,end'.encode()
    expected = ['a, "b"\n\r\nc', "", long, "end"]
    assert [text for text in read("a.csv", data) if text is not None] == expected
    assert [t for t in read("a.csv", b"\xef\xbb\xbf" + data) if t is not None] == expected


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"id,text\r1,a\r2,b\r"),  # line ends of old spreadsheets
        ("a.csv", b"id;text\n1;a\n2;b\n"),  # a spreadsheet in Europe
        ("a.csv", b"text\na\nb"),
        ("a.csv", b"text,\na,\nb,,\n"),
        ("a.tsv", b"id\ttext\n1\ta\n2\tb\n"),
        ("a.tsv.gz", gzip.compress(b"text\na\nb\n")),
    ],
)
def test_tables_of_other_programs_are_read(name, data):
    assert read(name, data) == ["a", "b"]


def test_a_table_without_a_line_has_no_rows():
    assert read("a.csv", b"") == read("a.tsv.gz", gzip.compress(b"")) == []


def test_a_comma_in_a_tsv_file_is_text():
    assert read("a.tsv", b"text\na, b\n") == ["a, b"]


def test_a_row_that_would_lose_text_is_refused_and_the_others_are_read():
    data = b'id,text\n1,one\n2,Hello, world\n3\n4,"bad"quote"\n5,caf\xe9\n6,two\n7,"no end'
    found = read("a.csv", data)
    assert [found[0], found[5]] == ["one", "two"]
    assert "row 2 has 3 columns, not 2: put its text in quotes" in found[1]
    assert "has 1 columns, not 2" in found[2]
    assert "is not CSV (',' expected after '\"'): put its text in quotes" in found[3]
    assert "row 5 is not UTF-8: convert" in found[4]
    assert "is not CSV (unexpected end of data)" in found[6]
    assert read("a.csv", b"1,one\n2,two\n") == [
        "has no text in field text: --text_column is one of 1, one"
    ]


# -----------------------------------------------------------------------------
# plain text

PROSE = ("It was, said he,\r\n\r\n the best\u00a0of   times 東京　x y.\n" * 60).encode()


@pytest.mark.parametrize("size", [100, 1000])
def test_a_cut_text_has_the_tokens_of_the_whole(size):
    whole = encode(PROSE.decode()).tolist()
    blocks = list(text_blocks(io.BytesIO(PROSE), size))
    assert len(blocks) >= 0.8 * len(PROSE) / (size + 20)
    assert [t for block in blocks for t in encode(block.decode()).tolist()] == whole


def test_binary_data_is_no_text():
    assert read("a.txt", b"PK\x03\x04\x00\x00") == [
        "is not a text file (byte 4 is 0): leave it out, or convert it with iconv if it is UTF-16"
    ]


def test_a_line_starts_after_a_newline_or_at_the_place_itself():
    data = b"ab\ncd\n\nef"
    assert [line_start(data, i) for i in range(1, 9)] == [3, 3, 3, 6, 6, 6, 7, None]


# -----------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BadText("is cut"), "is cut"),
        (OSError("Truncated stream"), "cannot be read (Truncated stream): get it again"),
        (NotImplementedError("codec"), "cannot be read (codec): get it again"),
        (ValueError("404: check --dataset"), None),  # the hub's
        (OSError(5, "I/O error"), None),
        (ConnectionError("away"), None),
        (TimeoutError("late"), None),
        (KeyError("a bug"), None),
    ],
)
def test_only_damage_of_the_text_is_bad_text(error, message):
    def items() -> Iterator[int]:
        yield 1
        raise error

    found = []
    try:
        found += until_damage(items())
    except Exception as raised:
        assert raised is error and message is None
    else:
        assert found[0] == 1
        assert (type(found[1]), str(found[1])) == (BadText, message)
