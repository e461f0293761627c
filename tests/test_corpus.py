"""common/corpus.py: every kind of source gives the same texts, from any place on."""

import csv
import errno
import gzip
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import expected_tokens, make_texts, parquet_bytes, write_jsonl

from common import corpus, hub
from common.corpus import Source, find_files, find_source, source_units, unit_texts
from common.formats import BadText, zstd
from common.hub import HubFile
from common.tokenizer import EOT, encode
from common.unit_tokens import tokenize_unit


def stream_tokens(source: Source, place: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return all tokens of a source from a place on, without worker processes."""
    pieces = [tokenize_unit(source, unit).tokens for unit in source_units(source, *place)]
    return np.concatenate([np.empty(0, np.uint16), *pieces])


def all_texts(source: Source, place: tuple[int, int] = (0, 0)) -> Iterator[str | None]:
    """Yield all texts of a source. What cannot be read is a BadText."""
    for unit in source_units(source, *place):
        yield from unit_texts(source, unit)


# -----------------------------------------------------------------------------
# formats


@pytest.fixture
def small_units(monkeypatch):
    """Cut little text into many units."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)


def file_of(kind: str, texts: list[str]) -> bytes:
    """Return a file of a kind: an ending, perhaps with words before it."""
    rows = [{"id": 1, "text": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind.endswith("parquet"):
        return parquet_bytes(texts)
    if ".csv" in kind or ".tsv" in kind:
        table = io.StringIO()
        writer = csv.writer(table, delimiter="\t" if ".tsv" in kind else ",")
        writer.writerows([["id", "text"], *([1, text] for text in texts)])
        lines = table.getvalue()
    elif "array" in kind:
        lines = json.dumps(rows, indent=1 if "pretty" in kind else None)
    elif "pretty" in kind:
        lines = "\n".join(json.dumps(row, indent=1) for row in rows)
    elif kind == "jsonl":  # no newline at the end, blank lines, DOS line ends
        lines = lines.replace("\n", "\r\n\n").rstrip()
    data = lines.encode(kind.split()[0] if kind.startswith("utf") else "utf-8")
    if kind.endswith(".gz"):
        return b"".join(gzip.compress(data[i : i + 9000]) for i in range(0, len(data), 9000))
    return zstd.compress(data) if kind.endswith(".zst") else data


FORMATS = [
    *("parquet", "jsonl", "utf-8-sig .jsonl", ".jsonl.gz", ".jsonl.zst", "utf-16 .jsonl"),
    *("array.json", "pretty array.json", "pretty.json", "array.json.zst", "utf-16 array.json"),
    *(".csv", "utf-8-sig .csv", ".csv.gz", ".tsv", "utf-16 .tsv"),
]


@pytest.mark.parametrize("kind", [*FORMATS, "big row groups.parquet"])
def test_every_format_gives_the_same_tokens_from_every_place(
    tmp_path, monkeypatch, small_units, kind
):
    if kind.startswith("big"):
        monkeypatch.setattr(corpus, "BIG_ROW_GROUP", 2500)
    texts = make_texts(100, words=20)
    path = tmp_path / f"text.{kind}"
    path.write_bytes(file_of(kind, texts))
    source = find_files((str(path),))
    units = list(source_units(source, 0, 0))
    pieces = [tokenize_unit(source, unit).tokens for unit in units]
    whole = np.concatenate(pieces)
    assert np.array_equal(whole, expected_tokens(texts))
    assert len(units) > 8
    assert abs(sum(unit.share for unit in units) - 1) < 1e-6
    before = 0
    for unit, piece in list(zip(units, pieces, strict=True))[:10]:
        # a run may start at any unit, and the rest stays the same
        assert np.array_equal(stream_tokens(source, (0, unit.start)), whole[before:])
        before += len(piece)


def test_a_file_that_one_worker_reads_whole_gives_the_same_texts(tmp_path):
    texts = make_texts(30, words=20)
    for kind in FORMATS:
        path = tmp_path / f"text.{kind}"
        path.write_bytes(file_of(kind, texts))
        source = find_files((str(path),))
        (unit,) = source_units(source, 0, 0)
        found = [text for text in unit_texts(source, unit) if text is not None]
        assert found == texts, kind


@pytest.mark.parametrize("words", [1, 400])
@pytest.mark.parametrize("left", [0, 100, 500, 700, 1499])
def test_a_file_that_becomes_shorter_is_an_error(tmp_path, monkeypatch, left, words):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 500)
    monkeypatch.setattr(corpus, "TAIL", 50)
    path = write_jsonl(tmp_path / "t.jsonl", ["a " * words] * (800 // words))
    source = find_files((str(path),))
    units = list(source_units(source, 0, 0))
    os.truncate(path, left)
    with pytest.raises(ValueError, match=r"t\.jsonl cannot be read \(it has become shorter"):
        for unit in units:
            tokenize_unit(source, unit)
    with pytest.raises(ValueError, match="it has become shorter"):
        tokenize_unit(source, units[-1])  # if the others were read before


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("kind", ["txt", "md", "utf-8-sig txt", "utf-16 txt", "txt.gz", "txt.zst"])
def test_a_text_in_many_units_has_the_tokens_of_the_whole_from_any_unit_on(
    tmp_path, small_units, kind, on_error
):
    text = " ".join(make_texts(100, words=20)).replace("<|endoftext|>", "") + " 東京\u3000x \n\n"
    data = text.encode(kind.split()[0] if kind.startswith("utf") else "utf-8")
    if kind.endswith("gz"):
        data = gzip.compress(data)
    elif kind.endswith("zst"):
        data = zstd.compress(data)
    path = tmp_path / f"text.{kind.split()[-1]}"
    path.write_bytes(data)
    source = find_files((str(path),), on_error=on_error)
    other = replace(source, on_error="skip" if on_error == "stop" else "stop")
    units = list(source_units(source, 0, 0))
    pieces = [tokenize_unit(source, unit).tokens for unit in units]
    whole = np.concatenate(pieces)
    assert whole.tolist() == [EOT, *encode(text).tolist()]
    assert len(units) > 8
    assert max(len(piece) for piece in pieces) < 3000  # of 6,000
    before = 0
    for unit, piece in zip(units, pieces, strict=True):
        assert np.array_equal(stream_tokens(source, (0, unit.start)), whole[before:])
        assert np.array_equal(stream_tokens(other, (0, unit.start)), whole[before:])
        before += len(piece)


def test_lines_and_words_much_longer_than_a_unit_are_read_once(tmp_path, small_units):
    texts = ["one", "x" * 300_000, "two", "y" * 3000, "three"]
    source = find_files((str(write_jsonl(tmp_path / "a.jsonl", texts)),))
    assert list(all_texts(source)) == texts
    (tmp_path / "b.txt").write_text(" ".join(texts))
    source = find_files((f"{tmp_path}/b.txt",))
    assert "".join(all_texts(source)) == " ".join(texts)


def test_files_of_all_kinds_are_read_in_sorted_order(tmp_path):
    texts = make_texts(6)
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(texts[:3]))
    (tmp_path / "b.txt").write_text(texts[3], newline="")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(texts[4].encode()))
    write_jsonl(tmp_path / "d.jsonl", texts[5:])
    source = find_files((f"{tmp_path}/[cd]*", f"{tmp_path}/a*", f"{tmp_path}/b.txt"))
    assert list(all_texts(source)) == texts


def test_a_byte_order_mark_before_a_text_is_dropped_in_every_format(tmp_path):
    for kind in FORMATS[:2] + FORMATS[6:7] + [".csv"]:
        (tmp_path / f"text.{kind}").write_bytes(file_of(kind, ["\ufeffBook", "\ufeff"]))
        texts = list(all_texts(find_files((f"{tmp_path}/text.{kind}",))))
        assert [text for text in texts if text is not None] == ["Book", ""]
    (tmp_path / "a.txt").write_bytes("\ufeffBook".encode())
    assert list(all_texts(find_files((f"{tmp_path}/a.txt",)))) == ["Book"]


# -----------------------------------------------------------------------------
# parquet


def parquet_source(path: Path, column: str = "text", **columns: object) -> Source:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return find_files((str(path),), column)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, "東"], pyarrow.large_string()),
        (["a", None, "東"], pyarrow.string_view()),
        (["a", None, "東"], pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        (["a", None, "東".encode()], pyarrow.binary()),
        (["a", None, "東".encode()], pyarrow.large_binary()),
        (["a", None, "東".encode()], pyarrow.binary_view()),
        ([None], pyarrow.null()),
    ],
)
def test_parquet_text_is_read_however_it_is_stored(tmp_path, values, kind):
    source = parquet_source(tmp_path / "t.parquet", text=pyarrow.array(values, kind))
    expected = ["a", None, "東"] if len(values) > 1 else [None]
    assert list(all_texts(source)) == expected


