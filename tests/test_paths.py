"""common/paths.py: paths, folders and globs stand for the files that a user means."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.corpus import find_files, find_source
from common.paths import local_names
from fineweb import DataConfig


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A folder of files. A function that returns the names of those that paths stand for."""
    names = [
        "a/1.jsonl",
        "a/b/1.jsonl",
        "a/b/2.jsonl.gz",
        "c/x[1].TXT",
        "c/note.md",
        "a/.no/3.jsonl",
    ]
    names += ["a/.4.jsonl", "a/code.py", "a/tokens/manifest.json", "a/tokens/edufineweb_val_0.npy"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def names_of(*paths: str) -> list[str]:
        files = [os.path.relpath(path, tmp_path) for path, _ in find_files(paths).files]
        assert sorted(files) == files
        return files

    return names_of


def test_a_folder_stands_for_the_files_below_it_without_hidden_ones_and_shards(tree, tmp_path):
    files = ["a/1.jsonl", "a/b/1.jsonl", "a/b/2.jsonl.gz"]
    assert tree("a") == tree("a/") == tree("./a/b", "a") == tree(f"{tmp_path}/a") == files
    assert tree("c") == ["c/note.md", "c/x[1].TXT"]
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "a" / "b")  # each text is read once
    (tmp_path / "a" / "link").symlink_to(tmp_path / "c" / "x")
    assert tree("a") == files
    (tmp_path / "c" / "x").mkdir()
    (tmp_path / "c" / "x" / "5.jsonl").touch()
    assert tree("a") == [*files, "a/link/5.jsonl"]


def test_paths_and_globs_are_one_sorted_list_of_files_named_once(tree):
    assert tree("a/b/2.jsonl.gz", "a/1.jsonl", "./a/1.jsonl") == ["a/1.jsonl", "a/b/2.jsonl.gz"]
    assert tree("**/*.jsonl") == ["a/1.jsonl", "a/b/1.jsonl"]
    assert tree("a/*.jsonl", "a/b") == ["a/1.jsonl", "a/b/1.jsonl", "a/b/2.jsonl.gz"]
    assert tree("c/x[1].TXT") == ["c/x[1].TXT"]  # not a glob: this file exists
    assert tree("c/**") == ["c/note.md", "c/x[1].TXT"]
    assert tree("a/[a-b]") == ["a/b/1.jsonl", "a/b/2.jsonl.gz"]  # a folder among the matches
    assert tree("~/c/note.md") == ["c/note.md"]


def test_paths_without_a_clear_meaning_are_refused_with_what_to_do(tree, tmp_path):
    with pytest.raises(ValueError, match=r"several formats \(\.TXT.*: name one of them, as in"):
        (tmp_path / "c" / "more.csv").touch()
        tree("c")
    assert tree("c/**") == ["c/more.csv", "c/note.md", "c/x[1].TXT"]
    (tmp_path / "a" / "README.md").touch()  # as in a clone of a data set
    with pytest.raises(ValueError, match=r"name one of them, as in 'a/\*\*/\*.jsonl'"):
        tree("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no file .*: check --source, or convert it"):
        tree("empty")
    with pytest.raises(FileNotFoundError, match=r"none\*: no such file: check --source"):
        tree("a/1.jsonl", "none*")
    with pytest.raises(ValueError, match=r"a/code.py is not .*: convert it to"):
        tree("a/code.py")
    settings = dict(dataset="d", name=None, split="s", text_column="t", retry_minutes=0)
    for special in ("hub", "pydocs"):
        with pytest.raises(
            ValueError, match=f"--source {special} stands alone: .* use ./{special}"
        ):
            find_source((special, "a"), **settings, on_error="stop", manifest=None)


def test_a_folder_that_cannot_be_listed_is_named_not_left_out(tree, monkeypatch):
    scandir = os.scandir

    def fail_below(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_below)
    with pytest.raises(OSError, match=r"^a/b cannot be read \(Permission denied\)$"):
        tree("a")


def test_names_of_files_are_relative_to_their_common_folder(tmp_path):
    paths = [f"{tmp_path}/x/a.txt", f"{tmp_path}/y/a.txt", f"{tmp_path}/y/../x/b.txt"]
    assert local_names(paths) == ["x/a.txt", "y/a.txt", "x/b.txt"]
    assert local_names(paths[:1]) == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (["corpus/books.jsonl.gz"], "books"),
        (["corpus/*.parquet"], "corpus"),
        (["corpus/**/*.txt"], "corpus"),
        (["corpus/"], "corpus"),
        (["corpus/a.txt", "corpus/b.txt"], "corpus"),
        (["corpus/a/x.txt", "corpus/b/x.txt"], "corpus"),
        (["*.txt"], "here"),
        (["**"], "here"),
        (["../here/a.txt", "b.txt"], "here"),
        (["/*.txt"], "files"),
        (["/"], "files"),
        ([".x.txt"], "files"),
        ([".."], "up"),
        (["../*.txt"], "up"),
        (["../a.txt", "../b.txt"], "up"),
        (["corpus/a [1].txt"], "a [1]"),
        (["pydocs"], "pydocs"),
    ],
)
def test_the_shards_folder_has_the_name_of_the_source(tmp_path, monkeypatch, source, name):
    here = tmp_path / "up" / "here"
    (here / "corpus").mkdir(parents=True)
    (here / "corpus" / "a [1].txt").touch()
    monkeypatch.chdir(here)
    assert DataConfig(source=tuple(source)).folder == Path("data", name)
