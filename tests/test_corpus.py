"""common/corpus.py: every kind of source gives the same texts, from any place on."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from data_helpers import expected_tokens, make_texts, parquet_bytes, write_jsonl

from common import corpus
from common.corpus import Source, file_kind, find_files, find_source, source_units
from fineweb import pack_shards, tokenize_unit


def stream_tokens(source: Source, place: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return all tokens of a source from a place on, without worker processes."""
    units = [u for u in source_units(source, *place)]
    documents = [tokenize_unit(source, unit)[0] for unit in units]
    shards = pack_shards([d for d in documents if d is not None], 1 << 20)
    return np.concatenate([np.empty(0, np.uint16), *shards])


# -----------------------------------------------------------------------------
# files


@pytest.fixture
def small_units(monkeypatch):
    """Cut little text into many units."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)


def write_source(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"text.{kind}"
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if kind == "parquet":
        path.write_bytes(parquet_bytes(texts))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines.encode())
    else:  # no newline at the end, blank lines, DOS line ends
        path.write_bytes(lines.replace("\n", "\r\n\n").rstrip().encode())
    return path


@pytest.mark.parametrize("big", [False, True], ids=["", "big-row-groups"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_format_gives_the_same_tokens_from_every_place(
    tmp_path, monkeypatch, small_units, kind, big
):
    if big:
        monkeypatch.setattr(corpus, "BIG_ROW_GROUP", 2500)
    texts = make_texts(100, words=20)
    path = write_source(tmp_path, kind, texts)
    source = find_files(str(path))
    whole = stream_tokens(source)
    assert np.array_equal(whole, expected_tokens(texts))
    units = list(source_units(source, 0, 0))
    assert len(units) > 10
    assert abs(sum(unit.share for unit in units) - 1) < 1e-6
    before = 0
    for unit in units[:12]:  # a run may start at any unit, and the rest stays the same
        assert np.array_equal(stream_tokens(source, (0, unit.start)), whole[before:])
        tokens, _ = tokenize_unit(source, unit)
        before += 0 if tokens is None else 1 + len(tokens)


def test_files_of_all_kinds_are_read_in_sorted_order(tmp_path):
    texts = make_texts(6)
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(texts[:3]))
    (tmp_path / "b.txt").write_text(texts[3])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(texts[4].encode()))
    write_jsonl(tmp_path / "d.jsonl", texts[5:])
    source = find_files(f"{tmp_path}/*")
    assert np.array_equal(stream_tokens(source), expected_tokens(texts))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.PARQUET", ("parquet", None)),
        ("b.jsonl", ("json", None)),
        ("b.json.gz", ("json", "gzip")),
        ("b.txt.zst", ("txt", "zstd")),
    ],
)
def test_the_name_of_a_file_tells_its_format(path, kind):
    assert file_kind(path) == kind


@pytest.mark.parametrize("path", ["a.csv", "parquet", "a.parquet.gz", "a.txt.bz2"])
def test_a_file_of_another_format_is_refused(path):
    with pytest.raises(ValueError, match=f"^{path} is not .*: convert it$"):
        file_kind(path)


def test_the_revision_changes_with_names_sizes_and_contents_but_not_with_the_folder(tmp_path):
    def revision(folder: str, **files: bytes) -> str:
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / f"{name}.txt").write_bytes(data)
        return find_files(f"{tmp_path / folder}/*").revision

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
    source = find_source("hub", **settings, manifest=pinned)
    assert (source.name, source.revision) == ("hub org/data (default) train", "old")
    assert source.files == (("o.txt", 1),)
    assert (source.dataset, source.text_column) == ("org/data", "t")
    for settings_now, manifest in ((settings, None), ({**settings, "split": "test"}, pinned)):
        source = find_source("hub", **settings_now, manifest=manifest)
        assert (source.revision, source.files) == ("new", (("new.parquet", 2),))


# -----------------------------------------------------------------------------
# docstrings


def test_pydocs_are_docstrings_of_libraries_without_repeats(tmp_path, monkeypatch):
    repeated = '"""One.\n\nTwo.\nThree."""'
    modules = {
        "a.py": f'{repeated}\nraise SystemExit("imported")\ndef f():\n    """Short."""\n',
        "b.py": f'class B:\n    {repeated}\n    async def f():\n     """B\n     x\n\n     y."""',
        "old.py": "print 'for another Python'\n",
        "deep/test/c.py": '"""A\ntest\nis left\nout."""',
        "site-packages/d.py": '"""A\npackage\nis left\nout."""',
    }
    modules |= {f"many/{i}.py": f'"""M{i}\n\n\n."""' for i in range(20)}
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(corpus, "PYDOCS_PACKAGES", ())
    texts = [json.loads(line)["text"] for line in corpus.read_pydocs().splitlines()]
    many = [text for text in texts if text.startswith("M")]
    assert sorted(many) == sorted(f"M{i}\n\n\n." for i in range(20))
    assert many != sorted(many)  # shuffled
    one = "One.\n\nTwo.\nThree."
    others = [text for text in texts if text not in many]
    assert sorted(others) in (sorted([one, "B\nx\n\ny."]), sorted([f"{one}\n\nB\nx\n\ny."]))
