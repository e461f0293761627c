"""
Text to token shards, with the GPT-2 BPE:

    python fineweb.py                                FineWeb-Edu, 10 billion tokens, from the hub
    python fineweb.py --source corpus/*.parquet      your files (docs/inputs.md lists the formats)
    python fineweb.py --source pydocs                the prose in installed Python packages
    python fineweb.py --verify --out_dir DIR         check the shards in a folder

The source is cut into units: some rows of parquet, a range of lines, or a part of a text. Each
worker reads and tokenises one unit at a time. The main process takes the tokens in source order,
packs them into shards and writes these. The manifest records where in the source each shard ends.
So the same command carries on after an interruption, and it can make a single damaged shard again.
"""

import bisect
import contextlib
import itertools
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from common.cli import advice, outlive_console, run_command, say
from common.corpus import Source, Unit, file_kind, find_source, source_units
from common.files import locked
from common.hub import AHEAD, retry
from common.paths import local_names, source_folder
from common.shards import (
    CUT,
    MANIFEST,
    VAL_SHARE,
    cut_validation,
    finish_cut,
    pack_shards,
    read_manifest,
    shard_fault,
    shard_name,
    take_tokens,
    write_manifest,
    write_shard,
)
from common.tokenizer import RANKS_SHA256, Engine, GigatokenError, choose_engine
from common.unit_tokens import UnitTokens, alone, chars_to_compare, tokenize_unit
from common.workers import count_cores, unpack, worker_pool

# -----------------------------------------------------------------------------
# configuration

FINEWEB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Turn text into shards of GPT-2 tokens."""

    source: tuple[str, ...] = ("hub",)  # hub, pydocs, or files, folders, globs (docs/inputs.md)
    dataset: str = FINEWEB  # data set on the hub
    name: str | None = None  # its configuration (sample-10BT for FineWeb-Edu, else its default)
    split: str = "train"  # split of the data set
    text_column: str = "text"  # column or field that holds the text (meta.text: text inside meta)
    out_dir: Path | None = None  # folder (edu_fineweb10B for the default data, else data/<source>)
    shard_size: int = 100_000_000  # tokens per shard
    max_tokens: int | None = None  # stop after this many tokens
    num_proc: int = field(default_factory=count_cores)  # worker processes (one for each core)
    format: Literal["npy", "bin"] = "npy"  # bin: the format of llm.c and modded-nanogpt
    on_error: Literal["stop", "skip"] = "stop"  # skip: leave out lines that cannot be read
    split_eot: Literal["auto", "on", "off"] = "auto"  # a written <|endoftext|> ends a document?
    retry_minutes: float = 30  # how long to try again while the hub fails
    verify: bool = False  # only check the shards in out_dir against their manifest

    def __post_init__(self):
        if not self.source:
            raise ValueError("--source has no value: name files, folders, hub or pydocs")
        least = {"shard_size": 2, "max_tokens": 2, "num_proc": 1, "retry_minutes": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and not value <= given < 1e15:
                raise ValueError(f"--{name} is {given}: make it {value} or more, up to 1e15")

    @property
    def config_name(self) -> str | None:
        return self.name or (SAMPLE if self.dataset == FINEWEB else None)

    @property
    def folder(self) -> Path:
        if self.out_dir:
            return self.out_dir
        if self.source == ("hub",):
            if (self.dataset, self.config_name) == (FINEWEB, SAMPLE):
                return Path("edu_fineweb10B")
            name = "-".join(filter(None, [self.dataset.split("/")[-1], self.config_name]))
        else:
            name = source_folder(self.source)
        return Path("data", name)


# -----------------------------------------------------------------------------
# the stream


class TokenStream:
    """The tokens of the source, starting at a place, unit by unit in order, made by the workers.

    A place is [file number, start of a unit in this file, tokens after this start].
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        shard: dict[str, Any] | None,
        pool: Executor,
        engine: Engine,
    ):
        """Start after a shard, given by its entry in the manifest, or at the beginning."""
        shard = shard or {"end": [0, 0, 0]}
        file, start, self.skip = shard["end"]  # skipped tokens belong to the shard before
        self.config, self.source, self.pool, self.engine = config, source, pool, engine
        self.units = source_units(replace(source, retry_minutes=config.retry_minutes), file, start)
        self.in_flight = 2 * config.num_proc + 2  # units at once: a limit on memory
        self.ahead = AHEAD * config.num_proc if source.dataset else 0  # units known beyond those
        self.tokens, self.counts = 0, Counter(shard.get("counts", {}))  # counts of the whole source
        # per unit: tokens before it in the stream, file, start, counts before it
        self.starts = [(0, file, start, self.counts)]
        self.read, self.to_read = 0.0, sum(size for _, size in source.files[file:])
        self.later: deque[Unit] = deque()  # known, but not given to a worker yet
        self.flight: deque[tuple[Unit, tuple, Future]] = deque()  # with the worker's task
        self.given, self.failed = 0.0, False  # bytes given to workers; the first task has failed

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while True:
                while len(self.flight) < self.in_flight and (unit := self.next_unit()):
                    task = self.task(unit)
                    self.flight.append((unit, task, self.pool.submit(tokenize_unit, *task)))
                if not self.flight:
                    return
                packed, counts, faults = retry(self.first_result, self.config.retry_minutes)
                tokens = unpack(packed)
                unit, *_ = self.flight.popleft()
                self.starts.append((self.tokens, unit.file, unit.start, self.counts))
                self.read += unit.share * self.source.files[unit.file][1]
                for fault in faults[: max(0, FAULTS_NAMED - self.counts["skipped"])]:
                    say(f"skipped: {fault}")
                self.counts = self.counts + counts
                self.tokens += len(tokens)
                yield tokens
        finally:  # no more tokens are wanted
            for _, _, result in self.flight:
                if not result.cancel():
                    result.add_done_callback(lambda r: r.exception() or unpack(r.result().tokens))

    def next_unit(self) -> Unit | None:
        """Return the next unit, if there is one. The `ahead` units after it are in `later` then."""
        self.later.extend(itertools.islice(self.units, 1 + self.ahead - len(self.later)))
        return self.later.popleft() if self.later else None

    def task(self, unit: Unit) -> tuple[Any, ...]:
        """Return the arguments of `tokenize_unit`."""
        before = self.given
        self.given += len(unit.data or ()) or unit.share * self.source.files[unit.file][1]
        chars = chars_to_compare(before, self.given)
        nexts = list(self.later)[self.config.num_proc - 1 :: self.config.num_proc]  # of its worker
        nexts = [alone(self.source, each) for each in nexts if not (each.data or each.texts)]
        return *alone(self.source, unit), self.config.split_eot, self.engine, chars, nexts

    def first_result(self) -> UnitTokens:
        """Wait for the first unit in flight. After a failure, first submit failed ones again."""
        for i, (unit, task, result) in enumerate(self.flight if self.failed else ()):
            if result.done() and result.exception():
                self.flight[i] = unit, task, self.pool.submit(tokenize_unit, *task)
        self.failed = True
        result = self.flight[0][2].result()
        self.failed = False
        return result

    def end(self, tokens: int) -> dict[str, Any]:
        """Return for the manifest where a shard ends: after `tokens` tokens of the stream.

        `tokens` must not decrease.
        """
        del self.starts[: bisect.bisect_right(self.starts, (tokens, 1 << 62)) - 1]
        before, file, start, counts = self.starts[0]
        return {"end": [file, start, tokens - before]} | ({"counts": counts} if counts else {})

    def expected_tokens(self) -> int:
        """Estimate the tokens of the whole stream from the part read so far."""
        part = self.read / max(1, self.to_read)  # of the source, as far as it is read
        return int((self.tokens - self.skip) / min(1.0, part or 1.0))


# -----------------------------------------------------------------------------
# the run

COUNTED = {  # what the text had, said at the end
    "empty": "{:,} rows or files without text were left out",
    "skipped": "{:,} lines or files that cannot be read were left out",
    "separators": "{:,} written <|endoftext|> separate documents",
    "marks": "warning: {:,} written <|endoftext|> stay ordinary text (else give --split_eot on)",
}
FAULTS_NAMED = 10  # of the lines that --on_error skip leaves out
NOT_FINISHED = "is not finished: run the command that made it to carry on"
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
    tokens = min(tokens, config.max_tokens or tokens)
    need = 2 * (tokens - done)
    if tokens < VAL_SHARE * config.shard_size:
        need *= 2  # they are written a second time, by cut_validation
    free = shutil.disk_usage(config.folder).free
    say(f"{config.folder}: about {need / 1e9:.2f} GB to write, {free / 1e9:.0f} GB free")
    if need > free:
        raise OSError(f"{config.folder}: the disk is too small: make room, or set --max_tokens")


