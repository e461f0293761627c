"""fineweb.py: packing, the command, restarts, damage, and bad input."""

import contextlib
import ctypes
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    WORDS,
    command,
    contents,
    error_line,
    expected_tokens,
    make_texts,
    parquet_bytes,
    read_shards,
    run,
    run_badly,
    shard_paths,
    write_jsonl,
)

import fineweb
from common import corpus, shards, tokenizer, unit_tokens
from common.corpus import Source, find_files, source_units
from common.files import locked
from common.tokenizer import EOT, encode, get_tokenizer
from common.unit_tokens import SEPARATOR, UnitTokens, tokenize_unit
from common.workers import unpack, worker_pool

# -----------------------------------------------------------------------------
# packing


@pytest.mark.parametrize("shard_size", [2, 7, 100, 1000, 10**6])
def test_shards_hold_tiktokens_output_in_document_order(shard_size):
    texts = make_texts(40, words=20)
    whole = expected_tokens(texts)
    pieces = [np.array([EOT, *encode(text)], np.uint16) for text in texts if text.strip()]
    shards = list(fineweb.pack_shards(pieces, shard_size))
    assert [len(shard) for shard in shards[:-1]] == [shard_size] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= shard_size
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.array_equal(np.concatenate(shards), whole)


def test_packing_skips_the_tokens_of_an_earlier_run():
    pieces = [np.array(piece, np.uint16) for piece in ([EOT, 1, 2, 3], [], [EOT], [EOT, 4])]
    whole = [EOT, 1, 2, 3, EOT, EOT, 4]
    for skip in range(len(whole)):
        shards = [shard.tolist() for shard in fineweb.pack_shards(pieces, 3, skip)]
        left = whole[skip:]
        assert shards == [left[i : i + 3] for i in range(0, len(left), 3)]
    assert list(fineweb.pack_shards([], 3)) == []


def test_take_tokens_stops_at_exactly_the_count():
    pieces = [np.arange(5), np.arange(0), np.arange(3)]
    for count in range(10):
        taken = list(fineweb.take_tokens(pieces, count))
        assert np.concatenate(taken).tolist() == [0, 1, 2, 3, 4, 0, 1, 2][:count]


# -----------------------------------------------------------------------------
# the command


@pytest.fixture
def threads(monkeypatch):
    """Use threads instead of worker processes, which take longer to start."""

    @contextlib.contextmanager
    def thread_pool(num_proc: int, in_turn: bool = False):
        with ThreadPoolExecutor(num_proc) as pool:
            yield pool

    monkeypatch.setattr(fineweb, "worker_pool", thread_pool)


