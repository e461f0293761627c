"""fineweb.py: packing, every kind of source, restarts, damage, the hub, and bad input."""

import contextlib
import ctypes
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import REVISION, HubServer

import corpus
import fineweb
import shards

ROOT = Path(__file__).parent.parent
EOT = 50256
WORDS = (ROOT / "fineweb.py").read_text().split()


def make_texts(count: int, words: int = 100, seed: int = 0) -> list[str]:
    """Documents of random words; some empty, some with odd characters, one much longer."""
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
    """What the shards must hold, by tiktoken alone."""
    encode = fineweb.get_tokenizer().encode_ordinary
    return np.array([t for text in texts for t in [EOT, *encode(text)]], np.uint16)


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def parquet_bytes(texts: list[str | None], row_group_size: int = 7) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]


def run(*args: object, check: int | None = 0, **kwargs: object) -> subprocess.CompletedProcess:
    """Run the real command; its exit code must be `check`."""
    result = subprocess.run(command(*args), capture_output=True, text=True, timeout=120, **kwargs)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def run_badly(*args: object, **kwargs: object) -> str:
    """Run a command that must fail with exactly one line on stderr; return that line."""
    lines = run(*args, check=2, **kwargs).stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fineweb.py: error: "), lines
    return lines[0]


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_val_*")) + sorted(folder.glob("*_train_*"))