def run_manifest(
    config: DataConfig, source: Source, manifest: dict[str, Any] | None, finished: bool
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
        "split_eot": config.split_eot,
        "revision": source.revision,
    }
    for key, value in settings.items() if manifest else ():
        if manifest.get(key, value if finished else None) != value:  # older versions have fewer
            what = f"{config.folder} was made with {key} {manifest.get(key)}, not {value}"
            if key == "revision" and source.name == "local":
                what = f"{config.folder} was made from other files, or they have changed since"
            raise ValueError(f"{what}: choose another --out_dir, or delete it")
    paths = [path for path, _ in source.files]
    names = paths if source.dataset else local_names(paths)  # the folder may be given to others
    files = [[name, size] for name, (_, size) in zip(names, source.files, strict=True)]
    return manifest or {**settings, "files": files, "tokens": 0, "shards": []}


def tokenize(config: DataConfig) -> None:
    """Make the shards of a source: start, continue after a stop, or repair damaged ones."""
    folder = config.folder
    with contextlib.ExitStack() as stack:
        in_use = "wait until it ends, or choose another --out_dir"
        with advice(in_use, ValueError), advice("choose another --out_dir", OSError):
            stack.enter_context(locked(folder))
        with advice(f"restore it, or delete {folder} and start again", ValueError):
            manifest, finished = read_manifest(folder)
        try:
            source = find_source(
                config.source,
                dataset=config.dataset,
                name=config.config_name,
                split=config.split,
                text_column=config.text_column,
                retry_minutes=config.retry_minutes,
                on_error=config.on_error,
                manifest=manifest,
            )
            manifest = run_manifest(config, source, manifest, finished)
            finish_cut(folder, manifest)  # of a run that was killed in it
            shards = manifest["shards"]
            damaged = [i for i, shard in enumerate(shards) if shard_fault(folder, shard, False)]
            # pydocs are a few MB, and their size is known only when they are made
            if not finished and source.name != "pydocs":
                check_space(config, source, manifest["tokens"])
            # a pool starts its processes only when there is work
            with worker_pool(config.num_proc, in_turn=bool(source.dataset)) as pool:
                differs = manifest.get("differs")  # from an earlier run that was stopped
                engine, missing = ("tiktoken", differs) if differs else choose_engine()
                if missing and (damaged or not finished):
                    say(f"note: tokenising with tiktoken, which is much slower ({missing})")
                try:
                    for index in damaged:
                        repair_shard(config, manifest, source, index, pool, engine)
                    if not finished:
                        make_shards(config, manifest, source, pool, engine)
                except GigatokenError as error:
                    say(f"{error}: all shards are made with tiktoken")
                    for shard in manifest["shards"]:
                        (folder / shard["name"]).unlink(missing_ok=True)
                    manifest |= {"shards": [], "differs": str(error)}
                    write_manifest(folder, manifest)
                    make_shards(config, manifest, source, pool, "tiktoken")
        except BrokenProcessPool:
            what = "a worker process died, perhaps because memory ran out: try a lower --num_proc"
            raise OSError(what + ", or uninstall gigatoken" * (engine == "gigatoken")) from None
        except (ConnectionError, TimeoutError) as error:
            done = len(manifest["shards"]) if manifest else 0
            kept = f", {done} shards in {folder} are kept" if done else ""
            raise OSError(f"{error}{kept}: run the same command to carry on") from None
    say(f"{folder}: finished, {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards")