@pytest.fixture
def main_badly(monkeypatch, capsys) -> Callable[..., str]:
    """`run_badly` in this process: a function that runs main(), which must fail with one line."""

    def main_badly(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            fineweb.main()
        assert stop.value.code == 2
        return error_line(capsys.readouterr().err)

    return main_badly


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    """A file of text for about a second of work; shards/ beside it is made without interruption."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "text.jsonl", make_texts(1500, words=300))
    run("--source", path, "--out_dir", folder / "shards", "--shard_size", 40000)
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_shards_and_manifest_have_the_documented_form(jsonl):
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


def test_bin_shards_have_llm_cs_format_and_max_tokens_cuts_exactly(jsonl, tmp_path):
    args = "--shard_size", 40000, "--format", "bin", "--max_tokens", 90001
    run("--source", jsonl, "--out_dir", tmp_path, *args)
    parts = []
    for path in shard_paths(tmp_path):
        header = np.fromfile(path, "<i4", 256)
        parts.append(np.fromfile(path, "<u2", offset=1024))
        assert header[:3].tolist() == [20240520, 1, len(parts[-1])]
        assert not header[3:].any()
    assert [len(part) for part in parts] == [9000, 40000, 40000, 1001]
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


# -----------------------------------------------------------------------------
# the validation split


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (2, [1, 1]),
        (99, [9, 90]),
        (100, [10, 90]),
        (101, [10, 91]),
        (118, [11, 100, 7]),
        (350, [35, 100, 100, 100, 15]),
        (999, [99, *[100] * 9]),
        (1000, [100] * 10),
        (1050, [100] * 10 + [50]),
    ],
)
def test_validation_is_never_more_than_a_tenth_of_a_small_source(tmp_path, threads, tokens, sizes):
    text = " a" * (tokens - 1)  # a token each, and <|endoftext|>
    path = write_jsonl(tmp_path / "t.jsonl", [text or "", " a" * 2000])
    fineweb.tokenize(config_for(path, shard_size=100, max_tokens=tokens))
    found = [np.load(path) for path in shard_paths(tmp_path / "o")]
    assert [len(shard) for shard in found] == sizes
    assert np.array_equal(np.concatenate(found), expected_tokens([text, " a" * 2000])[:tokens])
    assert "all whole" in capture_verify(tmp_path / "o")


def config_for(path: Path, **settings: object) -> fineweb.DataConfig:
    """Return the configuration for one file, with shards in o/ beside it."""
    return fineweb.DataConfig(
        source=(str(path),), out_dir=path.parent / "o", num_proc=2, **settings
    )


def capture_verify(folder: Path) -> str:
    """Return what --verify prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        fineweb.verify(fineweb.DataConfig(out_dir=folder, verify=True))
    return output.getvalue()


def test_a_run_killed_while_it_cuts_a_small_source_again_gives_the_same_bytes(
    tmp_path, threads, monkeypatch
):
    config = config_for(write_jsonl(tmp_path / "t.jsonl", make_texts(40)), shard_size=2000)
    fineweb.tokenize(config)
    whole = contents(config.folder)
    assert len(whole) > 3
    replace, kills = os.replace, 0
    while True:
        shutil.rmtree(config.folder)
        calls = itertools.count()

        def replace_or_die(source: object, target: object) -> None:
            if next(calls) == kills:  # noqa: B023 - the loop waits for it
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            try:
                fineweb.tokenize(config)
                break  # there were fewer files to rename
            except KeyboardInterrupt:
                kills += 1
        if (config.folder / shards.PARTIAL).exists():
            try:
                assert fineweb.NOT_FINISHED in capture_verify(config.folder)
            except ValueError as error:  # it must not call shards damaged and rename them
                assert fineweb.NOT_FINISHED in str(error)
        fineweb.tokenize(config)
        assert contents(config.folder) == whole, f"killed before rename {kills}"
    assert kills > 3 * (len(whole) - 1)  # a shard is renamed three times, a manifest follows it


def test_a_damaged_shard_of_a_small_source_is_made_again(tmp_path, threads):
    config = config_for(write_jsonl(tmp_path / "t.jsonl", make_texts(40)), shard_size=2000)
    fineweb.tokenize(config)
    whole = contents(config.folder)
    for path in shard_paths(config.folder):
        path.unlink()
        fineweb.tokenize(config)
        assert contents(config.folder) == whole


# -----------------------------------------------------------------------------
# a finished folder, and kills


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
    assert "was made from other files, or" in run_badly(
        "--source", other, "--out_dir", folder, "--shard_size", 40000
    )
    assert "source local, not pydocs" in run_badly(
        "--source", "pydocs", "--out_dir", folder, "--shard_size", 40000
    )
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_finished_folder_of_an_older_version_is_whole_and_an_unfinished_one_is_refused(
    tmp_path, threads, capsys
):
    config = config_for(write_jsonl(tmp_path / "t.jsonl", make_texts(5)))
    fineweb.tokenize(config)
    manifest, _ = shards.read_manifest(config.folder)
    del manifest["split_eot"]  # what it means was not settled then, nor were blank rows left out
    shards.write_manifest(config.folder, manifest, finished=True)
    fineweb.tokenize(config)
    assert "finished" in capsys.readouterr().out
    (config.folder / "manifest.json").replace(config.folder / "manifest.partial.json")
    with pytest.raises(ValueError, match="split_eot None, not auto"):
        fineweb.tokenize(config)


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
def test_a_run_killed_at_any_moment_gives_the_same_bytes(jsonl, tmp_path, kills):
    rng = random.Random(time.time_ns())
    folder = tmp_path / "o"
    args = command("--source", jsonl, "--out_dir", folder, "--shard_size", 40000)
    stopped = 0
    for i in range(kills):
        recorded = 0
        if (folder / "manifest.partial.json").exists():
            recorded = len(json.loads((folder / "manifest.partial.json").read_text())["shards"])
        whole = len(list(folder.glob("*.npy"))) if folder.exists() else 0
        assert whole - 2 <= recorded <= whole or not whole  # two shards are written at a time
        stopped += interrupt(args, folder, rng, signal.SIGKILL if i % 3 else signal.SIGINT)
        if (folder / "manifest.json").exists():
            (folder / ".lock").unlink(missing_ok=True)  # killed between the last two actions
            assert contents(folder) == contents(jsonl.parent / "shards")
            shutil.rmtree(folder)
    assert stopped
    subprocess.run(args, check=True, capture_output=True)
    assert contents(folder) == contents(jsonl.parent / "shards")


def test_workers_end_when_the_command_is_killed(jsonl, tmp_path):
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


def test_a_worker_gets_the_name_of_one_file_however_many_there_are(tmp_path):
    class Pool(ThreadPoolExecutor):
        def submit(self, call: Callable, *work: object) -> Future:
            assert len(pickle.dumps(work)) < 1000
            return super().submit(call, *work)

    for number in range(200):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    source = find_files((str(tmp_path),))
    config = config_for(tmp_path)
    with Pool(2) as pool:
        tokens = np.concatenate(list(fineweb.TokenStream(config, source, None, pool, "gigatoken")))
    texts = [Path(path).read_text() for path, _ in source.files]
    assert np.array_equal(tokens, expected_tokens(texts))


def test_workers_import_no_torch(tmp_path):
    (tmp_path / "t.txt").write_text("some text")
    source = find_files((str(tmp_path / "t.txt"),))
    with worker_pool(1) as pool:
        (unit,) = source_units(source, 0, 0)
        tokens = unpack(pool.submit(tokenize_unit, source, unit).result().tokens)
        assert tokens.tolist() == [EOT, *encode("some text")]
        loaded = pool.submit(eval, "sorted(__import__('sys').modules)").result()
    assert "common.unit_tokens" in loaded
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
    paths[3].write_bytes(data)  # not a token id
    os.truncate(paths[5], 1000)
    paths[7].unlink()
    data = bytearray(paths[9].read_bytes())
    data[60:62] = b"i2"
    paths[9].write_bytes(data)
    error = run_badly("--verify", "--out_dir", folder)
    assert "5 of " in error
    assert "id 65535" in error
    assert all(paths[i].name in error for i in (0, 3, 5, 7, 9))
    assert not paths[0].exists()  # so training cannot read it
    untouched = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    output = run("--source", jsonl, "--out_dir", folder, "--shard_size", 40000).stdout
    assert output.count("made again") == 5
    assert contents(folder) == whole
    assert all(path.stat().st_mtime_ns == then for path, then in untouched.items())


def test_verify_moves_nothing_while_another_process_writes(jsonl, tmp_path):
    folder = tmp_path / "o"
    shutil.copytree(jsonl.parent / "shards", folder)
    shard_paths(folder)[3].write_bytes(b"being written")
    before = contents(folder)
    with locked(folder), pytest.raises(ValueError, match="in use by another run") as error:
        fineweb.verify(fineweb.DataConfig(out_dir=folder))
    assert error.value.__notes__ == ["wait until it ends"] and contents(folder) == before


def test_verify_needs_a_manifest(tmp_path):
    assert "manifest.json" in run_badly("--verify", "--out_dir", tmp_path)


def test_a_full_disk_keeps_the_shards_before(jsonl, tmp_path):
    folder = tmp_path / "o"
    args = "--source", jsonl, "--out_dir", folder, "--shard_size", 40000
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))}
    error = run_badly(*args, **limit)
    assert "cannot be written" in error
    assert error.endswith(f": {fineweb.AFTER_DISK_FULL}")
    assert not folder.exists()
    while not interrupt(command(*args), folder, random.Random(4), signal.SIGKILL):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    (folder / ".manifest.partial.json.unfinished").touch()  # a killed run may leave this
    kept = {name: data for name, data in contents(folder).items() if name.endswith(".npy")}
    assert "cannot be written" in run_badly(*args, **limit)
    assert {p.name: p.read_bytes() for p in shard_paths(folder)} == kept
    assert not list(folder.glob(".*"))
    run(*args)
    assert contents(folder) == contents(jsonl.parent / "shards")


