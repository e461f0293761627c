"""Token shards and their manifest: write, check and read them.

A shard is a row of uint16 tokens in a `.npy` file, or in a `.bin` file of llm.c. The manifest lists
the shards of a folder with their token counts and sha256.
"""

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

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"  # its name until all shards are written

# -----------------------------------------------------------------------------
# writing and checking


def shard_header(tokens: int, format: str) -> bytes:
    """Return the bytes that precede the tokens in a shard file (`format`: npy or bin)."""
    if format == "bin":  # llm.c: magic, version, token count in 256 int32
        return np.array([20240520, 1, tokens] + [0] * 253, "<i4").tobytes()
    header, layout = io.BytesIO(), {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write a shard in the format of its suffix; return the sha256 of the file."""
    header = shard_header(len(tokens), path.suffix[1:])
    return write_atomically(path, header, memoryview(tokens.astype("<u2", copy=False)).cast("B"))


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the folder's manifest, or None, and whether it is finished.

    Raises ValueError if the manifest is not JSON.
    """
    for name in MANIFEST, PARTIAL:
        try:
            return json.loads((folder / name).read_bytes()), name == MANIFEST
        except FileNotFoundError:
            continue
        except ValueError:
            raise ValueError(f"{folder / name} is damaged") from None
    return None, False


def write_manifest(folder: Path, manifest: dict[str, Any], finished: bool = False) -> None:
    """Write the manifest, with the sum of its tokens. A finished one gets its final name."""
    manifest["tokens"] = sum(shard["tokens"] for shard in manifest["shards"])
    write_atomically(folder / PARTIAL, (json.dumps(manifest, indent=1) + "\n").encode())
    if finished:
        os.replace(folder / PARTIAL, folder / MANIFEST)


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


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard (uint16). Raises ValueError if it is damaged."""
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
            raise ValueError("its length differs from its header")
        if hasattr(mmap, "MADV_RANDOM"):  # a window is a page or two: no read-ahead of megabytes
            tokens.base.madvise(mmap.MADV_RANDOM)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises many types of error for a damaged header
        raise ValueError(f"{path}: not a whole token shard ({error})") from None
    return tokens.view(np.ndarray)  # slices of a memmap object are several times slower


def open_shards(data_dir: Path, split: str, vocab_size: int = 50257) -> list[np.ndarray]:
    """Memory-map the shards of a split in sorted order, after checks that take little time.

    Raises FileNotFoundError or ValueError with the name of the file if a shard is missing or cut
    short, differs from the manifest, or holds ids outside the vocabulary. It looks for such ids in
    16 places of each shard; `shard_fault` checks all tokens.
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
    """Return a hash of the data: sha256 of the manifest, else of the shards' names and sizes."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    manifest = data_dir / MANIFEST
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(p for p in data_dir.iterdir() if p.suffix in (".npy", ".bin"))
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


def data_source(data_dir: Path) -> str | None:
    """Return the source of the tokens from their manifest, None without a readable manifest."""
    try:
        return json.loads((data_dir / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