def test_a_row_of_parquet_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path):
    data = pyarrow.array([b"one", b"caf\xe9", b"two"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, data.buffers())
    for values in (data, text, data.dictionary_encode()):
        found = list(all_texts(parquet_source(tmp_path / "t.parquet", text=values)))
        assert [found[0], found[2]] == ["one", "two"]
        assert str(found[1]).startswith("row 1 is not UTF-8 in column text")


def test_nested_text_is_found_by_its_dotted_name(tmp_path):
    meta = pyarrow.array([{"text": "x", "n": 1}, None, {"text": None, "n": 2}])
    deep = pyarrow.array([{"a": {"b": "y"}}, {"a": None}, None])
    path, columns = tmp_path / "t.parquet", {"meta": meta, "deep": deep}
    assert list(all_texts(parquet_source(path, "meta.text", **columns))) == ["x", None, None]
    assert list(all_texts(parquet_source(path, "deep.a.b", **columns))) == ["y", None, None]
    columns["meta.text"] = ["z"] * 3
    assert list(all_texts(parquet_source(path, "meta.text", **columns))) == ["z"] * 3


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", "has no text in field body: --text_column is one of id, meta, meta.n"),
        ("meta.body", "has no text in field meta.body"),
        ("meta", "has no text in field meta (it has struct<n: int64>)"),
        ("id", "has no text in field id (it has int64)"),
        ("messages", "has a list, not text, in field messages: join each list into one text"),
        ("text", "has a list, not text, in field messages: join each list into one text"),
    ],
)
def test_a_column_without_text_is_refused_with_the_columns_there_are(tmp_path, column, message):
    columns = dict(id=[1], meta=[{"n": 1}])
    if "messages" in message:
        columns["messages"] = [[{"role": "user", "content": "x"}]]
    (fault,) = all_texts(parquet_source(tmp_path / "t.parquet", column, **columns))
    assert isinstance(fault, BadText) and str(fault).startswith(message)


