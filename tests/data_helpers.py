"""Helpers of the tests of fineweb.py and its modules: texts, source files, the command, shards."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from common.tokenizer import EOT, get_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = (ROOT / "fineweb.py").read_text().split()

# -----------------------------------------------------------------------------
# texts and the files that hold them


def make_texts(count: int, words: int = 100, seed: int = 0) -> list[str]:
    """Return documents of random words; some empty, some with odd characters, one much longer."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(2 * words))) for _ in range(count)]
    odd = [
        "",
        "naïve café, 東京 🙂\r\n\tx ",
        "before <|endoftext|> after",
        "a" * 3000,
        " \n" * 50 + "x",
    ]
    return odd + texts + [" ".join(rng.choices(WORDS, k=words * count // 4))]


def expected_tokens(texts: list[str]) -> np.ndarray:
    """Return the tokens that the shards must hold, made by tiktoken alone (none for blanks)."""
    encode = get_tokenizer().encode_ordinary
    return np.array([t for text in texts if text.strip() for t in [EOT, *encode(text)]], np.uint16)


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def parquet_bytes(texts: list[str | None], row_group_size: int = 7) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


# -----------------------------------------------------------------------------
# the command and the shards that it writes


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]


def run(*args: object, check: int | None = 0, **kwargs: object) -> subprocess.CompletedProcess:
    """Run the real command; its exit code must be `check`."""
    result = subprocess.run(command(*args), capture_output=True, text=True, timeout=120, **kwargs)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def run_badly(*args: object, **kwargs: object) -> str:
    """Run a command that must fail with exactly one line on stderr; return that line."""
    return error_line(run(*args, check=2, **kwargs).stderr)


def error_line(stderr: str) -> str:
    """Return the one line of an error."""
    lines = stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fineweb.py: error: "), lines
    return lines[0]


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_val_*")) + sorted(folder.glob("*_train_*"))


def read_shards(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in shard_paths(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
