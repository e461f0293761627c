"""common/hub.py: data from the hub arrives complete, also if the hub fails."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from data_helpers import (
    ROOT,
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
    hub.faults.extend(["truncate", None, "reset", "429", None, "stall", "500", None, "503", "drop"])
    hub.faults.extend([None, "elsewhere"])
    hub.api_faults.extend([None, None, "reset", None, None, None, "503"])  # before the files
    output = run(*hub_args(tmp_path / "o")).stdout
    assert "trying again in 0.5 s" in output  # a request made ahead is repeated without a word
    assert re.search(r"the hub sent \d+ of \d+ bytes", output)  # the truncated answer
    assert not hub.faults
    assert not hub.api_faults
    assert contents(tmp_path / "o") == calm


def test_a_run_stops_when_the_hub_stays_away_and_carries_on_later(hub, tmp_path, calm):
    hub.files = {"README.md": CARD.encode()}
    for i in range(15):
        hub.files[f"sample/10BT/{i:03}.parquet"] = parquet_bytes(HUB_TEXTS[10 * i : 10 * i + 10])
    last = parquet_bytes(HUB_TEXTS[150:])
    hub.files["sample/10BT/015.parquet"] = last
    # each file is three requests at most: these are enough for some shards, not for all
    hub.faults.extend([None] * 24 + ["503"] * 1000)
    error = run_badly(*hub_args(tmp_path / "o", minutes=0.03), "--num_proc", "1")
    assert "are kept: run the same command to carry on" in error
    assert len(shard_paths(tmp_path / "o")) >= 1
    hub.faults.clear()
    hub.main = "f" * 40  # the data set has a new revision; the folder keeps the old one
    run(*hub_args(tmp_path / "o"))
    shards = {name for name in calm if name != "manifest.json"}
    assert all((tmp_path / "o" / name).read_bytes() == calm[name] for name in shards)


def test_offline_and_unknown_data_sets_are_one_line_errors(hub, tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in run_badly(*hub_args(tmp_path / "o"), env=offline)
    error = run_badly("--dataset", "org/other", "--out_dir", tmp_path / "o")
    what = "the hub has no data set org/other, or it is private"
    assert error.endswith(f"error: {what}: check --dataset, or set HF_TOKEN")
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# finding the files of a data set

ASK = """
import json, sys
from common.hub import HubFile, find_dataset
for line in sys.stdin:
    try:
        match json.loads(line):
            case [dataset, name, split]:
                answer = find_dataset(dataset, name, split)
            case [*file, parts]:
                file = HubFile(*file, 0)
                answer = [file.read(part).decode() for part in parts]
    except Exception as error:
        answer = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def ask(hub) -> Iterator[Callable[..., Any]]:
    """A function that answers questions about files on the hub, in another process."""
    words = [sys.executable, "-c", ASK]
    process = subprocess.Popen(words, cwd=ROOT, stdin=-1, stdout=-1, text=True)

    def ask(*question: object, files: dict[str, bytes] | None = None) -> Any:
        if files is not None:  # a new revision: the client remembers the files of the old one
            hub.files = files
            hub.main = hub.revision = f"{int(hub.revision, 16) + 1:040x}"
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.kill()
    process.communicate()


def card(*configs: dict[str, Any]) -> dict[str, bytes]:
    """The README.md of a data set with these configurations. YAML can read JSON."""
    return {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()}


def config(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}], **more}


def test_5_000_files_are_found_with_few_requests(hub, ask):
    files = {
        f"data/CC-MAIN-{i:03d}/{j:05d}.parquet": i + j + 1 for i in range(100) for j in range(50)
    }
    hub.sizes = {**files, "sample/a.parquet": 7}
    readme = card(config("default", "data/*/*"), config("sample", "sample/*"))
    revision, found = ask("org/corpus", "default", "train", files=readme)
    assert (revision, found) == (hub.revision, [[path, size] for path, size in files.items()])
    assert len(hub.requests) < 50, "the tree has 6 pages: no request for each folder or file"
    assert not [path for _, path, _ in hub.requests if "paths-info" in path]


def test_more_than_1_000_files_of_c4_are_found_by_language(hub, ask):
    english = [f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(1024)]
    others = [
        f"multilingual/c4-{lang}.tfrecord-{i:05d}.json.gz" for lang in ("af", "zu") for i in (0, 1)
    ]
    hub.sizes = {
        path: 1 + i for i, path in enumerate([*english, *others, "en/c4-validation.json.gz"])
    }
    readme = card(
        config("en", "en/c4-train.*.json.gz"),
        *(config(lang, f"multilingual/c4-{lang}.*.json.gz") for lang in ("af", "zu")),
    )
    assert ask("org/corpus", "en", "train", files=readme)[1] == [[p, hub.sizes[p]] for p in english]
    assert ask("org/corpus", "zu", "train")[1] == [[p, hub.sizes[p]] for p in others[2:]]
    several = "ValueError: org/corpus has several configurations: --name is one of en, af, zu"
    assert ask("org/corpus", None, "train") == several
    unknown = "ValueError: org/corpus has no configuration de: --name is one of en, af, zu"
    assert ask("org/corpus", "de", "train") == unknown
    no_split = "ValueError: org/corpus has no test: --split is one of train"
    assert ask("org/corpus", "en", "test") == no_split


