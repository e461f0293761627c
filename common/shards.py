"""Token files and their manifest: written, checked, read."""

import hashlib
import io
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomically
from common.tokenizer import EOT

MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"


# -----------------------------------------------------------------------------
# writing and checking


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
            raise ValueError(f"{folder / name} is damaged") from None
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


# -----------------------------------------------------------------------------
# reading


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
        raise ValueError(f"{path}: not a whole token shard ({error})") from None
    return tokens.view(np.ndarray)  # slicing a memmap as such is several times slower


def open_shards(data_dir: Path, split: str, vocab_size: int = 50257) -> list[np.ndarray]:
    """Memory-map a split's shards in sorted order, after every check that costs next to nothing.

    Raises FileNotFoundError or ValueError, naming file and remedy, where a shard is missing or cut
    short, disagrees with the manifest, or holds ids outside the vocabulary (looked for in 16
    places of each shard; `--verify` looks everywhere).
    """
    paths = sorted(p for p in data_dir.glob(f"*_{split}_*") if p.suffix in (".npy", ".bin"))
    if not paths:
        raise FileNotFoundError(f"{data_dir}: no *_{split}_* shards")
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
    for name, shard in shards.items():
        for start in range(0, len(shard), max(8192, len(shard) // 16)):
            top = int(shard[start : start + 8192].max())
            if top >= vocab_size:
                raise ValueError(
                    f"{data_dir / name}: token id {top}, but vocab_size is {vocab_size}"
                )
    return list(shards.values())


def fingerprint(data_dir: Path) -> str:
    """Identify the data: the manifest's sha256, or one over the shards' names and sizes."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    manifest = data_dir / MANIFEST
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(p for p in data_dir.iterdir() if p.suffix in (".npy", ".bin"))
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


def data_source(data_dir: Path) -> str | None:
    """Return where the tokens came from, as their manifest has it; None where there is none."""
    try:
        return json.loads((data_dir / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