# -----------------------------------------------------------------------------
# --on_error


def skipped(tmp_path: Path, name: str, data: bytes) -> tuple[list[str], list[str]]:
    """Return the texts and the faults of a file, and compare them with every restart."""
    path = tmp_path / name
    path.write_bytes(data)
    write_jsonl(tmp_path / "z.jsonl", ["next file"])
    source = find_files((str(path), str(tmp_path / "z.jsonl")), on_error="skip")
    units = list(source_units(source, 0, 0))
    tokens = [tokenize_unit(source, unit) for unit in units]
    for i, unit in list(enumerate(units))[:: len(units) // 20 + 1]:
        place = unit.file, unit.start
        again = [tokenize_unit(source, unit) for unit in source_units(source, *place)]
        for now, then in zip(again, tokens[i:], strict=True):
            assert now.tokens.tolist() == then.tokens.tolist()
            assert now.faults == then.faults
    found = list(all_texts(source))
    good = [text for text in found if text and not isinstance(text, BadText)]
    assert good.pop() == "next file"
    faults = [str(text) for text in found if isinstance(text, BadText)]
    assert [fault for each in tokens for fault in each.faults] == [f"{path} {f}" for f in faults]
    stopping = replace(source, on_error="stop")
    with pytest.raises(BadText) as error:
        stream_tokens(stopping)
    assert str(error.value) == f"{path} {faults[0]}; --on_error skip leaves it out"
    return good, faults


TEXTS = [f"text {i} with some words\n" for i in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PROSE = "".join(TEXTS).encode()


def test_bad_lines_are_left_out(tmp_path, small_units):
    lines = LINES.splitlines(keepends=True)
    lines[7], lines[300] = b'{"text": "cu\n', b'{"text": "caf\xe9"}\n'
    for name, data in (
        ("a.jsonl", b"".join(lines)),
        ("a.jsonl.gz", gzip.compress(b"".join(lines))),
    ):
        good, faults = skipped(tmp_path, name, data)
        assert good == TEXTS[:7] + TEXTS[8:300] + TEXTS[301:]
        assert ["is cut off or not JSON" in faults[0], "not UTF-8" in faults[1]] == [True, True]
        assert len(faults) == 2


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(LINES * 20, 0)[:-100],
            "cannot be read (Compressed file ended",
        ),
        ("a.txt.gz", gzip.compress(PROSE * 40, 0)[:-100], "cannot be read (Compressed file ended"),
        ("a.json", b"[" + LINES.replace(b"\n", b",")[:-50], "is cut off or not JSON"),
        ("a.txt", PROSE + b"caf\xe9 au lait ", "is not UTF-8 at byte"),
        ("a.txt", PROSE + b"\0\0", "is not a text file (byte"),
    ],
)
def test_a_file_that_breaks_off_gives_what_comes_before_and_one_fault(
    tmp_path, small_units, name, data, fault
):
    good, faults = skipped(tmp_path, name, data)
    times = {"a.jsonl.gz": 20, "a.txt.gz": 40}.get(name, 1)
    assert "".join(good) == (PROSE.decode() * times)[: len("".join(good))]
    assert len("".join(good)) > 0.6 * len(PROSE) * times
    assert len(faults) == 1
    assert fault in faults[0]


