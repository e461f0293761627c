"""common/hub.py: data from the hub arrives complete, also if the hub fails."""

import gzip
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from data_helpers import (
    contents,
    expected_tokens,
    make_texts,
    parquet_bytes,
    read_shards,
    run,
    run_badly,
    shard_paths,
)
from hub_server import REVISION, HubServer
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

import common.hub
from common.hub import HubFile, hub_errors, retry

# -----------------------------------------------------------------------------
# the command

CARD = """---
configs:
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: lines
  data_files: [{split: train, path: lines/*}]
---
"""
HUB_TEXTS = make_texts(150, words=400)
HUB_LINES = "".join(json.dumps({"text": text}) + "\n" for text in HUB_TEXTS).encode()
HUB_FILES = {
    "README.md": CARD.encode(),
    "data/unrelated.parquet": parquet_bytes(["not this"]),
    "sample/10BT/000.parquet": parquet_bytes(HUB_TEXTS[:80]),
    "sample/10BT/001.parquet": parquet_bytes(HUB_TEXTS[80:]),
    "lines/a.jsonl.gz": gzip.compress(HUB_LINES),
    "lines/b.jsonl": HUB_LINES,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(HUB_FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def hub_args(folder: Path, name: str = "sample-10BT", minutes: float = 1) -> list[object]:
    return [
        *("--dataset", "org/corpus", "--name", name, "--out_dir", folder),
        *("--shard_size", 4000, "--retry_minutes", minutes),
    ]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[str, bytes]:
    """The shards made from the hub's files without any fault."""
    folder = tmp_path_factory.mktemp("calm")
    with HubServer(HUB_FILES) as server:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home")}
        run(*hub_args(folder / "o"), env=env)
    return contents(folder / "o")


def test_hub_data_is_streamed_at_a_pinned_revision(hub, tmp_path):
    run(*hub_args(tmp_path / "o"), stdin=subprocess.DEVNULL)
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(HUB_TEXTS))
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["revision"] == REVISION
    assert [path for path, _ in manifest["files"]] == [
        "sample/10BT/000.parquet",
        "sample/10BT/001.parquet",
    ]
    assert "Bearer hf_secret" in hub.tokens
    reads = [path for _, path, wanted in hub.requests if wanted and "/resolve/" in path]
    assert reads and all(f"/resolve/{REVISION}/" in path for path in reads)
    home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert home  # the card of the data set
    assert sum(path.stat().st_size for path in home) < 5000  # and no text


def test_hub_files_of_json_lines(hub, tmp_path):
    hub.faults.append("reset")
    run(*hub_args(tmp_path / "o", "lines"))
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(HUB_TEXTS + HUB_TEXTS))


def test_every_fault_of_the_hub_is_survived_with_a_message(hub, tmp_path, calm):
    for fault in ["truncate", "reset", "429", "stall", "500", "503", "drop"]:
        hub.faults.extend([fault, None])
    hub.api_faults.extend([None, None, "reset", None, None, None, "503"])  # before the files
    output = run(*hub_args(tmp_path / "o")).stdout
    assert output.count("trying again in 0.5 s") >= 3
    assert "the hub sent" in output  # the truncated answer
    assert not hub.faults
    assert not hub.api_faults
    assert contents(tmp_path / "o") == calm


def test_a_run_stops_when_the_hub_stays_away_and_carries_on_later(hub, tmp_path, calm):
    # one worker makes the order of requests known: six are enough for one shard, not for all
    hub.faults.extend([None] * 6 + ["503"] * 1000)
    error = run_badly(*hub_args(tmp_path / "o", minutes=0.03), "--num_proc", "1")
    assert "are kept: run the same command to carry on" in error
    assert len(shard_paths(tmp_path / "o")) >= 1
    hub.faults.clear()
    hub.main = "f" * 40  # the data set has a new revision; the folder keeps the old one
    run(*hub_args(tmp_path / "o"))
    assert contents(tmp_path / "o") == calm


