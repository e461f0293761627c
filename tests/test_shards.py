"""common/shards.py: the bytes of shards and manifests, and every fault that is found in them."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from common.shards import (
    data_source,
    fingerprint,
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
    assert message(error) == f"{folder}: no *_val_* shards"
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
# the manifest


def test_a_manifest_is_partial_until_it_is_finished(tmp_path):
    assert read_manifest(tmp_path) == (None, False)
    manifest = {"source": "local", "tokens": 0, "shards": [{"tokens": 3}]}
    write_manifest(tmp_path, manifest)
    assert os.listdir(tmp_path) == ["manifest.partial.json"]
    assert read_manifest(tmp_path) == ({**manifest, "tokens": 3}, False)
    manifest["shards"].append({"tokens": 4})
    write_manifest(tmp_path, manifest, finished=True)
    assert os.listdir(tmp_path) == ["manifest.json"]
    assert read_manifest(tmp_path) == ({**manifest, "tokens": 7}, True)
    assert (tmp_path / "manifest.json").read_text() == json.dumps(manifest, indent=1) + "\n"


def test_a_finished_manifest_counts_before_a_partial_one(tmp_path):
    write_manifest(tmp_path, {"source": "finished", "shards": []}, finished=True)
    write_manifest(tmp_path, {"source": "partial", "shards": []})
    manifest, finished = read_manifest(tmp_path)
    assert (manifest["source"], finished) == ("finished", True)


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