def test_a_second_process_on_the_folder_refuses(jsonl, tmp_path):
    with locked(tmp_path / "o"):
        error = run_badly("--source", jsonl, "--out_dir", tmp_path / "o")
    assert "in use" in error
    assert error.endswith(": wait until it ends, or choose another --out_dir")
    assert not (tmp_path / "o").exists()


def test_read_only_and_impossible_output_folders_are_refused(jsonl, tmp_path):
    error = run_badly("--source", jsonl, "--out_dir", jsonl)
    assert "cannot be written" in error
    assert error.endswith(": choose another --out_dir")
    folder = tmp_path / "o"
    folder.mkdir(mode=0o555)
    drop = {"preexec_fn": drop_root_rights} if sys.platform == "linux" else {}
    assert "cannot be written" in run_badly("--source", jsonl, "--out_dir", folder, **drop)


def drop_root_rights() -> None:
    """Make permissions apply to root too, after the next exec (drops CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_disk_that_is_too_small_is_refused_before_work(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    config = fineweb.DataConfig(source=(str(jsonl),), out_dir=tmp_path / "o")
    with pytest.raises(OSError, match="too small"):
        fineweb.tokenize(config)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("a.parquet", 350), ("a.txt", 250), ("a.jsonl", 250), ("a.jsonl.gz", 750), ("a.txt.zst", 750)],
)
def test_the_space_needed_is_estimated_by_the_kind_of_file(tmp_path, capsys, name, tokens):
    files = ((name, 10_000_000_000), (name, 10_000_000_000))
    source = Source(name="local", revision="", files=files)
    config = fineweb.DataConfig(out_dir=tmp_path, max_tokens=None)
    with contextlib.suppress(OSError):  # this disk may be too small for it
        fineweb.check_space(config, source, done=1_000_000_000)
    gigabytes = 2 * (20 * tokens / 1000 - 1)  # uint16, less what is done
    assert f"about {gigabytes:.2f} GB to write" in capsys.readouterr().out


def test_a_dead_worker_is_one_line_that_names_num_proc(tmp_path, monkeypatch, threads, main_badly):
    def die(*_: object) -> None:
        raise BrokenProcessPool("a process in the pool was terminated abruptly")

    path = write_jsonl(tmp_path / "t.jsonl", ["some text"])
    monkeypatch.setattr(fineweb, "make_shards", die)
    error = main_badly("--source", path, "--out_dir", tmp_path / "o")
    assert "a worker process died" in error
    assert error.endswith(": try a lower --num_proc, or uninstall gigatoken")
    assert list(tmp_path.iterdir()) == [path]


def test_a_hub_that_never_answers_is_one_line_that_says_how_to_carry_on(
    tmp_path, monkeypatch, main_badly
):
    def stay_away(*_: object, **__: object) -> None:
        raise ConnectionError("the hub does not answer")

    monkeypatch.setattr(fineweb, "find_source", stay_away)
    error = main_badly("--out_dir", tmp_path / "o")
    assert "the hub does not answer: run the same command" in error
    assert error.endswith(": run the same command to carry on")


@pytest.mark.parametrize("flags", [[], ["--verify"]])
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        "null",
        "5",
        '{"shards": {}, "tokens": 5}',
        '{"shards": [], "tokens": 0}',
        '{"shards": [{}], "tokens": 3}',
        '{"shards": [{"name": "a", "tokens": 3}], "tokens": 3}',
        '{"shards": [{"name": "a", "tokens": 3, "sha256": ""}], "tokens": 4}',
    ],
)
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path, main_badly, flags, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    error = main_badly("--source", "pydocs", "--out_dir", tmp_path, *flags)
    assert f"{path} is damaged: restore it, or delete {tmp_path} and" in error
    assert path.read_text() == text


# -----------------------------------------------------------------------------
# bad input

BAD_INPUT = {
    "empty.jsonl": (b"", "holds no text"),
    "empty.txt": (b"", "holds no text"),
    "empty.parquet": (b"", "cannot be read"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "nulls.jsonl": (b'{"text": null}\n', "holds no text"),
    "binary.txt": (b"PK\x03\x04\x00\x00", "not a text file"),
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
    "table.xlsx": (b"PK", "convert it"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gives_one_line_and_leaves_nothing(tmp_path, threads, main_badly, name):
    data, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(data)
    error = main_badly("--source", tmp_path / name, "--out_dir", tmp_path / "new" / "o")
    assert message in error
    assert ": " in error.removeprefix("fineweb.py: error: "), "it must say what to do"
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
    assert "--source" in run_badly("--source", tmp_path, "--out_dir", tmp_path / "o")
    assert "--shard_size is 0" in run_badly("--shard_size", 0)
    assert "--help" in run_badly("--sauce", "pydocs")
    assert "--source is given twice" in run_badly("--source", "a.txt", "--source=b.txt")
    assert "--source has no value" in run_badly("--source", "--max_tokens", 9)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_text_are_left_out_and_counted(tmp_path, threads, capsys):
    texts = ["one", None, "", "two", " \n\t", "three\n", ""]
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(texts))
    fineweb.tokenize(config_for(tmp_path / "t.parquet"))
    assert "4 rows or files without text were left out" in capsys.readouterr().out
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(["one", "two", "three\n"]))


# -----------------------------------------------------------------------------
# a written <|endoftext|>

STORIES = "Once.\n<|endoftext|>\nTwice.<|endoftext|>Thrice. \r\n<|endoftext|>\r\n"


def test_a_written_endoftext_separates_the_documents_of_a_text_file(tmp_path, threads, capsys):
    (tmp_path / "t.txt").write_text(STORIES, newline="")
    fineweb.tokenize(config_for(tmp_path / "t.txt"))
    assert "3 written <|endoftext|> separate documents" in capsys.readouterr().out
    assert np.array_equal(
        read_shards(tmp_path / "o"), expected_tokens(["Once.", "Twice.", "Thrice. "])
    )


def test_a_written_endoftext_inside_a_row_is_ordinary_text_with_a_warning(
    tmp_path, threads, capsys
):
    path = write_jsonl(tmp_path / "t.jsonl", [STORIES, "x"])
    fineweb.tokenize(config_for(path))
    output = capsys.readouterr().out
    assert output.count("warning") == 1 and "3 written <|endoftext|> stay ordinary" in output
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens([STORIES, "x"]))


def test_split_eot_overrides_what_the_kind_of_file_says(tmp_path, threads):
    (tmp_path / "t.txt").write_text(STORIES, newline="")
    path = write_jsonl(tmp_path / "t.jsonl", [STORIES, "x"])
    fineweb.tokenize(config_for(tmp_path / "t.txt", split_eot="off"))
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens([STORIES]))
    shutil.rmtree(tmp_path / "o")
    fineweb.tokenize(config_for(path, split_eot="on"))
    texts = ["Once.", "Twice.", "Thrice. ", "x"]
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(texts))
    with pytest.raises(ValueError, match="split_eot on, not auto"):
        fineweb.tokenize(config_for(path))


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "utf-16.txt"])
def test_a_large_text_file_is_cut_between_workers_without_changing_a_token(
    tmp_path, threads, monkeypatch, kind
):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 300)
    rng, words = random.Random(1), [*WORDS[:200], "\n\n", "東京。\u3000", "<|endoftext|>", "é\xa0"]
    stories = " ".join(rng.choices(words, k=3000))
    data = stories.encode("utf-16" if kind.startswith("utf-16") else "utf-8")
    (tmp_path / f"t.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    config = config_for(tmp_path / f"t.{kind}", shard_size=1000)
    source = find_files(config.source)
    assert len(list(source_units(source, 0, 0))) > 20
    fineweb.tokenize(config)
    pieces = [SEPARATOR.sub("", text) for text in SEPARATOR.split(stories)]
    expected = expected_tokens([text for text in pieces if text.strip()])
    assert np.array_equal(read_shards(config.folder), expected)


# -----------------------------------------------------------------------------
# two engines


def test_without_gigatoken_tiktoken_continues_the_folder_and_the_bytes_are_the_same(
    tmp_path, threads, capsys, monkeypatch
):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)
    config = config_for(write_jsonl(tmp_path / "t.jsonl", make_texts(60)), shard_size=500)
    fineweb.tokenize(config)
    whole = contents(config.folder)
    assert "tiktoken" not in capsys.readouterr().out
    for kept, missing in ((3, True), (5, False), (0, True)):
        manifest = json.loads(whole["manifest.json"])
        manifest["shards"] = manifest["shards"][:kept]
        (config.folder / "manifest.json").unlink()
        shards.write_manifest(config.folder, manifest)
        with monkeypatch.context() as patch:
            if missing:
                patch.setitem(sys.modules, "gigatoken", None)
            fineweb.tokenize(config)
        note = "note: tokenising with tiktoken, which is much slower ("
        assert (note in capsys.readouterr().out) == missing
        assert contents(config.folder) == whole


def test_after_a_wrong_id_all_shards_are_made_again_with_tiktoken(
    tmp_path, threads, capsys, monkeypatch
):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 3000)
    right, texts = tokenizer.Gigatoken.ids, make_texts(60)
    texts[30] = "not looked at " * 100 + "WRONG"
    config = config_for(write_jsonl(tmp_path / "t.jsonl", texts), shard_size=500)
    for name, value in {"COMPARED_BYTES": 6000, "SAMPLE_EVERY": 1000, "SAMPLE_CHARS": 100}.items():
        monkeypatch.setattr(unit_tokens, name, value)
    wrong = lambda self, text: right(self, text.replace("WRONG", "wrong " * 9000))  # noqa: E731
    monkeypatch.setattr(tokenizer.Gigatoken, "ids", wrong)
    fineweb.tokenize(replace(config, max_tokens=len(expected_tokens(texts)) + 5000))
    assert len(read_shards(config.folder)) == len(expected_tokens(texts)) + 5000
    # the same run, but now the fault is also where a unit is compared
    manifest, _ = shards.read_manifest(config.folder)
    (config.folder / "manifest.json").unlink()
    shards.write_manifest(config.folder, {**manifest, "max_tokens": None})
    texts[50:] = ["WRONG " + text for text in texts[50:]]  # some begin a unit
    write_jsonl(tmp_path / "t.jsonl", texts)
    monkeypatch.setattr(fineweb, "run_manifest", lambda config, source, manifest, done: manifest)
    fineweb.tokenize(config)
    said = "gigatoken and tiktoken give different ids for a text of"
    assert f"{said} {tmp_path / 't.jsonl'}: all shards are made with tiktoken" in (
        capsys.readouterr().out
    )
    assert np.array_equal(read_shards(config.folder), expected_tokens(texts)), "and no others"
    # stopped while it makes them again: the next run stays with tiktoken, and the end is the same
    whole = contents(config.folder)
    manifest = json.loads(whole["manifest.json"])
    assert "differs" not in manifest
    (config.folder / "manifest.json").unlink()
    partial = {**manifest, "shards": manifest["shards"][:3], "differs": said}
    shards.write_manifest(config.folder, partial)
    monkeypatch.setattr(tokenizer, "get_gigatoken", lambda: pytest.fail("gigatoken is used"))
    fineweb.tokenize(config)
    assert f"note: tokenising with tiktoken, which is much slower ({said})" in (
        capsys.readouterr().out
    )
    assert contents(config.folder) == whole


class Panic(BaseException):
    """As Rust's panic arrives in Python."""