def test_the_default_configuration_is_taken_without_a_name_and_old_names_lead_to_new_ones(hub, ask):
    files = {"a/x.jsonl": b"1", "b/x.jsonl": b"22", "b/y z+%.jsonl": b"333"}
    readme = card(config("a", "a/*"), config("b", "b/*", default=True))
    found = [["b/x.jsonl", 2], ["b/y z+%.jsonl", 3]]
    assert ask("org/corpus", None, "train", files=readme | files) == [hub.revision, found]
    assert ask("corpus", None, "train") == [hub.revision, found]
    assert ask("org/corpus", None, "train", files={"x.jsonl": b"1"}) == [
        hub.revision,
        [["x.jsonl", 1]],
    ]
    unknown = "ValueError: org/corpus has no configuration en: --name is one of default"
    assert ask("org/corpus", "en", "train") == unknown


def test_what_cannot_be_read_from_the_hub_is_refused_with_what_to_do(hub, ask):
    def refused(*question: object, files: dict[str, bytes] | None = None) -> str:
        error = ask(*(question or ("org/corpus", None, "train")), files=files)
        assert error.startswith("ValueError: "), error
        return error.removeprefix("ValueError: ")

    script = refused(files={"corpus.py": b"", "x.jsonl": b"1"})
    assert "scripts" in script and script.endswith(": choose another --dataset")
    for files in ({"README.md": b"nothing else"}, {"x.unknown": b"1"}, card(config("a", "none/*"))):
        what = "org/corpus has no files of a supported format"
        assert refused(files=files) == f"{what}: choose another --dataset or --name"
    what = "org/corpus has its text on another server than the hub"
    hint = "download it, and name the files with --source"
    for protocol in ("https", "s3"):
        files = card(config("a", f"{protocol}://elsewhere.example/a.jsonl"))
        assert refused(files=files) == f"{what}: {hint}"
    url = "https://huggingface.co/datasets/org/corpus"
    what = f"{url} is not the name of a data set on the hub"
    assert refused(url, None, "train") == f"{what}: --dataset is OWNER/NAME, as in allenai/c4"
    gated = f"org/corpus is a gated data set: ask for access at {hub.url}/datasets/org/corpus"
    for status in (401, 403):
        hub.gate = status
        assert refused(files={"x.jsonl": b"1"}) == f"{gated}, and set HF_TOKEN"
        answer = ask("org/corpus", hub.revision, "x.jsonl", 1, [1])
        assert answer == f"ValueError: {gated}, and set HF_TOKEN", "and while it is read"


def test_a_small_file_that_the_hub_sends_whole_is_read_by_ranges_too(hub, ask):
    text = "0123456789" * 5
    hub.files["books/a.txt"] = text.encode()
    parts = [text[:4], text[4:14], text[14:]]
    assert ask("org/corpus", REVISION, "books/a.txt", 50, [4, 10, 100]) == parts
    assert hub.encodings == {"identity"}, "a range of compressed bytes is no part of the text"


def test_the_hub_is_asked_once_where_a_file_is(hub, ask):
    name, content = "lines/a.jsonl.gz", b"0123456789"
    hub.files[name] = content

    def read() -> str:
        """Read the file; return which servers were asked: the hub, or the one with its bytes."""
        hub.requests.clear()
        assert ask("org/corpus", REVISION, name, 10, [10]) == [content.decode()]
        paths = [path for _, path, span in hub.requests if span]
        return " ".join("hub" if "/resolve/" in path else "bytes" for path in paths)

    assert [read(), read(), read()] == ["hub bytes", "bytes", "bytes"]
    hub.signature += 1  # that address is too old now
    assert [read(), read()] == ["bytes hub bytes", "bytes"]
    for fault in ("503", "truncate", "drop", "elsewhere", "stall"):
        hub.faults.append(fault)
        assert [read(), read()] == ["bytes hub bytes", "bytes"], fault
    assert "Bearer hf_secret" in hub.tokens
    assert hub.cdn_tokens == {None}, "only the hub itself is told the secret"


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
        with pytest.raises(ConnectionError, match=message), hub_errors("org/corpus"):
            raise error
    lasting = {
        "410 for url: check --dataset, or set HF_TOKEN": answer(410),
        "401 for url: check --dataset, or set HF_TOKEN": answer(401),
        "HF_HUB_OFFLINE is set.*: unset it, or name local files": OfflineModeIsEnabled("offline"),
        "scripts are not supported: choose another --dataset": RuntimeError(
            "scripts are not supported"
        ),
    }
    for message, error in lasting.items():
        with pytest.raises(ValueError, match=message), hub_errors("org/corpus"):
            raise error