def test_what_follows_a_bad_part_of_a_text_file_is_a_new_document(tmp_path, small_units):
    path = tmp_path / "a.txt"
    path.write_bytes(PROSE + b"caf\xe9 au lait " + PROSE)
    source = find_files((str(path),), on_error="skip")
    tokens = stream_tokens(source)
    assert np.count_nonzero(tokens == EOT) == 2
    first, second = np.flatnonzero(tokens == EOT)
    whole = expected_tokens([PROSE.decode()])
    assert first == 0 and np.array_equal(tokens[:second], whole[:second])
    assert np.array_equal(tokens[second + 900 :], whole[-len(tokens[second + 900 :]) :])


@pytest.mark.parametrize("big", [False, True], ids=["", "big-row-groups"])
def test_damaged_parquet_gives_its_good_part(tmp_path, monkeypatch, small_units, big):
    if big:
        monkeypatch.setattr(corpus, "BIG_ROW_GROUP", 500)
    data = bytearray(parquet_bytes(TEXTS, row_group_size=100))
    data[len(data) // 2 : len(data) // 2 + 300] = b"\xff" * 300  # in the third row group
    good, faults = skipped(tmp_path, "a.parquet", bytes(data))
    assert good[:200] == TEXTS[:200]
    assert len(good) in (200, 300)
    assert len(faults) == 1
    assert "cannot be read (" in faults[0]
    assert skipped(tmp_path, "a.parquet", bytes(data[:-30]))[0] == []


def test_a_small_file_that_breaks_gives_its_good_part(tmp_path):
    assert skipped(tmp_path, "a.txt", b"caf\xe9")[0] == []
    assert skipped(tmp_path, "a.txt", "text".encode("utf-16")[:-1])[0] == []
    good, faults = skipped(tmp_path, "a.csv", b'text\none\na,b\ntwo\n"no end')
    assert (good, len(faults)) == (["one", "two"], 2)
    good, faults = skipped(tmp_path, "a.json", b'[{"text": "one"}, 5, {"text": "two"}')
    assert (good, len(faults)) == (["one", "two"], 2)
    good, faults = skipped(tmp_path, "a.csv", b"body\none\n")
    assert (good, len(faults)) == ([], 1)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), ConnectionError("away")])