@pytest.mark.parametrize("method", ["begin", "encode"])
@pytest.mark.parametrize("error", [TypeError, OSError, MemoryError, Panic, SystemExit])
def test_if_gigatoken_fails_tiktoken_does_the_work(
    tmp_path, threads, capsys, monkeypatch, method, error
):
    def fails(*_: object) -> None:
        raise error("of a\nkind")

    monkeypatch.setattr(tokenizer.Gigatoken, method, fails)
    monkeypatch.setattr(tokenizer, "get_gigatoken", tokenizer.Gigatoken)
    texts = make_texts(10)
    fineweb.tokenize(config_for(write_jsonl(tmp_path / "t.jsonl", texts)))
    what = "gigatoken does not start" if method == "begin" else "gigatoken fails"
    said = f"{what} ({error.__name__}: of a kind): all shards are made with tiktoken"
    assert said in capsys.readouterr().out
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(texts))


def test_a_shard_is_made_again_by_the_engine_that_made_it(tmp_path, threads, monkeypatch):
    right = tokenizer.Gigatoken.ids
    texts = make_texts(40)
    texts[20] += " WRONG"
    config = config_for(write_jsonl(tmp_path / "t.jsonl", texts), shard_size=500)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)
        fineweb.tokenize(config)
    whole = contents(config.folder)
    wrong = lambda self, text: right(self, text.replace("WRONG", "wrong"))  # noqa: E731
    monkeypatch.setattr(tokenizer.Gigatoken, "ids", wrong)
    for chars in (1 << 19, 10):  # the difference is noticed, or not
        monkeypatch.setattr(unit_tokens, "COMPARED_CHARS", chars)
        for path in shard_paths(config.folder):
            path.unlink()
        fineweb.tokenize(config)
        assert contents(config.folder) == whole


