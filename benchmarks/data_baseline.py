"""
Time fineweb.py against the plain way to tokenise, in pairs on the same files:

    python benchmarks/data_baseline.py CORPUS.jsonl [--megabytes 150] [--pairs 5]

The plain way is the usual one. It passes the rows of `datasets` one at a time to
`multiprocessing.Pool.imap` with half the cores, and calls `encode_ordinary` for each document. The
time to prepare its data set (a second copy of the text on disk) is not counted. Both ways must
write the same tokens.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.corpus import find_files, source_units, unit_texts  # noqa: E402
from common.tokenizer import EOT, get_tokenizer  # noqa: E402

SHARD_SIZE = 5_000_000


def make_files(corpus: Path, folder: Path, megabytes: int) -> int:
    """Write parquet files like FineWeb's; return the bytes of their text.

    Documents have 5 kB, row groups 1,000 documents.
    """
    import pyarrow
    import pyarrow.parquet

    pieces = []  # documents of about 5 kB, cut between paragraphs
    for line in corpus.open():
        piece = ""
        for paragraph in json.loads(line)["text"].split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) > 5000:
                pieces.append(piece)
                piece = ""
    total, copy = 0, 0
    while total < megabytes * 1e6:  # every copy has another order, and no two documents are equal
        order = np.random.default_rng(copy).permutation(len(pieces))
        texts = [f"{copy} {i} {pieces[i][(copy * 37) % 999 :]}" for i in order]
        table = pyarrow.table({"text": texts, "id": [f"<{copy}:{i}>" for i in order]})
        path = folder / f"{copy:03d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="snappy")
        total += sum(len(text.encode()) for text in texts)
        copy += 1
    return total


def tokenize_row(row: dict) -> np.ndarray:
    tokens = [EOT]
    tokens.extend(get_tokenizer().encode_ordinary(row["text"]))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def plain_way(folder: Path, out: Path) -> float:
    """Tokenise the usual way; return the seconds without the preparation of the data set."""
    import datasets

    datasets.disable_progress_bars()
    cache = str(out / "cache")
    files = str(folder / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    start = time.perf_counter()
    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as pool:
        shard, filled, index = np.empty(SHARD_SIZE, np.uint16), 0, 0
        for tokens in pool.imap(tokenize_row, rows, chunksize=16):
            while len(tokens):
                part = tokens[: SHARD_SIZE - filled]
                shard[filled : filled + len(part)] = part
                filled, tokens = filled + len(part), tokens[len(part) :]
                if filled == SHARD_SIZE:
                    np.save(out / f"{index:06d}.npy", shard)
                    filled, index = 0, index + 1
        np.save(out / f"{index:06d}.npy", shard[:filled])
    return time.perf_counter() - start


def our_way(folder: Path, out: Path) -> tuple[float, float]:
    """Run the command; return wall seconds with start-up, and CPU seconds of all its processes."""
    args = ["--source", f"{folder}/*.parquet", "--out_dir", out, "--shard_size", SHARD_SIZE]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "fineweb.py", *map(str, args)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tokenizer_alone(texts: list[str]) -> tuple[float, float]:
    """Return wall and CPU seconds of tiktoken for texts in memory."""
    tokenizer = get_tokenizer()
    wall, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        tokenizer.encode_ordinary(text)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megabytes", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    cores = os.cpu_count()
    plain, ours, ours_cpu, alone_wall, alone_cpu = [], [], [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        size = make_files(args.corpus, folder, args.megabytes) / 1e6
        source = find_files((f"{folder}/*.parquet",))
        units = source_units(source, 0, 0)
        texts = [text for unit in units for text in unit_texts(source, unit)]
        parts = [texts[i::cores] for i in range(cores)]
        for pair in range(args.pairs):
            outs = Path(temporary, f"plain{pair}"), Path(temporary, f"ours{pair}")
            outs[0].mkdir()
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process
                plain.append(pool.apply_async(_plain_in_child, (folder, outs[0])).get())
            wall, cpu = our_way(folder, outs[1])
            ours.append(wall)
            ours_cpu.append(cpu)
            with multiprocessing.Pool(cores) as pool:  # all cores at once, as in a real run
                alone = pool.map(tokenizer_alone, parts, chunksize=1)
            alone_wall.append(max(wall for wall, _ in alone))
            alone_cpu.append(sum(cpu for _, cpu in alone))
            shards = [*sorted(outs[1].glob("*_val_*")), *sorted(outs[1].glob("*_train_*"))]
            both = [
                np.concatenate([np.load(path) for path in paths])
                for paths in (sorted(outs[0].glob("*.npy")), shards)
            ]
            assert np.array_equal(*both), "the two ways wrote different tokens"
            print(f"pair {pair}: plain {plain[-1]:.2f} s, fineweb.py {ours[-1]:.2f} s", flush=True)
    median = statistics.median
    wall = [a / o for a, o in zip(alone_wall, ours, strict=True)]
    cpu = [a / o for a, o in zip(alone_cpu, ours_cpu, strict=True)]
    print(f"{size:.0f} MB of text, {len(texts):,} documents, {cores} cores, tokens identical")
    print(f"plain way    {size / median(plain):5.1f} MB/s")
    print(
        f"fineweb.py   {size / median(ours):5.1f} MB/s, {size / median(ours_cpu):.1f} a CPU second"
    )
    print(f"tokenizer    {size / median(alone_wall):5.1f} MB/s, on all cores at once,", end=" ")
    print(f"{size / median(alone_cpu):.1f} a CPU second")
    print(f"speed-up     {median(p / o for p, o in zip(plain, ours, strict=True)):.2f} x")
    print(f"of tokenizer {median(wall):.0%} by the clock, {median(cpu):.0%} of its CPU time")


def _plain_in_child(folder: Path, out: Path) -> float:
    multiprocessing.current_process()._config["daemon"] = False  # so that it may start its own pool
    return plain_way(folder, out)


if __name__ == "__main__":
    main()