def test_a_lost_disk_or_hub_is_never_skipped(tmp_path, monkeypatch, small_units, error):
    def fail(*_: object) -> None:
        raise error

    for name, data in (("a.txt", PROSE), ("a.jsonl", LINES), ("a.parquet", parquet_bytes(TEXTS))):
        (tmp_path / name).write_bytes(data)
        source = find_files((str(tmp_path / name),), on_error="skip")
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "open_file", fail)
            corpus.open_parquet.cache_clear()
            with pytest.raises(type(error), match=str(error.args[-1])):
                list(all_texts(source))


# -----------------------------------------------------------------------------
# sources


def test_the_revision_changes_with_names_sizes_and_contents_but_not_with_the_folder(tmp_path):
    def revision(folder: str, **files: bytes) -> str:
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / f"{name}.txt").write_bytes(data)
        return find_files((f"{tmp_path / folder}",)).revision

    long = b"x" * 100_000
    first = revision("1", a=b"text", b=long)
    assert revision("2", a=b"text", b=long) == first
    others = [
        revision("3", a=b"text", c=long),
        revision("4", a=b"tex", b=long),
        revision("5", a=b"Text", b=long),
        revision("6", a=b"text", b=long[:-1] + b"y"),
    ]
    assert len({first, *others}) == 5


def test_a_hub_source_keeps_the_revision_and_files_of_its_manifest(monkeypatch):
    def find_dataset(dataset: str, name: str | None, split: str) -> tuple[str, list]:
        return "new", [("new.parquet", 2)]

    monkeypatch.setattr(corpus, "find_dataset", find_dataset)
    pinned = {"source": "hub org/data (default) train", "revision": "old", "files": [["o.txt", 1]]}
    settings = dict(dataset="org/data", name=None, split="train", text_column="t", retry_minutes=0)
    settings["on_error"] = "skip"
    source = find_source(("hub",), **settings, manifest=pinned)
    assert (source.name, source.revision) == ("hub org/data (default) train", "old")
    assert source.files == (("o.txt", 1),)
    assert (source.dataset, source.text_column, source.on_error) == ("org/data", "t", "skip")
    for settings_now, manifest in ((settings, None), ({**settings, "split": "test"}, pinned)):
        source = find_source(("hub",), **settings_now, manifest=manifest)
        assert (source.revision, source.files) == ("new", (("new.parquet", 2),))