def test_as_much_is_compared_after_a_failure(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 3000)
    monkeypatch.setattr(unit_tokens, "COMPARED_BYTES", 6000)
    monkeypatch.setattr(unit_tokens, "SAMPLE_EVERY", 1)  # the last unit may be short
    monkeypatch.setattr("common.hub.time.sleep", lambda seconds: None)
    compared, tokenize_unit = [], fineweb.tokenize_unit

    def fails_once(*task: Any) -> UnitTokens:
        compared.append((task[1].start, task[4]))
        if len(compared) <= 4:
            raise ConnectionError("the hub does not answer")
        return tokenize_unit(*task)

    monkeypatch.setattr(fineweb, "tokenize_unit", fails_once)
    fineweb.tokenize(config_for(write_jsonl(tmp_path / "t.jsonl", make_texts(60))))
    much, little = unit_tokens.COMPARED_CHARS, unit_tokens.SAMPLE_CHARS
    assert {chars for start, chars in compared if start < 6000} == {much}
    assert {chars for start, chars in compared if start >= 6000} == {little}
    assert len(compared) == 4 + len({start for start, _ in compared})


def test_tokens_that_nobody_takes_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 3000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_jsonl(tmp_path / "t.jsonl", make_texts(100))
    config, source = config_for(path), find_files((str(path),))
    with worker_pool(2) as pool:
        tokens = iter(fineweb.TokenStream(config, source, None, pool, "tiktoken"))
        assert len(next(tokens))
        tokens.close()  # as when a damaged shard is whole again
        for later in [pool.submit(os.getpid) for _ in range(8)]:
            later.result()
        deadline = time.monotonic() + 20
        while (left := [*tmp_path.glob("tmp*/*")]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left


# -----------------------------------------------------------------------------
# lines that cannot be read


def test_skipped_lines_are_counted_named_and_recorded(tmp_path, threads, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 60)
    lines = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(30)]
    lines[3::2] = [line[:9] + "\n" for line in lines[3::2]]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="--on_error skip"):
        fineweb.tokenize(config_for(path))
    fineweb.tokenize(config_for(path, on_error="skip"))
    output = capsys.readouterr().out
    assert output.count("skipped: ") == fineweb.FAULTS_NAMED
    assert f"{path} line at byte {len(''.join(lines[:3]))} " in output
    assert "14 lines or files that cannot be read were left out" in output
    manifest, _ = shards.read_manifest(tmp_path / "o")
    assert manifest["counts"] == {"skipped": 14}
    good = [f"text {i}" for i in range(30) if i < 3 or i % 2 == 0]
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(good))