def make_shards(
    config: DataConfig, manifest: dict[str, Any], source: Source, pool: Executor, engine: Engine
) -> None:
    """Write the shards that the manifest does not have yet.

    Two threads write shards while the next one fills.
    """
    shards, done, began = manifest["shards"], manifest["tokens"], time.monotonic()
    stream = TokenStream(config, source, shards[-1] if shards else None, pool, engine)
    limit, place, names = config.max_tokens or 1 << 62, stream.skip, itertools.count(len(shards))
    writing, unused = deque(), deque()  # shards: results of `write`, and memory

    def pieces() -> Iterator[np.ndarray]:
        # if all tokens are there, this reads the last unit again, for its counts
        for tokens in take_tokens(stream, stream.skip + limit - done):
            bar.total = min(limit, done + stream.expected_tokens())
            bar.update(len(tokens))
            yield tokens

    def write(name: str, tokens: np.ndarray, end: dict[str, Any], before: Future | None) -> None:
        with advice(AFTER_DISK_FULL):
            sha256 = write_shard(config.folder / name, tokens)
            if before:
                before.result()  # the manifest has the shards in their order
            shards.append({"name": name, "tokens": len(tokens), "sha256": sha256} | end)
            write_manifest(config.folder, manifest)
        rate = (manifest["tokens"] - done) / (time.monotonic() - began)
        say(f"{name}: {len(tokens):,} tokens; {rate:,.0f} tokens a second so far")
        unused.append(tokens)

    def empty(size: int, dtype: type) -> np.ndarray:
        # memory that was used before takes a tenth of the time
        return unused.popleft() if unused else np.empty(size, dtype)

    with (
        tqdm(initial=done, unit=" tokens", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(2) as writer,
    ):
        for tokens in pack_shards(pieces(), config.shard_size, stream.skip, empty):
            place += len(tokens)
            if len(writing) == 2:  # at most three shards are in memory
                writing.popleft().result()
            before = writing[-1] if writing else None
            name = shard_name(next(names), config.format)
            writing.append(writer.submit(write, name, tokens, stream.end(place), before))
        for written in writing:
            written.result()
    unused.clear()  # cut_validation needs memory too
    if not shards:
        what, skipped = f"{' '.join(config.source)} holds no text", stream.counts["skipped"]
        what += f" ({skipped:,} lines skipped)" if skipped else ""
        raise ValueError(f"{what}: check the file, or --text_column")
    manifest |= {"counts": stream.counts} if stream.counts else {}
    manifest.pop("differs", None)
    with advice(AFTER_DISK_FULL):
        if manifest["tokens"] < VAL_SHARE * config.shard_size:
            cut_validation(config.folder, manifest)
            say(f"validation: {manifest['shards'][0]['tokens']:,} tokens, a tenth of all")
        write_manifest(config.folder, manifest, finished=True)
    for name, what in COUNTED.items():
        if count := stream.counts[name]:
            say(what.format(count))


def repair_shard(
    config: DataConfig,
    manifest: dict[str, Any],
    source: Source,
    index: int,
    pool: Executor,
    engine: Engine,
) -> None:
    """Make a damaged shard of the manifest again; its sha256 must be the recorded one."""
    shards = manifest["shards"]
    shard, path = shards[index], config.folder / shards[index]["name"]
    for each in dict.fromkeys([engine, "tiktoken"]):  # which one made it is not known
        stream = TokenStream(config, source, shards[index - 1] if index else None, pool, each)
        pieces = take_tokens(stream, stream.skip + shard["tokens"])
        with contextlib.suppress(GigatokenError), advice(AFTER_DISK_FULL):
            tokens = next(pack_shards(pieces, shard["tokens"], stream.skip))
            if write_shard(path, tokens) == shard["sha256"]:
                Path(f"{path}.damaged").unlink(missing_ok=True)
                say(f"{path.name}: made again")
                return
    path.unlink(missing_ok=True)
    raise ValueError(f"{path}: the source has changed: delete {config.folder} and start again")


def verify(config: DataConfig) -> None:
    """Check every shard against the manifest; rename damaged ones to NAME.damaged.

    Raises ValueError with their names. The next run finds them missing and makes them again.
    """
    folder, faults = config.folder, []
    with contextlib.ExitStack() as stack:
        # new shards of another process would look damaged (OSError: the folder may only be read)
        with advice("wait until it ends", ValueError), contextlib.suppress(OSError):
            stack.enter_context(locked(folder))
        with advice(f"restore it, or delete {folder} and make it again", ValueError):
            manifest, finished = read_manifest(folder)
        if manifest is None:
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: name the folder with --out_dir")
        if CUT in manifest:  # which of its shards are here already is known to the next run
            raise ValueError(f"{folder} {NOT_FINISHED}")
        with tqdm(total=manifest["tokens"], unit=" tokens", unit_scale=True, disable=None) as bar:
            for shard in (shards := manifest["shards"]):
                if fault := shard_fault(folder, shard):
                    faults.append(f"{shard['name']} ({fault})")
                    if (path := folder / shard["name"]).exists():
                        path.replace(f"{path}.damaged")
                bar.update(shard["tokens"])
    if faults:
        what = f"{len(faults)} of {len(shards)} shards are damaged: {', '.join(faults)}"
        raise ValueError(f"{folder}: {what}: run the command that made them to repair them")
    say(f"{folder}: {len(shards)} shards, {manifest['tokens']:,} tokens, all whole")
    if not finished:
        say(f"note: {folder} {NOT_FINISHED}")


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
