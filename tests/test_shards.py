"""common/shards.py: the bytes of shards and manifests, and every fault that is found in them."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from common.shards import (
    CUT,
    data_source,
    fingerprint,
    finish_cut,
    open_shards,
    read_manifest,
    read_shard,
    shard_fault,
    shard_header,
    write_manifest,
    write_shard,
)
from common.tokenizer import EOT

TOKENS = np.array([EOT, 0, 1, 258, 300], np.uint16)
BYTES = b"\x50\xc4\x00\x00\x01\x00\x02\x01\x2c\x01"  # little-endian


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def message(error: pytest.ExceptionInfo) -> str:
    """Return the text of an error, to which only a command may add advice."""
    assert not getattr(error.value, "__notes__", [])
    return str(error.value)


# -----------------------------------------------------------------------------
# shards


def test_an_npy_header_is_numpys_own(tmp_path):
    for count in (1, 5, 40_000, 100_000_000):
        path = tmp_path / "array.npy"
        np.lib.format.open_memmap(path, "w+", "<u2", (count,)).flush()  # sparse: takes no space
        header = shard_header(count, "npy")
        with open(path, "rb") as file:
            assert file.read(len(header)) == header
        assert path.stat().st_size == len(header) + 2 * count
        path.unlink()


def test_a_bin_header_is_llm_cs():
    header = shard_header(70_000, "bin")
    assert len(header) == 1024
    assert header[:12] == bytes.fromhex("88d83401 01000000 70110100")
    assert not any(header[12:])


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_a_written_shard_is_header_and_tokens_and_reads_back(tmp_path, suffix):
    path = tmp_path / f"a_val_0.{suffix}"
    digest = write_shard(path, TOKENS)
    assert path.read_bytes() == shard_header(5, suffix) + BYTES
    assert digest == sha256(path.read_bytes())
    assert os.listdir(tmp_path) == [path.name]
    assert read_shard(path).tolist() == TOKENS.tolist()
    assert read_shard(path).dtype == np.uint16
    if suffix == "npy":
        assert np.load(path).tolist() == TOKENS.tolist()


@pytest.fixture(params=["npy", "bin"])
def shard(request, tmp_path) -> tuple[Path, dict]:
    """A shard on disk, and its entry in the manifest."""
    path = tmp_path / f"a_train_1.{request.param}"
    entry = {"name": path.name, "tokens": len(TOKENS), "sha256": write_shard(path, TOKENS)}
    return path, entry


def test_a_whole_shard_has_no_fault(shard):
    path, entry = shard
    assert shard_fault(path.parent, entry) is None
    assert shard_fault(path.parent, entry, thorough=False) is None


def test_a_shard_that_is_missing_or_of_wrong_length_is_found_without_reading_it(shard):
    path, entry = shard
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0\0")
    for thorough in (False, True):
        assert shard_fault(path.parent, entry, thorough) == f"{size + 2:,} bytes, not {size:,}"
    os.truncate(path, size - 1)
    assert shard_fault(path.parent, entry, False) == f"{size - 1:,} bytes, not {size:,}"
    path.unlink()
    assert shard_fault(path.parent, entry, False) == "missing"
    path.mkdir()
    assert shard_fault(path.parent, entry) == "missing"


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (8, 1, "damaged header"),
        (-2, 45, "sha256 differs"),  # another id of the vocabulary
        (-1, 0xFF, "token id 65324, above 50256"),
    ],
)
def test_a_changed_byte_is_found_by_the_thorough_check_alone(shard, place, value, fault):
    path, entry = shard
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)
    assert shard_fault(path.parent, entry) == fault
    assert shard_fault(path.parent, entry, thorough=False) is None


def test_a_damaged_shard_is_named_without_advice(shard):
    path, _ = shard
    for data in (path.read_bytes()[:-2], path.read_bytes() + b"\0\0", b"", b"x" * 2000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a whole token shard") as error:
            read_shard(path)
        assert message(error).startswith(f"{path}: not a whole token shard (")
        assert message(error).endswith(")"), "and no advice follows"
    with pytest.raises(FileNotFoundError):
        read_shard(path.with_name(f"none{path.suffix}"))


def test_open_shards_names_the_file_without_advice(shard):
    path, entry = shard
    folder = path.parent
    assert [tokens.tolist() for tokens in open_shards(folder, "train")] == [TOKENS.tolist()]
    with pytest.raises(FileNotFoundError) as error:
        open_shards(folder, "val")
    assert message(error) == f"{folder}: no *_val_* shards, and no *_val.bin or val.bin"
    with pytest.raises(ValueError, match="token id") as error:
        open_shards(folder, "train", vocab_size=EOT)
    assert message(error) == f"{path}: token id 50256, but vocab_size is 50256"
    write_manifest(folder, {"shards": [{**entry, "tokens": 6}]}, finished=True)
    with pytest.raises(ValueError, match="6 in") as error:
        open_shards(folder, "train")
    assert message(error) == f"{path}: 5 tokens, 6 in manifest.json"
    write_manifest(folder, {"shards": [entry, {**entry, "name": "b_train_2.bin"}]}, finished=True)
    with pytest.raises(ValueError, match="5 in") as error:
        open_shards(folder, "train")
    assert message(error) == f"{folder / 'b_train_2.bin'}: no tokens, 5 in manifest.json"
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged") as error:
        open_shards(folder, "train")
    assert message(error) == f"{folder / 'manifest.json'}: damaged"


# -----------------------------------------------------------------------------
# token files of relatives

GPT2_IDS = np.random.default_rng(0).integers(0, EOT + 1, 5000).astype("<u2")
CHARACTERS = np.random.default_rng(0).integers(0, 65, 5000).astype("<u2")


def fill(folder: Path, *names: str, ids: np.ndarray = GPT2_IDS) -> Path:
    """Write token files: train.bin and val.bin as nanoGPT does, the others with their header."""
    for name in names:
        if name in ("train.bin", "val.bin"):
            ids.tofile(folder / name)
        else:
            write_shard(folder / name, ids)
    return folder


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (["train.bin"], ["val.bin"]),
        (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"]),
        (["TinyStories_train.bin"], ["TinyStories_val.bin"]),
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"]),
        (["edu_fineweb_train_000001.bin"], ["edu_fineweb_val_000000.bin"]),
        (["train_000001.npy", "train_000002.bin"], ["val_000000.npy"]),
        (["fineweb_train_000001.bin"], ["fineweb_val.bin"]),
        (["[a] b_train_1.npy"], ["[a] b_val_0.npy"]),
    ],
)
def test_the_token_files_of_relatives_are_read_and_no_others(tmp_path, train, val):
    fill(tmp_path, *train, *val)
    only = fingerprint(tmp_path)
    for name in ("constraint.npy", "train_log.npy", "my_train.npy", "._a_train_1.npy", "train.txt"):
        (tmp_path / name).write_bytes(b"no tokens")
    for split, names in (("train", train), ("val", val)):
        shards = open_shards(tmp_path, split)
        assert [shard.tolist() for shard in shards] == [GPT2_IDS.tolist()] * len(names)
    assert fingerprint(tmp_path) == only
    fill(tmp_path, train[0], ids=GPT2_IDS[:-1])
    assert fingerprint(tmp_path) != only


@pytest.mark.parametrize(
    ("names", "two"),
    [
        (["a_train.bin", "b_train.bin"], "a_train.bin and b_train.bin"),
        (["a_train.bin", "b_val.bin"], "a_train.bin and b_val.bin"),
        (["a_train_1.npy", "train.bin"], "a_train_1.npy and train.bin"),
        (["a_train.bin", "a_train_1.npy"], "a_train.bin and a_train_1.npy"),
        (["hellaswag_val.bin", "x_val_0.npy"], "hellaswag_val.bin and x_val_0.npy"),
    ],
)
def test_files_that_may_be_of_different_data_are_refused(tmp_path, names, two):
    fill(tmp_path, *names)
    for look in (fingerprint, lambda folder: open_shards(folder, "train")):
        with pytest.raises(ValueError, match="not parts") as error:
            look(tmp_path)
        assert message(error) == f"{tmp_path}: {two} are not parts of the same data"


@pytest.mark.parametrize("name", ["train.bin", "a_train.bin", "a_train_1.bin"])
@pytest.mark.parametrize(
    ("kind", "version", "what"),
    [
        (20240522, 1, "questions of HellaSwag or MMLU, of llm.c"),
        (20240801, 7, "32-bit tokens of Llama 3, of llm.c"),
        (20240520, 7, "another version than 1 of llm.c's format: 7 has 32-bit ids of Llama 3"),
        (20240326, 3, "a model of llm.c"),
        (20240803, 5, "a file of llm.c of kind 20240803"),
    ],
)
def test_a_file_of_llm_c_that_holds_no_tokens_says_what_it_is(tmp_path, name, kind, version, what):
    header = np.array([kind, version, 5000, *[0] * 253], "<i4")
    (tmp_path / name).write_bytes(header.tobytes() + GPT2_IDS.tobytes())
    with pytest.raises(ValueError, match="not a whole") as error:
        open_shards(tmp_path, "train")
    assert message(error) == f"{tmp_path / name}: not a whole token shard ({what})"


def test_a_shard_whose_header_is_lost_is_not_taken_for_raw_tokens(tmp_path):
    for name in ("train.bin", "a_train.bin"):
        (tmp_path / name).write_bytes(shard_header(5000, "bin")[:1000])
        with pytest.raises(ValueError, match="header is cut short"):
            read_shard(tmp_path / name)
    for name in ("a_train_1.bin", "a_train.bin"):
        GPT2_IDS.tofile(tmp_path / name)
        with pytest.raises(ValueError, match=r"no header of llm\.c"):
            read_shard(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "vocab_size", "fault"),
    [
        (CHARACTERS, 65, None),
        (CHARACTERS, 128, None),
        (GPT2_IDS, 50257, None),
        (GPT2_IDS, 50304, None),
        (CHARACTERS, 50257, "the largest token id is 64, too small for a vocab_size of 50257"),
        (CHARACTERS, 64, "token id 64, but vocab_size is 64"),
        (np.array([EOT + 1, 5], "<u2"), 50257, "token id 50257, but vocab_size is 50257"),
        (GPT2_IDS.astype("<u4"), 50257, "every second value is 0, as in a file of 32-bit ids"),
        (GPT2_IDS.astype("<i8"), 50257, "every second value is 0, as in a file of 32-bit ids"),
        (np.zeros(5000, "<u2"), 50257, "every second value is 0, as in a file of 32-bit ids"),
        (np.zeros(5001, "u1"), 50257, "not a whole token shard (Size of available data"),
        (np.zeros(0, "<u2"), 50257, "not a whole token shard (cannot mmap an empty file"),
    ],
)
def test_a_file_without_a_header_is_read_only_if_its_ids_can_be_tokens(
    tmp_path, data, vocab_size, fault
):
    data.tofile(tmp_path / "train.bin")
    if fault is None:
        (tokens,) = open_shards(tmp_path, "train", vocab_size)
        assert tokens.tolist() == data.tolist()
    else:
        with pytest.raises(ValueError) as error:
            open_shards(tmp_path, "train", vocab_size)
        assert message(error).startswith(f"{tmp_path / 'train.bin'}: {fault}")


# -----------------------------------------------------------------------------
# the manifest


def test_a_manifest_is_partial_until_it_is_finished(tmp_path):
    assert read_manifest(tmp_path) == (None, False)
    manifest = {
        "source": "local",
        "tokens": 0,
        "shards": [{"name": "a", "tokens": 3, "sha256": ""}],
    }
    write_manifest(tmp_path, manifest)
    assert os.listdir(tmp_path) == ["manifest.partial.json"]
    assert read_manifest(tmp_path) == ({**manifest, "tokens": 3}, False)
    manifest["shards"].append({"name": "b", "tokens": 4, "sha256": ""})
    write_manifest(tmp_path, manifest, finished=True)
    assert os.listdir(tmp_path) == ["manifest.json"]
    assert read_manifest(tmp_path) == ({**manifest, "tokens": 7}, True)
    assert (tmp_path / "manifest.json").read_text() == json.dumps(manifest, indent=1) + "\n"


def test_a_finished_manifest_counts_before_a_partial_one(tmp_path):
    shards = [{"name": "a", "tokens": 3, "sha256": ""}]
    write_manifest(tmp_path, {"source": "finished", "shards": shards}, finished=True)
    write_manifest(tmp_path, {"source": "partial", "shards": []})
    manifest, finished = read_manifest(tmp_path)
    assert (manifest["source"], finished) == ("finished", True)


def test_only_shards_are_put_in_place_after_a_run_was_killed_while_it_cut_them_twice(tmp_path):
    (tmp_path / CUT).mkdir()
    for name in ("edufineweb_val_000000.npy", ".edufineweb_train_000001.npy.unfinished"):
        (tmp_path / CUT / name).touch()
    manifest = {"shards": [], CUT: True}
    finish_cut(tmp_path, manifest)
    assert manifest == {"shards": []}
    assert os.listdir(tmp_path) == ["edufineweb_val_000000.npy"]


def test_folders_of_the_user_stay(tmp_path):
    mine = [tmp_path / name / "mine.txt" for name in ("cut", "new", "old", "tmp", "shards")]
    for path in mine:
        path.parent.mkdir()
        path.touch()
    finish_cut(tmp_path, {"shards": []})
    assert all(path.exists() for path in mine)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.partial.json"])
@pytest.mark.parametrize("data", [b"", b'{"shards": [', b"\xff\xfe"])
def test_a_damaged_manifest_is_named_without_advice(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="damaged") as error:
        read_manifest(tmp_path)
    assert message(error) == f"{tmp_path / name} is damaged"


# -----------------------------------------------------------------------------
# what identifies the data


def test_the_fingerprint_is_the_manifests_sha256_or_that_of_names_and_sizes(tmp_path):
    write_shard(tmp_path / "b_train_1.npy", TOKENS)
    (tmp_path / "a_val_0.bin").write_bytes(b"12345")
    (tmp_path / "notes.txt").write_text("no shard")
    assert fingerprint(tmp_path) == sha256(b"a_val_0.bin 5\nb_train_1.npy 138\n")
    write_manifest(tmp_path, {"source": "local", "shards": []})
    assert fingerprint(tmp_path) == sha256(b"a_val_0.bin 5\nb_train_1.npy 138\n")
    write_manifest(tmp_path, {"source": "local", "shards": []}, finished=True)
    assert fingerprint(tmp_path) == sha256((tmp_path / "manifest.json").read_bytes())
    with pytest.raises(FileNotFoundError) as error:
        fingerprint(tmp_path / "none")
    assert message(error) == f"{tmp_path / 'none'}: no such folder"


def test_the_source_of_the_data_is_that_of_its_manifest_if_it_can_be_read(tmp_path):
    assert data_source(tmp_path / "none") is None
    assert data_source(tmp_path) is None
    write_manifest(tmp_path, {"source": "hub org/corpus", "shards": []})
    assert data_source(tmp_path) is None, "a partial manifest is not the data's yet"
    write_manifest(tmp_path, {"source": "hub org/corpus", "shards": []}, finished=True)
    assert data_source(tmp_path) == "hub org/corpus"
    for damaged in ("{", "[]", "3", '{"shards": []}'):
        (tmp_path / "manifest.json").write_text(damaged)
        assert data_source(tmp_path) is None