def read_shards(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in shard_paths(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stream_tokens(source: corpus.Source, place: tuple[int, int] = (0, 0)) -> np.ndarray:
    """All tokens of a source from a place on, without worker processes."""
    units = [u for u in corpus.source_units(source, *place)]
    documents = [fineweb.tokenize_unit(source, unit)[0] for unit in units]
    shards = fineweb.pack_shards([d for d in documents if d is not None], 1 << 20)
    return np.concatenate([np.empty(0, np.uint16), *shards])


# -----------------------------------------------------------------------------
# packing and tokenising


@pytest.mark.parametrize("shard_size", [2, 7, 100, 1000, 10**6])
def test_shards_are_tiktokens_output_one_document_after_another(shard_size):
    texts = make_texts(40, words=20)
    whole = expected_tokens(texts)
    shards = list(fineweb.pack_shards(map(fineweb.encode, texts), shard_size))
    assert [len(shard) for shard in shards[:-1]] == [shard_size] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= shard_size
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.array_equal(np.concatenate(shards), whole)


def test_packing_takes_lists_and_skips_what_an_earlier_run_wrote():
    documents = [[1, 2, 3], [], [4]]
    whole = [EOT, 1, 2, 3, EOT, EOT, 4]
    for skip in range(len(whole)):
        shards = [shard.tolist() for shard in fineweb.pack_shards(documents, 3, skip)]
        left = whole[skip:]
        assert shards == [left[i : i + 3] for i in range(0, len(left), 3)]
    assert list(fineweb.pack_shards([], 3)) == []


def test_max_tokens_cuts_exactly_there():
    documents = [np.arange(5), np.arange(0), np.arange(3)]
    for count in range(1, 12):
        taken = list(fineweb.take_tokens(documents, count))
        assert sum(1 + len(document) for document in taken) == min(count, 11)


def test_texts_tokenised_in_parts_give_the_tokens_of_the_whole(monkeypatch):
    encode_whole = fineweb.get_tokenizer().encode_ordinary
    rng = random.Random(1)
    alphabet = [
        "a",
        "I",
        "'s",
        "'ll",
        "é",
        "東",
        "7",
        "²",
        "_",
        ".",
        "<|endoftext|>",
        "🙂",
        "\u0300",
    ]
    blanks = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
    ]
    for part in (1, 2, 5):
        monkeypatch.setattr(fineweb, "PART_CHARS", part)
        for _ in range(3000):
            text = "".join(rng.choices(alphabet + 2 * blanks, k=rng.randrange(30)))
            assert fineweb.encode(text).tolist() == encode_whole(text), repr(text)


def test_a_million_blanks_and_half_a_surrogate_pair_do_not_stop_the_tokenizer():
    blank = fineweb.get_tokenizer().encode_ordinary(" ")
    tokens = fineweb.encode(" " * 1_200_000 + "x")
    assert tokens.tolist() == blank * 1_199_999 + fineweb.get_tokenizer().encode_ordinary(" x")
    assert fineweb.encode("a\ud800b").tolist() == fineweb.get_tokenizer().encode_ordinary(
        "a\ufffdb"
    )


# -----------------------------------------------------------------------------
# sources


@pytest.fixture
def small_units(monkeypatch):
    """Many units from little text."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)


def write_source(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"text.{kind}"
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if kind == "parquet":
        path.write_bytes(parquet_bytes(texts))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines.encode())
    else:  # no newline at the end, blank lines, DOS line ends
        path.write_bytes(lines.replace("\n", "\r\n\n").rstrip().encode())
    return path


@pytest.mark.parametrize("big", [False, True], ids=["", "big-row-groups"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_format_gives_the_same_tokens_from_every_place(
    tmp_path, monkeypatch, small_units, kind, big
):
    if big:
        monkeypatch.setattr(corpus, "BIG_ROW_GROUP", 2500)
    texts = make_texts(100, words=20)
    path = write_source(tmp_path, kind, texts)
    source = corpus.find_files(fineweb.DataConfig(source=str(path)))
    whole = stream_tokens(source)
    assert np.array_equal(whole, expected_tokens(texts))
    units = list(corpus.source_units(source, 0, 0))
    assert len(units) > 10
    assert abs(sum(unit.share for unit in units) - 1) < 1e-6
    before = 0
    for unit in units[:12]:  # a run that starts at any unit goes on with the same units
        assert np.array_equal(stream_tokens(source, (0, unit.start)), whole[before:])
        tokens, _ = fineweb.tokenize_unit(source, unit)
        before += 0 if tokens is None else 1 + len(tokens)


def test_files_of_all_kinds_are_read_in_sorted_order(tmp_path):
    texts = make_texts(6)
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(texts[:3]))
    (tmp_path / "b.txt").write_text(texts[3])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(texts[4].encode()))
    write_jsonl(tmp_path / "d.jsonl", texts[5:])
    source = corpus.find_files(fineweb.DataConfig(source=f"{tmp_path}/*"))
    assert np.array_equal(stream_tokens(source), expected_tokens(texts))


def test_pydocs_are_docstrings_of_libraries_without_repeats(tmp_path, monkeypatch):
    repeated = '"""One.\n\nTwo.\nThree."""'
    modules = {
        "a.py": f'{repeated}\nraise SystemExit("imported")\ndef f():\n    """Short."""\n',
        "b.py": f'class B:\n    {repeated}\n    async def f():\n     """B\n     x\n\n     y."""',
        "old.py": "print 'for another Python'\n",
        "deep/test/c.py": '"""A\ntest\nis left\nout."""',
        "site-packages/d.py": '"""A\npackage\nis left\nout."""',
    }
    modules |= {f"many/{i}.py": f'"""M{i}\n\n\n."""' for i in range(20)}
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(corpus, "PYDOCS_PACKAGES", ())
    texts = [json.loads(line)["text"] for line in corpus.read_pydocs().splitlines()]
    many = [text for text in texts if text.startswith("M")]
    assert sorted(many) == sorted(f"M{i}\n\n\n." for i in range(20))
    assert many != sorted(many)  # shuffled
    one = "One.\n\nTwo.\nThree."
    others = [text for text in texts if text not in many]
    assert sorted(others) in (sorted([one, "B\nx\n\ny."]), sorted([f"{one}\n\nB\nx\n\ny."]))


# -----------------------------------------------------------------------------
# the command


@pytest.fixture
def threads(monkeypatch):
    """Threads for worker processes, to save their start-up."""

    @contextlib.contextmanager
    def thread_pool(num_proc: int):
        with ThreadPoolExecutor(num_proc) as pool:
            yield pool

    monkeypatch.setattr(fineweb, "worker_pool", thread_pool)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    """Text for about a second's work, and the folder made of it without interruption."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "text.jsonl", make_texts(1500, words=300))
    run("--source", path, "--out_dir", folder / "shards", "--shard_size", 40000)
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_shards_and_manifest_are_what_the_design_says(jsonl):
    folder = jsonl.parent / "shards"
    paths = shard_paths(folder)
    assert [path.name for path in paths[:2]] == [
        "edufineweb_val_000000.npy",
        "edufineweb_train_000001.npy",
    ]
    assert len(paths) > 20
    assert sorted(contents(folder)) == sorted([p.name for p in paths] + ["manifest.json"])
    assert {len(np.load(path)) for path in paths[:-1]} == {40000}
    assert np.array_equal(read_shards(folder), expected_tokens(texts_of(jsonl)))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokens"] == len(read_shards(folder))
    assert [shard["name"] for shard in manifest["shards"]] == [path.name for path in paths]
    assert str(jsonl.parent) not in json.dumps(manifest)


def test_number_of_workers_does_not_change_a_byte(jsonl, tmp_path):
    run("--source", jsonl, "--out_dir", tmp_path / "o", "--shard_size", 40000, "--num_proc", 3)
    assert contents(tmp_path / "o") == contents(jsonl.parent / "shards")


def test_bin_shards_are_llm_cs_and_max_tokens_cuts_them(jsonl, tmp_path):
    args = "--shard_size", 40000, "--format", "bin", "--max_tokens", 90001
    run("--source", jsonl, "--out_dir", tmp_path, *args)
    parts = []
    for path in shard_paths(tmp_path):
        header = np.fromfile(path, "<i4", 256)
        parts.append(np.fromfile(path, "<u2", offset=1024))
        assert header[:3].tolist() == [20240520, 1, len(parts[-1])]
        assert not header[3:].any()
    assert [len(part) for part in parts] == [40000, 40000, 10001]
    assert np.array_equal(np.concatenate(parts), read_shards(jsonl.parent / "shards")[:90001])


@pytest.mark.parametrize("shard_size", [100_000_000, "exactly"])
def test_a_source_that_ends_in_its_first_shard_is_cut_in_two(tmp_path, shard_size):
    texts = make_texts(5)
    whole = expected_tokens(texts)
    size = len(whole) if shard_size == "exactly" else shard_size
    run(
        "--source",
        write_jsonl(tmp_path / "t.jsonl", texts),
        "--out_dir",
        tmp_path / "o",
        "--shard_size",
        size,
    )
    val, train = (np.load(path) for path in shard_paths(tmp_path / "o"))
    assert len(val) == len(whole) // 10
    assert np.array_equal(np.concatenate([val, train]), whole)


def test_a_run_stopped_between_the_two_parts_of_a_small_source_comes_out_the_same(
    tmp_path, threads
):
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(5))
    config = fineweb.DataConfig(source=str(path), out_dir=tmp_path / "o")
    fineweb.tokenize(config)
    whole = contents(config.folder)
    manifest, _ = shards.read_manifest(config.folder)
    del manifest["shards"][1:]
    shard_paths(config.folder)[1].unlink()
    (config.folder / "manifest.json").unlink()
    shards.write_manifest(config.folder, manifest)
    fineweb.tokenize(config)
    assert contents(config.folder) == whole


