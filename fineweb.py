"""
Text to token shards, with the GPT-2 BPE: `python fineweb.py`.
"""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import tiktoken

# -----------------------------------------------------------------------------
# command line (shared by every script)

Config = TypeVar("Config")


def run_command(config_class: type[Config], run: Callable[[Config], None]) -> None:
    """Parse the command line into `config_class` and call `run` with it.

    A user's mistake (a flag tyro refuses; ValueError or OSError from the configuration or from
    `run`) becomes one line on stderr, `<script>: error: <what>: <what to do>`, and exit code 2.
    Under torchrun rank 0 alone prints it.
    """
    import tyro

    script = Path(sys.argv[0]).name
    complaint = io.StringIO()  # tyro draws its errors as a box: kept here, printed as a line
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_class, prog=script)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
        end = next((i for i, line in enumerate(lines) if line.startswith("──") or not line), None)
        _fail(script, " ".join(lines[1:end]).rstrip(".") + f": see python {script} --help")
    except ValueError as error:
        _fail(script, str(error))
    try:
        run(config)
    except (ValueError, OSError) as error:
        _fail(script, str(error))


def _fail(script: str, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# tokenizer

RANKS_PATH = Path(__file__).parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
EOT = 50256  # <|endoftext|>, put before every document


def get_tokenizer() -> "tiktoken.Encoding":
    """Return the GPT-2 byte-pair encoding, read from assets/: nothing is ever downloaded.

    Raises ValueError if the file of merge ranks is not the one OpenAI published.
    """
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    if hashlib.sha256(RANKS_PATH.read_bytes()).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANKS_PATH} is damaged: restore it with `git checkout {RANKS_PATH}`")
    return tiktoken.Encoding(
        name="gpt2",
        # GPT-2's own split into words, numbers, punctuation and white space, in the form without
        # backtracking that tiktoken uses for it
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=load_tiktoken_bpe(str(RANKS_PATH)),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )
