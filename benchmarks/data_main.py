"""
What the main process of fineweb.py can take: its workers return ready tokens, without any work.

    python benchmarks/data_main.py FOLDER [--workers 2] [--unit 1000000] [--tokens 600000000]
"""

import argparse
import functools
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fineweb  # noqa: E402
from common.corpus import Source, Unit  # noqa: E402
from common.unit_tokens import UnitTokens  # noqa: E402
from common.workers import pack  # noqa: E402

tokens = functools.cache(
    lambda count: np.random.default_rng(0).integers(0, 50256, count).astype(np.uint16)
)


def ready_tokens(source: Source, unit: Unit, *_: object) -> UnitTokens:
    return UnitTokens(pack(tokens(unit.stop - unit.start)), Counter(), [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--unit", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=600_000_000)
    args = parser.parse_args()
    args.folder.mkdir()
    starts = range(0, args.tokens, args.unit)
    units = [Unit(file=0, start=at, stop=at + args.unit, share=0) for at in starts]
    fineweb.tokenize_unit, fineweb.source_units = ready_tokens, lambda *_: iter(units)
    config = fineweb.DataConfig(
        out_dir=args.folder, num_proc=args.workers, shard_size=args.tokens // 12
    )
    source = Source(name="local", revision="", files=(("a.jsonl", 1),))
    manifest = {"shards": [], "tokens": 0, "shard_size": config.shard_size, "format": "npy"}
    with fineweb.worker_pool(args.workers) as pool:
        list(pool.map(ready_tokens, [source] * args.workers * 4, units))  # all workers are up
        wall, cpu = time.perf_counter(), time.thread_time()
        fineweb.make_shards(config, manifest, source, pool, "tiktoken")
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    shutil.rmtree(args.folder)
    million = args.tokens / 1e6
    print(f"{million / wall:.0f} million tokens/s, {million / cpu:.0f} a CPU second of its thread")


if __name__ == "__main__":
    main()
