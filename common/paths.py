"""The files that paths, folders and globs on a command line stand for, and names for them."""

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from common.formats import ENDING, READABLE, file_kind


def expand_path(given: str) -> list[str]:
    """Return the files that a path, a folder or a glob stands for."""
    path = os.path.expanduser(given)
    found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
    if not found:
        hint = "check --source (a data set on the hub is --dataset)"
        raise FileNotFoundError(f"{given}: no such file: {hint}")
    files = [each for each in found if not os.path.isdir(each)]
    if files and "**" in path:  # the files in the folders are found too
        return files
    folders = [each for each in found if os.path.isdir(each)]
    return files + [file for folder in folders for file in files_below(folder)]


def files_below(folder: str) -> list[str]:
    """Return the files of text in a folder and below it. They must have one format."""
    found = {}

    def stop(error: OSError) -> None:  # else the folder would be left out
        raise OSError(f"{error.filename} cannot be read ({error.strerror})")

    for root, names in walk(folder, stop):
        if any(name.startswith("edufineweb_") for name in names):
            continue  # token shards, with a manifest that is not text
        for name in names:
            if ending := ENDING.search(name):
                found[os.path.join(root, name)] = ending[0]
    if not found:
        raise ValueError(f"{folder} holds no file of text: check --source, or {READABLE}")
    if len({file_kind(path)[0] for path in found}) > 1:
        endings = sorted(set(found.values()), key=lambda end: (end == ".md", end))  # README.md
        what = f"{folder} holds files of several formats ({', '.join(endings)})"
        pattern = os.path.join(folder, "**", f"*{endings[0]}")
        raise ValueError(f"{what}: name one of them, as in '{pattern}'")
    return list(found)


def walk(
    folder: str | Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, each once, with the names of its files; no hidden ones.

    It follows links, because data and runs may lie on another disk. Links may form a circle.
    """
    seen = set()
    for root, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        new = (real := os.path.realpath(root)) not in seen
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        if new:
            yield root, [name for name in names if name[0] != "."]


def local_names(paths: Sequence[str]) -> list[str]:
    """Return the paths relative to the folder that holds all of them, with /."""
    full = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in full]


def source_folder(paths: Iterable[str]) -> str:
    """Return a name for the shards of local files.

    corpus/books.jsonl.gz: books; corpus, corpus/*.txt, corpus/**/*.txt, several files in corpus:
    corpus.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(path))) for path in paths]
    if len(paths) == 1 and (paths[0].exists() or not glob.has_magic(str(paths[0]))):
        name = paths[0].name if paths[0].is_dir() else paths[0].name.split(".")[0]
        return name or "files"
    fixed = [
        itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts)
        for path in paths
    ]
    return Path(os.path.commonpath([Path(*parts) for parts in fixed])).name or "files"
