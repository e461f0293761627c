import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np


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
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises many kinds on a damaged header
        raise ValueError(f"{path}: not a whole token shard ({error}): make it again") from None
    return tokens


def open_shards(data_dir: Path, split: str, vocab_size: int = 50257) -> list[np.ndarray]:
    """Memory-map a split's shards in sorted order, after every check that costs next to nothing.

    Raises FileNotFoundError or ValueError, naming file and remedy, where a shard is missing or cut
    short, disagrees with the manifest, or holds ids outside the vocabulary (looked for in 16
    places of each shard; `--verify` looks everywhere).
    """
    paths = sorted(p for p in data_dir.glob(f"*_{split}_*") if p.suffix in (".npy", ".bin"))
    if not paths:
        raise FileNotFoundError(f"{data_dir}: no *_{split}_* shards: make them with fineweb.py")
    shards = {path.name: read_shard(path) for path in paths}
    manifest = data_dir / "manifest.json"
    if manifest.exists():
        try:
            promised = {s["name"]: s["tokens"] for s in json.loads(manifest.read_bytes())["shards"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{manifest}: damaged: make the data again") from None
        for name, tokens in promised.items():
            if f"_{split}_" in name and (name not in shards or len(shards[name]) != tokens):
                found = len(shards[name]) if name in shards else "no"
                raise ValueError(
                    f"{data_dir / name}: {found} tokens, {tokens} in manifest.json: "
                    "run fineweb.py again to repair it"
                )
    for name, shard in shards.items():
        stride = max(4096, len(shard) // 16)
        for start in range(0, len(shard), stride):
            top = int(shard[start : start + min(stride, 65536)].max())
            if top >= vocab_size:
                raise ValueError(
                    f"{data_dir / name}: token id {top}, but vocab_size is {vocab_size}: "
                    "make the data again with the GPT-2 tokenizer, or give --vocab_size"
                )
    return list(shards.values())


def fingerprint(data_dir: Path) -> str:
    """Identify the data: the manifest's sha256, or one over the shards' names and sizes."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder: make the data with fineweb.py")
    manifest = data_dir / "manifest.json"
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    paths = sorted(p for p in data_dir.iterdir() if p.suffix in (".npy", ".bin"))
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


@contextlib.contextmanager
def atomic_write(path):
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