@pytest.mark.parametrize("max_tokens", [None, 4500])
def test_a_stopped_run_goes_on_with_skip_and_a_restart_gives_the_same_bytes(
    tmp_path, threads, monkeypatch, max_tokens
):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)
    texts = make_texts(120, words=20)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for i in range(50, 120, 3):
        lines[i] = b"\xff\xfe not JSON\n"
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join(lines))
    config = config_for(path, shard_size=200, max_tokens=max_tokens)
    skipping = replace(config, on_error="skip")
    fineweb.tokenize(skipping)
    whole = contents(config.folder)
    assert json.loads(whole["manifest.json"])["counts"]["skipped"] >= 5
    shutil.rmtree(config.folder)
    with pytest.raises(ValueError, match="--on_error skip"):
        fineweb.tokenize(config)
    assert 2 < len(shard_paths(config.folder)) < len(whole) - 1
    fineweb.tokenize(skipping)
    assert contents(config.folder) == whole
    # killed after any shard: the counts are those of an uninterrupted run
    manifest = json.loads(whole["manifest.json"])
    for kept in range(len(manifest["shards"]), 0, -3):
        partial = {k: v for k, v in manifest.items() if k != "counts"}
        partial["shards"] = manifest["shards"][:kept]
        (config.folder / "manifest.json").unlink()
        shards.write_manifest(config.folder, partial)
        fineweb.tokenize(skipping)
        assert contents(config.folder) == whole


# -----------------------------------------------------------------------------
# what --source takes


def test_several_files_without_quotes_are_one_source(tmp_path):
    for name in "ba":
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [f"text of {name}"])
    paths = [tmp_path / name / "x.jsonl" for name in "ba"]
    run("--source", *paths, "--out_dir", tmp_path / "o")
    assert np.array_equal(read_shards(tmp_path / "o"), expected_tokens(["text of a", "text of b"]))
    manifest, _ = shards.read_manifest(tmp_path / "o")
    assert [name for name, _ in manifest["files"]] == ["a/x.jsonl", "b/x.jsonl"]


# -----------------------------------------------------------------------------
# large documents


@pytest.mark.parametrize("size", [5_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
def test_a_document_of_50_megabytes_is_tokenised(tmp_path, size):
    block = " ".join(["", *WORDS]).replace("<|endoftext|>", "")
    times = size // len(block) + 1
    (tmp_path / "big.txt").write_text(block * times)
    run("--source", tmp_path / "big.txt", "--out_dir", tmp_path / "o", "--num_proc", 1)
    tokens = read_shards(tmp_path / "o")
    assert tokens[0] == EOT
    assert np.array_equal(tokens[1:], np.tile(get_tokenizer().encode_ordinary(block), times))