def test_the_same_names_in_other_folders_are_another_source(tmp_path):
    for name in ("x/a.txt", "y/a.txt", "z/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    two = find_files((f"{tmp_path}/x", f"{tmp_path}/y")).revision
    assert two != find_files((f"{tmp_path}/x", f"{tmp_path}/z")).revision


# -----------------------------------------------------------------------------
# the hub


class MemoryFile(HubFile):
    """A file on the hub whose requests are answered from memory."""

    contents, requests = b"", []

    def request(self, begin: int, stop: int) -> bytes:
        self.requests.append((begin, stop))
        return self.contents[begin:stop]


def test_a_unit_of_parquet_on_the_hub_is_one_request(monkeypatch):
    texts = make_texts(600, words=200)
    data = parquet_bytes(texts, row_group_size=60)
    monkeypatch.setattr(corpus, "HUB_UNIT_BYTES", 200_000)
    monkeypatch.setattr(corpus, "HubFile", MemoryFile)
    monkeypatch.setattr(MemoryFile, "contents", data)
    monkeypatch.setattr(MemoryFile, "requests", [])
    source = Source(name="hub", revision="r", files=(("a.parquet", len(data)),), dataset="org/data")
    units = list(source_units(source, 0, 0))
    footers = len(MemoryFile.requests)
    assert footers <= 2 and len(units) >= 4
    assert [text or "" for unit in units for text in unit_texts(source, unit)] == texts
    assert len(MemoryFile.requests) == footers + len(units)
    assert sum(stop - begin for begin, stop in MemoryFile.requests[footers:]) <= len(data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_range_of_a_file_on_the_hub_is_one_request(monkeypatch, name):
    texts = [text.strip() for text in make_texts(600, words=200)][:-1]  # no long one
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    data = lines.encode() if name == "a.jsonl" else " ".join(texts).replace("<|", "").encode()
    monkeypatch.setattr(corpus, "HUB_UNIT_BYTES", 100_000)
    monkeypatch.setattr(corpus, "HubFile", MemoryFile)
    monkeypatch.setattr("common.hub.READ_AHEAD", 1000)
    monkeypatch.setattr(MemoryFile, "contents", data)
    monkeypatch.setattr(MemoryFile, "requests", [])
    files = ((name, len(data)),)
    source = Source(name="hub", revision="r", files=files, dataset="org/data")
    units = list(source_units(source, 0, 0))
    assert len(units) == len(data) // 100_000 + 1 > 3
    assert MemoryFile.requests == [(0, 1 << 16)]  # the beginning tells the format
    found = [text for unit in units for text in unit_texts(source, unit)]
    assert len(MemoryFile.requests) <= 1 + len(units) + (name == "a.txt")
    assert found == texts if name == "a.jsonl" else "".join(found).encode() == data
    MemoryFile.requests.clear()
    monkeypatch.setattr(corpus, "HUB_UNIT_BYTES", 1 << 24)
    (unit,) = source_units(source, 0, 0)
    list(unit_texts(source, unit))
    assert MemoryFile.requests == [(0, len(data))]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_unit_that_was_read_ahead_needs_no_request_and_a_failed_one_is_repeated(
    monkeypatch, name
):
    texts = [text.strip() or "x" for text in make_texts(400, words=200)][5:-1]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    data = {"a.parquet": parquet_bytes(texts), "a.jsonl": lines, "a.txt": " ".join(texts).encode()}
    data, failing = data[name], []
    monkeypatch.setattr(corpus, "HUB_UNIT_BYTES", 100_000)
    monkeypatch.setattr(corpus, "HubFile", MemoryFile)
    monkeypatch.setattr(MemoryFile, "contents", data)
    monkeypatch.setattr(MemoryFile, "requests", [])

    def request(self, begin: int, stop: int) -> bytes:
        self.requests.append((begin, stop))
        if failing:
            raise ConnectionError(failing.pop())
        return self.contents[begin:stop]

    monkeypatch.setattr(MemoryFile, "request", request)
    source = Source(name="hub", revision="r", files=((name, len(data)),), dataset="org/data")
    units = list(source_units(source, 0, 0))[1:4]
    plain = [list(unit_texts(source, unit)) for unit in units]
    for faults in ([], ["the hub answers 503"]):
        MemoryFile.requests.clear()
        failing.extend(faults)
        corpus.read_ahead(source, units[0])
        corpus.read_ahead(source, units[0])
        corpus.read_ahead(source, units[1])
        hub.downloads().submit(int).result()  # the requests are made in threads
        assert len(MemoryFile.requests) <= 2
        assert [list(unit_texts(source, unit)) for unit in units[:2]] == plain[:2]
        assert len(MemoryFile.requests) == 2 + len(faults) and not hub.ahead
    for unit in units * 2:  # another worker may get them: they are forgotten
        corpus.read_ahead(source, unit)
    assert len(hub.ahead) <= hub.AHEAD + 1
    assert [list(unit_texts(source, unit)) for unit in units] == plain
    hub.ahead.clear()