def test_a_finished_folder_is_left_alone_and_other_settings_are_named(jsonl):
    folder = jsonl.parent / "shards"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = run("--source", jsonl, "--out_dir", folder, "--shard_size", 40000)
    assert "finished" in result.stdout
    other = jsonl.with_name("other.jsonl")
    write_jsonl(other, ["something else"])
    assert "shard_size 40000, not 50000" in run_badly(
        "--source", jsonl, "--out_dir", folder, "--shard_size", 50000
    )
    assert "revision" in run_badly("--source", other, "--out_dir", folder, "--shard_size", 40000)
    assert "source local, not pydocs" in run_badly(
        "--source", "pydocs", "--out_dir", folder, "--shard_size", 40000
    )
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def interrupt(args: list[str], folder: Path, rng: random.Random, how: signal.Signals) -> bool:
    """Run a command and stop it at a random moment; return whether it was stopped."""
    start = len(list(folder.glob("*.npy"))) if folder.exists() else 0
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target, deadline = start + rng.randrange(9), time.monotonic() + rng.uniform(0.1, 3)
    while process.poll() is None and time.monotonic() < deadline:
        if folder.exists() and len(list(folder.glob("*.npy"))) > target:
            time.sleep(rng.uniform(0, 0.02))
            break
        time.sleep(0.001)
    process.send_signal(how)
    return process.wait(30) != 0


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_folder_comes_out_byte_identical(jsonl, tmp_path, kills):
    rng = random.Random(time.time_ns())
    folder = tmp_path / "o"
    args = command("--source", jsonl, "--out_dir", folder, "--shard_size", 40000)
    stopped = 0
    for i in range(kills):
        recorded = 0
        if (folder / "manifest.partial.json").exists():
            recorded = len(json.loads((folder / "manifest.partial.json").read_text())["shards"])
        whole = len(list(folder.glob("*.npy"))) if folder.exists() else 0
        assert recorded in (whole, whole - 1) or not whole  # at most one shard of work is lost
        stopped += interrupt(args, folder, rng, signal.SIGKILL if i % 3 else signal.SIGINT)
        if (folder / "manifest.json").exists():
            assert contents(folder) == contents(jsonl.parent / "shards")
            shutil.rmtree(folder)
    assert stopped
    subprocess.run(args, check=True, capture_output=True)
    assert contents(folder) == contents(jsonl.parent / "shards")


