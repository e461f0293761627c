"""Token shards and their manifest: write, check and read them.

A shard is a row of uint16 tokens in a `.npy` file, or in a `.bin` file of llm.c. The manifest lists
the shards of a folder with their token counts and sha256. Token files of llm.c and nanoGPT are read
too: they have no manifest.
"""

import bisect
import hashlib
import io
import itertools
import json
import mmap
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replace, write_atomically
from common.tokenizer import EOT

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"  # its name until all shards are written

# -----------------------------------------------------------------------------
# packing


def pack_shards(
    pieces: Iterable[np.ndarray],
    shard_size: int,
    skip: int = 0,
    empty: Callable[[int, type], np.ndarray] = np.empty,
) -> Iterator[np.ndarray]:
    """Yield shards of `shard_size` uint16 tokens; the last holds the rest.

    The first `skip` tokens are left out. A full shard is yielded only when there is a token for the
    next one, so the last shard is never empty. `empty` gives the memory of a shard.
    """
    shard, filled = empty(shard_size, np.uint16), 0
    for piece in pieces:
        piece, skip = piece[skip:], max(0, skip - len(piece))
        while len(piece):
            if filled == shard_size:
                yield shard
                shard, filled = empty(shard_size, np.uint16), 0
            room = shard_size - filled
            shard[filled : filled + len(piece)] = piece[:room]
            filled, piece = min(shard_size, filled + len(piece)), piece[room:]
    if filled:
        yield shard[:filled]


