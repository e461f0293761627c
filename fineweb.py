"""
Text to token shards, with the GPT-2 BPE:

    python fineweb.py                                FineWeb-Edu, 10 billion tokens, from the hub
    python fineweb.py --source 'corpus/*.parquet'    local .parquet, .jsonl, .txt (.gz, .zst too)
    python fineweb.py --source pydocs                docstrings of installed Python packages
    python fineweb.py --verify --out_dir DIR         check the shards in a folder

The source is cut into units: some rows of parquet, a range of lines, or a text file. Each worker
reads and tokenises one unit at a time. The main process takes the tokens in source order, packs
them into shards and writes these. The manifest records where in the source each shard ends. So the
same command carries on after an interruption, and it can make a single damaged shard again.
"""

import bisect
import contextlib
import glob
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.cli import advice, outlive_console, run_command, say
from common.corpus import Source, Unit, blame, file_kind, find_source, source_units, unit_texts
from common.files import locked
from common.hub import retry
from common.shards import MANIFEST, read_manifest, shard_fault, write_manifest, write_shard
from common.tokenizer import EOT, RANKS_SHA256, encode
from common.workers import count_cores, worker_pool

# -----------------------------------------------------------------------------
# configuration

FINEWEB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Turn text into shards of GPT-2 tokens."""

    source: str = "hub"  # hub, pydocs, or a file or glob of .parquet, .jsonl, .txt (also .gz, .zst)
    dataset: str = FINEWEB  # data set on the hub
    name: str | None = None  # its configuration (sample-10BT for FineWeb-Edu, else its default)
    split: str = "train"  # split of the data set
    text_column: str = "text"  # parquet column or JSON field that holds the text
    out_dir: Path | None = None  # folder (edu_fineweb10B for the default data, else data/<source>)
    shard_size: int = 100_000_000  # tokens per shard
    max_tokens: int | None = None  # stop after this many tokens
    num_proc: int = field(default_factory=count_cores)  # worker processes (one for each core)
    format: Literal["npy", "bin"] = "npy"  # bin: the format of llm.c and modded-nanogpt
    retry_minutes: float = 30  # how long to try again while the hub fails
    verify: bool = False  # only check the shards in out_dir against their manifest

    def __post_init__(self):
        least = {"shard_size": 2, "max_tokens": 2, "num_proc": 1, "retry_minutes": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"--{name} is {given}: make it {value} or more")

    @property
    def config_name(self) -> str | None:
        return self.name or (SAMPLE if self.dataset == FINEWEB else None)

    @property
    def folder(self) -> Path:
        if self.out_dir:
            return self.out_dir
        if self.source == "hub":
            if (self.dataset, self.config_name) == (FINEWEB, SAMPLE):
                return Path("edu_fineweb10B")
            name = "-".join(filter(None, [self.dataset.split("/")[-1], self.config_name]))
        else:  # corpus/*.parquet: data/corpus, corpus/books.jsonl.gz: data/books
            path = Path(self.source).resolve()
            name = path.parent.name if glob.has_magic(path.name) else path.name.split(".")[0]
        return Path("data", name)


# -----------------------------------------------------------------------------
# packing


def pack_shards(
    documents: Iterable[np.ndarray | list[int]], shard_size: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yield shards of `shard_size` uint16 tokens; the last holds the rest.

    The documents come without <|endoftext|>. One is put before each document, even an empty one.
    The first `skip` tokens of the result are left out. A full shard is yielded only when there is
    a token for the next one, so the last shard is never empty.
    """
    shard, filled = np.empty(shard_size, np.uint16), 0
    for document in documents:
        for piece in np.array([EOT], np.uint16), np.asarray(document, np.uint16):
            piece, skip = piece[skip:], max(0, skip - len(piece))
            while len(piece):
                if filled == shard_size:
                    yield shard
                    shard, filled = np.empty(shard_size, np.uint16), 0
                room = shard_size - filled
                shard[filled : filled + len(piece)] = piece[:room]
                filled, piece = min(shard_size, filled + len(piece)), piece[room:]
    if filled:
        yield shard[:filled]