def test_workers_do_not_outlive_a_killed_command(jsonl, tmp_path):
    marker = f"--out_dir={tmp_path}/o"
    process = subprocess.Popen(command("--source", jsonl, marker, "--shard_size", 40000), stdout=-3)
    while not shard_paths(tmp_path / "o"):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def test_workers_import_no_torch():
    with corpus.worker_pool(1) as pool:
        pool.submit(fineweb.encode, "some text").result()
        loaded = pool.submit(eval, "sorted(__import__('sys').modules)").result()
    assert "fineweb" in loaded
    assert "torch" not in loaded


# -----------------------------------------------------------------------------
# damage


def test_verify_names_damaged_shards_and_the_command_repairs_exactly_those(jsonl, tmp_path):
    folder = tmp_path / "o"
    shutil.copytree(jsonl.parent / "shards", folder)
    whole, paths = contents(folder), shard_paths(folder)
    assert "all whole" in run("--verify", "--out_dir", folder).stdout
    data = bytearray(paths[0].read_bytes())
    data[5000] ^= 1
    paths[0].write_bytes(data)  # a flipped bit
    data = bytearray(paths[3].read_bytes())
    data[-2:] = b"\xff\xff"
    paths[3].write_bytes(data)  # an id that is none
    os.truncate(paths[5], 1000)
    paths[7].unlink()
    data = bytearray(paths[9].read_bytes())
    data[60:62] = b"i2"
    paths[9].write_bytes(data)
    error = run_badly("--verify", "--out_dir", folder)
    assert "5 of " in error
    assert "id 65535" in error
    assert all(paths[i].name in error for i in (0, 3, 5, 7, 9))
    assert not paths[0].exists()  # training cannot take it for good
    untouched = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    output = run("--source", jsonl, "--out_dir", folder, "--shard_size", 40000).stdout
    assert output.count("made again") == 5
    assert contents(folder) == whole
    assert all(path.stat().st_mtime_ns == then for path, then in untouched.items())


def test_verify_needs_a_manifest(tmp_path):
    assert "manifest.json" in run_badly("--verify", "--out_dir", tmp_path)


def test_disk_full_in_a_shard_keeps_the_ones_before(jsonl, tmp_path):
    folder = tmp_path / "o"
    args = "--source", jsonl, "--out_dir", folder, "--shard_size", 40000
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))}
    assert "cannot be written" in run_badly(*args, **limit)
    assert not folder.exists()
    while not interrupt(command(*args), folder, random.Random(4), signal.SIGKILL):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / ".manifest.partial.json.unfinished").touch()  # what a kill may leave
    kept = {name: data for name, data in contents(folder).items() if name.endswith(".npy")}
    assert "cannot be written" in run_badly(*args, **limit)
    assert {p.name: p.read_bytes() for p in shard_paths(folder)} == kept
    assert not list(folder.glob(".*"))
    run(*args)
    assert contents(folder) == contents(jsonl.parent / "shards")


