"""Helpers for several test files: small shards and models, a short run, the command lines."""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from common.checkpoint import write_checkpoint
from common.cli import plain
from common.runlog import METRICS
from train_gpt2 import GPT, GPTConfig, TrainConfig, train

torch.set_num_threads(1)  # models this small are slower with several threads

ROOT = Path(__file__).parent.parent
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=300)
RUN = dict(
    **SMALL, total_batch_size=256, micro_batch_size=4, max_steps=10, max_lr=3e-3,
    eval_every=5, sample_every=0, val_tokens=512, device="cpu", dtype="float32", compile="off",
)  # fmt: skip


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """End every file at 10 kB, only in the block: the output of pytest may be a file too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_shards(folder: Path, lengths: dict[str, int], vocab_size: int = 300) -> Path:
    """Write shards of random ids, with a rule in them that a model can learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, length in lengths.items():
        tokens = rng.integers(0, vocab_size, length)
        tokens[1::2] = (tokens[::2][: len(tokens[1::2])] * 7 + 1) % vocab_size
        np.save(folder / name, tokens.astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = {
        "edufineweb_val_000000.npy": 1000,
        "edufineweb_train_000001.npy": 1000,  # 62 windows of 16 tokens
        "edufineweb_train_000002.npy": 777,  # 48 windows, a partial last shard
    }
    return write_shards(tmp_path_factory.mktemp("data"), lengths)


@pytest.fixture
def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL))


def spread(model: GPT) -> GPT:
    """Make the weights larger than at initialisation: larger weights show more errors."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save(model: GPT, path: Path) -> Path:
    """Write a checkpoint that holds only a model; return its path."""
    state = {"model": dict(model.named_parameters()), "model_config": plain(model.config)}
    write_checkpoint(path, state, keep=0)
    return path


@pytest.fixture
def four_rows_fit(monkeypatch) -> None:
    """Stand in for a device that has memory for four rows of a micro-batch."""
    whole_loss = GPT.loss

    def limited(self, x, targets):  # a device with memory for four rows
        if len(x) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return whole_loss(self, x, targets)

    monkeypatch.setattr(GPT, "loss", limited)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """Training in this process must not take Ctrl-C away from pytest."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    handlers = {n: signal.getsignal(n) for n in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_train(data_dir: Path, out_dir: Path, **changes) -> list[dict]:
    """Train in this process; return the events of metrics.jsonl."""
    train(TrainConfig(**{**RUN, "data_dir": data_dir, "out_dir": out_dir, **changes}))
    return read_metrics(out_dir)


def read_metrics(out_dir: Path, *events: str) -> list[dict]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not events or line["event"] in events]


def write_run(
    folder: Path,
    source: str = "local",
    steps: int = 10,
    val: tuple[float, float] = (10.0, 3.0),  # before the first step and after the last
    hellaswag: Sequence[tuple] = (),  # of (step, acc_norm, n)
    **config,
) -> Path:
    """Write metrics.jsonl of a short run by hand; a step takes 36 seconds, 30 of them to train."""
    folder.mkdir(parents=True)
    config = {"data_dir": "x", "grad_clip": 1.0, "max_lr": 1e-3, **config}
    lines = [{"event": "run", "step": 0, "time": 0, "config": config, "data_source": source}]
    lines.append({"event": "val", "step": 0, "time": 0, "loss": val[0]})
    for i in range(steps):
        train = {"event": "train", "step": i, "time": 36 * (i + 1), "loss": 9.0 - i, "lr": 1e-3}
        train |= {"grad_norm": 1.5, "batch_tokens": 100, "tokens_seen": 100 * (i + 1), "mfu": None}
        lines.append({**train, "tokens_per_sec": 50.0, "dt": 30.0})
    for step, acc_norm, n in hellaswag:
        score = {"event": "hellaswag", "step": step, "time": 36 * steps, "acc_norm": acc_norm}
        lines.append({**score, "n": n})
    lines.append({"event": "val", "step": steps, "time": 36 * steps, "loss": val[1]})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def losses(metrics: list[dict]) -> list[tuple]:
    """The numbers of every step, which must not depend on when a run was stopped."""
    train_lines = [m for m in metrics if m["event"] == "train"]
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"]) for m in train_lines]


def all_files(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, to show that nothing has changed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flags(**values) -> list[str]:
    """Turn keyword arguments into command-line flags."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def command(script: str, *args: str, ranks: int = 0, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a script: python, or torchrun with this many ranks."""
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [sys.executable, *torchrun, *launcher, script, *args]
    return [sys.executable, script, *args]


def run_command_line(*args: str, ranks: int = 0, **popen) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would, from its folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **popen.pop("env", {})}
    words = command(*args, ranks=ranks)
    return subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, **popen
    )


# Ranks without torchrun: a server that has imported all this starts them in no time.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["conftest"])


class Ended(NamedTuple):
    """What a rank has left."""

    code: int
    out: str
    err: str


def run_ranks(
    folder: Path,
    body: Callable,
    world_size: int,
    *args: Any,
    killed: int | None = None,
    seconds: float = 60,
) -> list[Ended]:
    """Call `body(rank, *args)` in as many processes; return what each has left.

    Ranks that run for longer than `seconds` are killed.

    The rank `killed` does not end by itself: it is killed after all others have ended.
    """
    with pytest.MonkeyPatch.context() as patch:  # the server finds what it imports only there
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    env = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        START.Process(target=be_rank, args=(n, env, folder / str(n), body, args))
        for n in range(world_size)
    ]
    for process in processes:
        process.start()
    for n, process in enumerate(processes):
        if n != killed:
            process.join(timeout=seconds)
    ended = []
    for n, process in enumerate(processes):
        process.kill()
        process.join()
        texts = [(folder / str(n)).with_suffix(s).read_text() for s in (".out", ".err")]
        ended.append(Ended(process.exitcode, *texts))
    return ended


def be_rank(rank: int, env: dict[str, str], output: Path, body: Callable, args: tuple) -> None:
    """Be one rank, with stdout and stderr in files."""
    os.environ.update(env, RANK=str(rank))
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY), number)
    body(rank, *args)


def error_lines(ended: list[Ended]) -> list[str]:
    """The error lines of all ranks. No rank may print a traceback."""
    text = "".join(rank.err for rank in ended)
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if ": error: " in line]