def take_tokens(documents: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield documents until they hold `count` tokens; cut the last one.

    The <|endoftext|> before each document counts as one token.
    """
    for document in documents:
        yield document[: count - 1]
        count -= 1 + len(document)
        if count <= 0:
            return


# -----------------------------------------------------------------------------
# workers


def tokenize_unit(source: Source, unit: Unit) -> tuple[np.ndarray | None, int]:
    """Return the tokens of a unit and the number of its nulls (rows without text).

    EOT stands between documents, not before the first. The tokens are None if no row has text.
    """
    parts, nulls = [], 0
    with blame(source.files[unit.file][0]):
        for text in unit_texts(source, unit):
            if text is None:
                nulls += 1
            else:
                parts += [np.array([EOT], np.uint16), encode(text)]
    return np.concatenate(parts[1:]) if parts else None, nulls


class TokenStream:
    """The tokens of the source, starting at a place, unit by unit in order, made by the workers.

    A place is [file number, start of a unit in this file, tokens after this start].
    """

    def __init__(self, config: DataConfig, source: Source, place: list[int], pool: Executor):
        file, start, self.skip = place  # skipped tokens belong to the shard before
        self.source, self.pool, self.retry_minutes = source, pool, config.retry_minutes
        self.units = source_units(replace(source, retry_minutes=config.retry_minutes), file, start)
        self.in_flight = 2 * config.num_proc + 2  # units at once: a limit on memory
        self.starts = [(0, file, start)]  # per unit: tokens before it in the stream, file, start
        self.tokens = self.nulls = 0
        self.read, self.to_read = 0.0, sum(size for _, size in source.files[file:])

    def __iter__(self) -> Iterator[np.ndarray]:
        flight, failed = deque(), False

        def submit(unit: Unit) -> tuple[Unit, Future]:
            return unit, self.pool.submit(tokenize_unit, self.source, unit)

        def first_result() -> tuple[np.ndarray | None, int]:
            nonlocal failed
            for i, (unit, result) in enumerate(flight if failed else ()):
                if result.done() and result.exception():  # submit all failed units again together
                    flight[i] = submit(unit)
            failed = True
            result = flight[0][1].result()
            failed = False
            return result

        while True:
            while len(flight) < self.in_flight and (unit := next(self.units, None)):
                flight.append(submit(unit))
            if not flight:
                return
            tokens, nulls = retry(first_result, self.retry_minutes)
            unit, _ = flight.popleft()
            self.starts.append((self.tokens, unit.file, unit.start))
            self.read += unit.share * self.source.files[unit.file][1]
            self.nulls += nulls
            if tokens is not None:
                self.tokens += 1 + len(tokens)
                yield tokens

    def place(self, tokens: int) -> list[int]:
        """Return the place after `tokens` tokens of the stream; `tokens` must not decrease."""
        del self.starts[: bisect.bisect_right(self.starts, (tokens, 1 << 62)) - 1]
        before, file, start = self.starts[0]
        return [file, start, tokens - before]

    def expected_tokens(self) -> int:
        """Estimate the tokens of the whole stream from the part read so far."""
        return int((self.tokens - self.skip) * max(1.0, self.to_read / (self.read or self.to_read)))


# -----------------------------------------------------------------------------
# the run

AFTER_DISK_FULL = "make room and run the same command to carry on (finished shards are kept)"


def check_space(config: DataConfig, source: Source, done: int) -> None:
    """Print how much disk space the shards need; raise OSError if there is less.

    This is an estimate: FineWeb-Edu has 0.35 tokens per byte of parquet, English text has 0.25
    tokens per byte.
    """
    ratios = {"parquet": 0.35, "gzip": 0.75, "zstd": 0.75}
    tokens = 0.0
    for path, size in source.files:
        kind, compression = file_kind(path)
        tokens += size * ratios.get(compression or kind, 0.25)
    need = 2 * (min(tokens, config.max_tokens or tokens) - done)
    free = shutil.disk_usage(config.folder).free
    say(f"{config.folder}: about {need / 1e9:.2f} GB to write, {free / 1e9:.0f} GB free")
    if need > free:
        raise OSError(f"{config.folder}: the disk is too small: make room, or set --max_tokens")


def run_manifest(
    config: DataConfig, source: Source, manifest: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest of this run, a new one for a new folder.

    Raises ValueError if the given manifest was made with other settings.
    """
    settings = {
        "source": source.name,
        "text_column": config.text_column,
        "tokenizer": f"gpt2 {RANKS_SHA256}",
        "shard_size": config.shard_size,
        "max_tokens": config.max_tokens,
        "format": config.format,
        "revision": source.revision,
    }
    for key, value in settings.items() if manifest else ():
        if manifest.get(key) != value:
            what = f"{config.folder} was made with {key} {manifest.get(key)}, not {value}"
            raise ValueError(f"{what}: choose another --out_dir, or delete it")
    # only the names of local files: the folder may be given to others
    files = [[path if source.dataset else Path(path).name, size] for path, size in source.files]
    return manifest or {**settings, "files": files, "tokens": 0, "shards": []}


def tokenize(config: DataConfig) -> None:
    """Make the shards of a source: start, continue after a stop, or repair damaged ones."""
    folder = config.folder
    with contextlib.ExitStack() as stack:
        in_use = "wait until it ends, or choose another --out_dir"
        with advice(in_use, ValueError), advice("choose another --out_dir", OSError):
            stack.enter_context(locked(folder))
        with advice(f"restore it, or delete {folder} and start again"):
            manifest, finished = read_manifest(folder)
        try:
            source = find_source(
                config.source,
                dataset=config.dataset,
                name=config.config_name,
                split=config.split,
                text_column=config.text_column,
                retry_minutes=config.retry_minutes,
                manifest=manifest,
            )
            manifest = run_manifest(config, source, manifest)
            shards = manifest["shards"]
            damaged = [i for i, shard in enumerate(shards) if shard_fault(folder, shard, False)]
            if (
                not finished and source.name != "pydocs"
            ):  # a few MB; the size is known only when they are made
                check_space(config, source, manifest["tokens"])
            # a pool starts its processes only when there is work
            with worker_pool(config.num_proc) as pool:
                for index in damaged:
                    repair_shard(config, manifest, source, index, pool)
                if not finished:
                    make_shards(config, manifest, source, pool)
        except BrokenProcessPool:
            what = "a worker process died, perhaps because memory ran out"
            raise OSError(f"{what}: try a lower --num_proc") from None
        except (ConnectionError, TimeoutError) as error:
            done = len(manifest["shards"]) if manifest else 0
            kept = f", {done} shards in {folder} are kept" if done else ""
            raise OSError(f"{error}{kept}: run the same command to carry on") from None
    say(f"{folder}: finished, {manifest['tokens']:,} tokens in {len(shards)} shards")


def make_shards(
    config: DataConfig, manifest: dict[str, Any], source: Source, pool: Executor
) -> None:
    """Write the shards that the manifest does not have yet."""
    from tqdm import tqdm

    shards, done, began = manifest["shards"], manifest["tokens"], time.monotonic()
    stream = TokenStream(config, source, shards[-1]["end"] if shards else [0, 0, 0], pool)
    limit, given, place = config.max_tokens or 1 << 62, 0, stream.skip

    def documents() -> Iterator[np.ndarray]:
        nonlocal given
        for tokens in take_tokens(stream, stream.skip + limit - done) if done < limit else ():
            bar.total = min(limit, done + stream.expected_tokens())
            bar.update(1 + len(tokens))
            given += 1 + len(tokens)
            yield tokens

    with tqdm(initial=done, unit=" tokens", unit_scale=True, disable=None) as bar:
        for tokens in pack_shards(documents(), config.shard_size, stream.skip):
            all_in_one = not shards and given == len(tokens) > 1
            cut = len(tokens) // 10 or 1  # the validation part of a source that fits in one shard
            for part in (tokens[:cut], tokens[cut:]) if all_in_one else (tokens,):
                split = "train" if shards else "val"
                name = f"edufineweb_{split}_{len(shards):06d}.{config.format}"
                place += len(part)
                with advice(AFTER_DISK_FULL):
                    sha256, end = write_shard(config.folder / name, part), stream.place(place)
                    shards.append({"name": name, "tokens": len(part), "sha256": sha256, "end": end})
                    write_manifest(config.folder, manifest)
                rate = (manifest["tokens"] - done) / (time.monotonic() - began)
                say(f"{name}: {len(part):,} tokens; {rate:,.0f} tokens a second so far")
            del tokens, part  # frees the memory before the next shard fills
    if not shards:
        raise ValueError(f"{config.source} holds no text: check the file, or --text_column")
    with advice(AFTER_DISK_FULL):
        write_manifest(config.folder, manifest, finished=True)
    if stream.nulls:
        say(f"{stream.nulls:,} rows or files without text were left out")


def repair_shard(
    config: DataConfig, manifest: dict[str, Any], source: Source, index: int, pool: Executor
) -> None:
    """Make a damaged shard of the manifest again; its sha256 must be the recorded one."""
    shards = manifest["shards"]
    shard, path = shards[index], config.folder / shards[index]["name"]
    stream = TokenStream(config, source, shards[index - 1]["end"] if index else [0, 0, 0], pool)
    documents = take_tokens(stream, stream.skip + shard["tokens"])
    tokens = next(pack_shards(documents, shard["tokens"], stream.skip))
    with advice(AFTER_DISK_FULL):
        sha256 = write_shard(path, tokens)
    if sha256 != shard["sha256"]:
        path.unlink()
        raise ValueError(f"{path}: the source has changed: delete {config.folder} and start again")
    Path(f"{path}.damaged").unlink(missing_ok=True)
    say(f"{path.name}: made again")


def verify(config: DataConfig) -> None:
    """Check every shard against the manifest; rename damaged ones to NAME.damaged.

    Raises ValueError with their names. The next run finds them missing and makes them again.
    """
    from tqdm import tqdm

    folder, faults = config.folder, []
    with advice(f"restore it, or delete {folder} and make it again"):
        manifest, _ = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: name the folder with --out_dir")
    with tqdm(total=manifest["tokens"], unit=" tokens", unit_scale=True, disable=None) as bar:
        for shard in manifest["shards"]:
            if fault := shard_fault(folder, shard):
                faults.append(f"{shard['name']} ({fault})")
                if (path := folder / shard["name"]).exists():
                    path.replace(f"{path}.damaged")
            bar.update(shard["tokens"])
    if faults:
        count = f"{len(faults)} of {len(manifest['shards'])}"
        names = f"{count} shards are damaged: {', '.join(faults)}"
        raise ValueError(f"{folder}: {names}: run the command that made them to repair them")
    say(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, all whole")


def main() -> None:
    """Tokenise, or with --verify check the shards."""
    outlive_console("stdout", "stderr")
    try:
        run_command(DataConfig, lambda config: (verify if config.verify else tokenize)(config))
    except KeyboardInterrupt:
        print("\nstopped: the same command continues after the last whole shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