def take_tokens(pieces: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield pieces until they hold `count` tokens; cut the last one."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return


# -----------------------------------------------------------------------------
# writing and checking


def shard_header(tokens: int, format: str) -> bytes:
    """Return the bytes that precede the tokens in a shard file (`format`: npy or bin)."""
    if format == "bin":  # llm.c: magic, version, token count in 256 int32
        return np.array([20240520, 1, tokens] + [0] * 253, "<i4").tobytes()
    header, layout = io.BytesIO(), {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def shard_name(index: int, format: str) -> str:
    """Return the file name of a shard; the first one is for validation."""
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.{format}"


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write a shard in the format of its suffix; return the sha256 of the file."""
    header = shard_header(len(tokens), path.suffix[1:])
    return write_atomically(path, header, memoryview(tokens.astype("<u2", copy=False)).cast("B"))


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the folder's manifest, or None, and whether it is finished.

    Raises ValueError if the manifest is damaged.
    """
    for name in MANIFEST, PARTIAL:
        try:
            manifest = json.loads((folder / name).read_bytes())
            shards = manifest["shards"]
            whole = isinstance(shards, list) and all(
                type(shard["tokens"]) is int and isinstance(shard["name"] + shard["sha256"], str)
                for shard in shards
            )
            tokens = sum(shard["tokens"] for shard in shards)
            # a finished one has shards
            if whole and manifest["tokens"] == tokens and (shards or name == PARTIAL):
                return manifest, name == MANIFEST
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise ValueError(f"{folder / name} is damaged")
    return None, False


def write_manifest(folder: Path, manifest: dict[str, Any], finished: bool = False) -> None:
    """Write the manifest, with the sum of its tokens. A finished one gets its final name."""
    manifest["tokens"] = sum(shard["tokens"] for shard in manifest["shards"])
    write_atomically(folder / PARTIAL, (json.dumps(manifest, indent=1) + "\n").encode())
    if finished:
        replace(folder / PARTIAL, folder / MANIFEST)


def shard_fault(folder: Path, shard: dict[str, Any], thorough: bool = True) -> str | None:
    """Return what is wrong with a shard on disk, or None. If not `thorough`, check only its length.

    `shard` is its entry in the manifest.
    """
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
                return f"token id {top}, above {EOT}"
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                return "sha256 differs"
    return None


# -----------------------------------------------------------------------------
# reading

# The header of an llm.c file begins with a number that says what it holds.
LLMC_TOKENS = (20240520, 1)  # and the version
LLMC_OTHERS = {
    20240326: "a model of llm.c",
    20240327: "a model of llm.c with its gradients",
    20240328: "a tokenizer of llm.c",
    20240522: "questions of HellaSwag or MMLU, of llm.c",
    20240801: "32-bit tokens of Llama 3, of llm.c",
}
RAW = ("train.bin", "val.bin")  # nanoGPT's names: uint16 tokens without a header

# <anything>_train_<anything>, train_000001: shards. <anything>_train, train: a split in one file.
SHARD_NAME = re.compile(r"(?:(?P<set>.*)_)?(?P<split>train|val)_(?(set).*|\d+)\.(?:npy|bin)")
WHOLE_NAME = re.compile(r"(?:(?P<set>.*)_)?(?P<split>train|val)\.bin")


def token_files(data_dir: Path) -> dict[str, list[Path]]:
    """Return the token files of each split (train, val) in sorted order.

    Their names show which: `*_train_*.npy`, `*_train_*.bin`, or one file for the whole split,
    as llm.c (`*_train.bin`) and nanoGPT (`train.bin`) write it. Raises ValueError if files of
    whole splits are there that do not belong together.
    """
    found: dict[str, list[Path]] = {"train": [], "val": []}
    whole, sets = set(), {}
    for path in sorted(data_dir.iterdir() if data_dir.is_dir() else ()):
        in_one = WHOLE_NAME.fullmatch(path.name)
        # macOS puts a file ._NAME beside each NAME on a disk of another system
        if (name := in_one or SHARD_NAME.fullmatch(path.name)) and not path.name.startswith("."):
            found[name["split"]].append(path)
            sets.setdefault(name["set"], path)
            if in_one:
                whole.add(name["split"])
    for paths in [list(sets.values()), *(found[split] for split in whole)] if whole else ():
        if len(paths) > 1:
            names = f"{paths[0].name} and {paths[1].name}"
            raise ValueError(f"{data_dir}: {names} are not parts of the same data")
    return found


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard (uint16). Raises ValueError if it is damaged."""
    try:
        if path.suffix == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        else:
            tokens = read_bin(path)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{tokens.ndim}-dimensional {tokens.dtype}, not a row of uint16")
        if tokens.nbytes + tokens.offset != path.stat().st_size:
            raise ValueError("its length differs from its header")
        if hasattr(mmap, "MADV_RANDOM"):  # a window is a page or two: no read-ahead of megabytes
            tokens.base.madvise(mmap.MADV_RANDOM)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises many types of error for a damaged header
        raise ValueError(f"{path}: not a whole token shard ({error})") from None
    return tokens.view(np.ndarray)  # slices of a memmap object are several times slower


def read_bin(path: Path) -> np.memmap:
    """Memory-map the tokens of a .bin file of llm.c or nanoGPT. ValueError says what else it is."""
    header = np.fromfile(path, dtype="<i4", count=256)
    kind = tuple(int(number) for number in header[:2])
    if kind == LLMC_TOKENS:
        if len(header) < 256:
            raise ValueError("its header is cut short")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(int(header[2]),))
    if kind[:1] == LLMC_TOKENS[:1]:
        raise ValueError("another version than 1 of llm.c's format: 7 has 32-bit ids of Llama 3")
    if kind and 20240101 <= kind[0] <= 20241231:  # no raw tokens: the first id is above 50256
        raise ValueError(LLMC_OTHERS.get(kind[0], f"a file of llm.c of kind {kind[0]}"))
    if path.name not in RAW:
        raise ValueError("no header of llm.c")
    return np.memmap(path, dtype="<u2", mode="r")


def open_shards(data_dir: Path, split: str, vocab_size: int = 50257) -> list[np.ndarray]:
    """Memory-map the shards of a split in sorted order, after checks that take little time.

    Raises FileNotFoundError or ValueError with the name of the file if a shard is missing or cut
    short, differs from the manifest, or holds ids outside the vocabulary. It looks for such ids in
    16 places of each shard; `shard_fault` checks all tokens. A file without a header is also
    refused if its values look like 32-bit ids, or like those of a much smaller vocabulary.
    """
    paths = token_files(data_dir)[split]
    if not paths:
        others = f"and no *_{split}.bin or {split}.bin"
        raise FileNotFoundError(f"{data_dir}: no *_{split}_* shards, {others}")
    shards = {path.name: read_shard(path) for path in paths}
    manifest = data_dir / MANIFEST
    if manifest.exists():
        try:
            promised = {s["name"]: s["tokens"] for s in json.loads(manifest.read_bytes())["shards"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{manifest}: damaged") from None
        for name, tokens in promised.items():
            if f"_{split}_" in name and (name not in shards or len(shards[name]) != tokens):
                found = len(shards[name]) if name in shards else "no"
                raise ValueError(f"{data_dir / name}: {found} tokens, {tokens} in {MANIFEST}")
    for path, shard in zip(paths, shards.values(), strict=True):
        if fault := ids_fault(shard, vocab_size, raw=path.stat().st_size == shard.nbytes):
            raise ValueError(f"{path}: {fault}")
    return list(shards.values())


def ids_fault(shard: np.ndarray, vocab_size: int, raw: bool) -> str | None:
    """Return why a shard cannot hold ids of this vocabulary, or None. `raw`: it has no header."""
    if raw and not shard[1:8192:2].any():
        return "every second value is 0, as in a file of 32-bit ids"
    starts = range(0, len(shard), max(8192, len(shard) // 16))
    top = max((int(shard[start : start + 8192].max()) for start in starts), default=0)
    if top >= vocab_size:
        return f"token id {top}, but vocab_size is {vocab_size}"
    # 200 tokens of English reach id 40,000 of GPT-2's 50,257. A file of characters ends at 64.
    if raw and top < vocab_size // 8:
        return f"the largest token id is {top}, too small for a vocab_size of {vocab_size}"
    return None


def fingerprint(data_dir: Path) -> str:
    """Return a hash of the data: sha256 of the manifest, else of the shards' names and sizes."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    manifest = data_dir / MANIFEST
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(path for paths in token_files(data_dir).values() for path in paths)
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


def data_source(data_dir: Path) -> str | None:
    """Return the source of the tokens from their manifest, None without a readable manifest."""
    try:
        return json.loads((data_dir / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -----------------------------------------------------------------------------
# the validation split of a small source

VAL_SHARE = 10  # a source of less than ten shards gives a tenth of its tokens for validation
# folder of new shards, and flag in the manifest, while a small source is cut again
CUT = "edufineweb_cut"


def cut_validation(folder: Path, manifest: dict[str, Any]) -> None:
    """Cut the shards of a small source again, so that a tenth of its tokens is for validation.

    How many tokens a source has is only known at its end. Until then its first shard is as long as
    the others. The new shards are written to a folder of their own before they replace the old
    ones. So a run that is killed at any moment has all old or all new shards.
    """
    old, shards, new = manifest["shards"], [], folder / CUT
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    ends = list(itertools.accumulate((shard["tokens"] for shard in old), initial=0))
    first, at = max(1, ends[-1] // VAL_SHARE), 0

    def tokens() -> Iterator[np.ndarray]:  # one file is mapped at a time
        return (read_shard(folder / shard["name"]) for shard in old)

    val = itertools.islice(pack_shards(tokens(), first), 1)
    train = pack_shards(tokens(), manifest["shard_size"], skip=first)
    for part in itertools.chain(val, train):
        name, at = shard_name(len(shards), manifest["format"]), at + len(part)
        shard = {"name": name, "tokens": len(part), "sha256": write_shard(new / name, part)}
        # where it ends in the source: the end of an old shard, and some tokens more
        before = bisect.bisect_right(ends, at) - 1
        known = {
            k: old[before - 1][k] for k in ("end", "counts") if before and k in old[before - 1]
        }
        *place, skip = known.get("end", [0, 0, 0])
        shards.append(shard | known | {"end": [*place, skip + at - ends[before]]})
    del val, train, part  # Windows does not replace a file that is mapped
    manifest |= {"shards": shards, CUT: True}
    write_manifest(folder, manifest)
    finish_cut(folder, manifest)


def finish_cut(folder: Path, manifest: dict[str, Any]) -> None:
    """Put the shards of `cut_validation` in place, if the manifest has them already."""
    if manifest.pop(CUT, False):
        for path in (folder / CUT).glob("edufineweb_*"):
            replace(path, folder / path.name)
    shutil.rmtree(folder / CUT, ignore_errors=True)