def test_a_second_process_on_the_folder_refuses(jsonl, tmp_path):
    with shards.locked(tmp_path / "o"):
        assert "in use" in run_badly("--source", jsonl, "--out_dir", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_read_only_and_impossible_output_folders(jsonl, tmp_path):
    assert "cannot be written" in run_badly("--source", jsonl, "--out_dir", jsonl)
    folder = tmp_path / "o"
    folder.mkdir(mode=0o555)
    drop = {"preexec_fn": drop_root_rights} if sys.platform == "linux" else {}
    assert "cannot be written" in run_badly("--source", jsonl, "--out_dir", folder, **drop)


def drop_root_rights() -> None:
    """Let permissions count for root as well, from the next exec on (CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_disk_that_is_too_small_is_refused_before_work(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    config = fineweb.DataConfig(source=str(jsonl), out_dir=tmp_path / "o")
    with pytest.raises(OSError, match="too small"):
        fineweb.tokenize(config)
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# bad input

BAD_INPUT = {
    "empty.jsonl": (b"", "holds no text"),
    "empty.txt": (b"", "holds no text"),
    "empty.parquet": (b"", "cannot be read"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "nulls.jsonl": (b'{"text": null}\n', "holds no text"),
    "binary.txt": (b"PK\x03\x04\x00\x00", "no text file"),
    "latin1.txt": ("caf\xe9 au lait".encode("latin-1"), "not UTF-8 at byte 3"),
    "latin1.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "cut.jsonl": (b'{"text": "whole"}\n{"text": "cu', "line at byte 18 is cut off"),
    "list.jsonl": (b'["text"]\n', "no text in field text"),
    "field.jsonl": (b'{"body": "x", "id": 1}\n', "one of body, id"),
    "number.jsonl": (b'{"text": 5}\n', "no text in field text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 5000)[:-20], "cannot be read"),
    "cut.parquet": (parquet_bytes(["x"] * 99)[:-30], "cannot be read"),
    "column.parquet": (
        parquet_bytes(["x"]).replace(b"text", b"body"),
        "--text_column is one of id, body",
    ),
    "table.csv": (b"text\nx\n", "convert it"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gives_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, threads, name):
    data, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(data)
    args = ["--source", str(tmp_path / name), "--out_dir", str(tmp_path / "new" / "o")]
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *args])
    with pytest.raises(SystemExit) as stop:
        fineweb.main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("fineweb.py: error: ")
    assert message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_error_in_a_worker_process_is_one_line_too(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_bytes(BAD_INPUT["cut.jsonl"][0])
    assert "cut off" in run_badly("--source", path, "--out_dir", tmp_path / "o")
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments_give_one_line(tmp_path):
    assert "no such file" in run_badly(
        "--source", tmp_path / "none.jsonl", "--out_dir", tmp_path / "o"
    )
    assert "is a folder" in run_badly("--source", tmp_path, "--out_dir", tmp_path / "o")
    assert "--shard_size is 0" in run_badly("--shard_size", 0)
    assert "--help" in run_badly("--sauce", "pydocs")
    assert list(tmp_path.iterdir()) == []


def test_null_text_is_left_out_and_said(tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(["one", None, "two", ""]))
    output = run("--source", tmp_path / "t.parquet", "--out_dir", tmp_path / "o").stdout
    assert "1 rows or files without text" in output
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(["one", "two", ""]))


@pytest.mark.parametrize("size", [5_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
def test_a_document_of_50_megabytes(tmp_path, size):
    block = " ".join(["", *WORDS[:20000]])
    times = size // len(block) + 1
    (tmp_path / "big.txt").write_text(block * times)
    run("--source", tmp_path / "big.txt", "--out_dir", tmp_path / "o", "--num_proc", 1)
    tokens = read_shards(tmp_path / "o")
    assert tokens[0] == EOT
    assert np.array_equal(
        tokens[1:], np.tile(fineweb.get_tokenizer().encode_ordinary(block), times)
    )


# -----------------------------------------------------------------------------
# the hub

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
    """What comes from the hub's files when nothing goes wrong."""
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
    home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert home  # the card, where HF_HOME says
    assert sum(path.stat().st_size for path in home) < 5000  # and no text


def test_hub_files_of_json_lines(hub, tmp_path):
    hub.faults.append("reset")
    run(*hub_args(tmp_path / "o", "lines"))
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(HUB_TEXTS + HUB_TEXTS))


def test_every_fault_of_the_hub_is_survived_with_a_message(hub, tmp_path, calm):
    for fault in ["truncate", "reset", "429", "stall", "500", "503", "drop"]:
        hub.faults.extend([fault, None])
    hub.api_faults.extend([None, None, "reset", None, None, None, "503"])  # on the way to them
    output = run(*hub_args(tmp_path / "o")).stdout
    assert output.count("trying again in 0.5 s") >= 3
    assert "the hub sent" in output  # the truncated answer
    assert not hub.faults
    assert not hub.api_faults
    assert contents(tmp_path / "o") == calm


def test_a_hub_that_stays_away_stops_the_run_which_carries_on_later(hub, tmp_path, calm):
    # one worker, so that the order of its requests is known: enough for a shard, not for all
    hub.faults.extend([None] * 6 + ["503"] * 1000)
    error = run_badly(*hub_args(tmp_path / "o", minutes=0.03), "--num_proc", "1")
    assert "are kept: run the same command to carry on" in error
    assert len(shard_paths(tmp_path / "o")) >= 1
    hub.faults.clear()
    hub.main = "f" * 40  # the data set has moved on by now, and the folder has not
    run(*hub_args(tmp_path / "o"))
    assert contents(tmp_path / "o") == calm


def test_offline_and_unknown_data_sets_are_one_line_errors(hub, tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in run_badly(*hub_args(tmp_path / "o"), env=offline)
    assert "sample-10BT" in run_badly(*hub_args(tmp_path / "o", "none"))
    assert "--split is one of train" in run_badly(*hub_args(tmp_path / "o"), "--split", "dev")
    assert "org/other" in run_badly("--dataset", "org/other", "--out_dir", tmp_path / "o")
    hub.files = {**hub.files, "corpus.py": b"a program, which `datasets` runs no more"}
    assert "scripts" in run_badly(*hub_args(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