def test_offline_and_unknown_data_sets_are_one_line_errors(hub, tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in run_badly(*hub_args(tmp_path / "o"), env=offline)
    assert "sample-10BT" in run_badly(*hub_args(tmp_path / "o", "none"))
    assert "--split is one of train" in run_badly(*hub_args(tmp_path / "o"), "--split", "dev")
    assert "org/other" in run_badly("--dataset", "org/other", "--out_dir", tmp_path / "o")
    hub.files = {**hub.files, "corpus.py": b"a script, which `datasets` no longer runs"}
    assert "scripts" in run_badly(*hub_args(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# the parts


class MemoryFile(HubFile):
    """A file whose requests are answered from memory."""

    def __init__(self, content: bytes):
        super().__init__("org/corpus", REVISION, "file", len(content), 0)
        self.content, self.requests = content, []

    def request(self, begin: int, stop: int) -> bytes:
        self.requests.append((begin, stop))
        return self.content[begin:stop]


def test_a_file_is_read_ahead_and_bytes_in_memory_are_not_asked_for_again(monkeypatch):
    monkeypatch.setattr(common.hub, "READ_AHEAD", 1000)
    content = bytes(i * i % 251 for i in range(3500))
    file = MemoryFile(content)
    assert b"".join(iter(lambda: file.read(100), b"")) == content
    assert file.requests == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 3500)]
    file = MemoryFile(content)
    file.fetch(500, 3000)
    assert (file.seek(500), file.read(2500)) == (500, content[500:3000])
    assert (file.seek(-2900, os.SEEK_END), file.read(100)) == (600, content[600:700])
    assert (file.seek(300, os.SEEK_CUR), file.read(5)) == (1000, content[1000:1005])
    assert file.requests == [(500, 3000)]
    file.seek(499)
    assert file.read(2) == content[499:501]
    assert file.requests[1:] == [(499, 1499)]
    file.seek(3500)
    assert file.read(10) == b""
    file.fetch(4000, 5000)  # behind the end: nothing to ask for
    assert len(file.requests) == 2


@pytest.fixture
def sleeps(monkeypatch) -> list[float]:
    """The pauses of `retry`, which take no time."""
    sleeps = []
    clock = SimpleNamespace(monotonic=lambda: sum(sleeps), sleep=sleeps.append)
    monkeypatch.setattr(common.hub, "time", clock)
    return sleeps


def test_pauses_grow_to_a_minute_and_end_after_the_given_minutes(sleeps):
    def call() -> None:
        raise ConnectionError("the hub answers 503")

    with pytest.raises(ConnectionError, match=r"^the hub answers 503, tried for 5 minutes$"):
        retry(call, 5)
    assert sleeps == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_call_is_repeated_only_for_errors_that_may_pass(sleeps, capsys):
    errors = [ConnectionError("away"), TimeoutError("slow"), ValueError("no such data set")]

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "result"

    with pytest.raises(ValueError, match="no such data set"):
        retry(call, 30)
    assert sleeps == [0.5, 1]
    output = capsys.readouterr().out
    assert "away: trying again in 0.5 s, for 30 minutes more" in output
    assert "slow: trying again in 1 s" in output
    assert retry(call, 30) == "result"
    errors.append(ConnectionError("away"))
    with pytest.raises(ConnectionError, match=r"^away$"):
        retry(call, 0)  # workers do not wait: the main process submits their unit again
    assert sleeps == [0.5, 1]


def test_each_error_of_the_hub_is_temporary_or_says_what_to_do():
    def answer(status: int) -> HfHubHTTPError:
        response = httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))
        return HfHubHTTPError(f"{status} for url", response=response)

    temporary = {
        "the hub answers 408": answer(408),
        "the hub answers 429": answer(429),
        "the hub answers 500": answer(500),
        r"the hub does not answer \(no route\)": httpx2.ConnectError("no route"),
        r"the hub does not answer \(ReadTimeout\)": httpx2.ReadTimeout(""),
        r"the hub does not answer \(nothing cached\)": LocalEntryNotFoundError("nothing cached"),
        r"the hub does not answer \(cut": json.JSONDecodeError("cut", "{", 1),
    }
    for message, error in temporary.items():
        with pytest.raises(ConnectionError, match=message), hub_errors():
            raise error
    lasting = {
        "404 for url: check --dataset, or set HF_TOKEN": answer(404),
        "401 for url: check --dataset, or set HF_TOKEN": answer(401),
        "HF_HUB_OFFLINE is set.*: unset it, or name local files": OfflineModeIsEnabled("offline"),
        "scripts are not supported: choose another --dataset": RuntimeError(
            "scripts are not supported"
        ),
    }
    for message, error in lasting.items():
        with pytest.raises(ValueError, match=message), hub_errors():
            raise error
