"""The tokenizer's files: written as GPT-2's, and told from those of other tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.tokenizer import EOT, get_tokenizer
from common.tokenizer_files import find_other_tokenizer, tokenizer_files, vocabulary, write_token


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return tokenizer_files(32)


def other(folder: Path, **texts: str) -> str | None:
    """Write files, named with _ for a dot; return the one with another tokenizer."""
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return find_other_tokenizer(in_folder(folder))


def in_folder(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: path if (path := folder / name).exists() else None


def test_tokens_are_spelled_as_gpt2_spells_them():
    assert write_token(b" the\n\x00\xff") == "ĠtheĊĀÿ"
    vocab = vocabulary()
    # published numbers of GPT-2's encoder.json
    assert (len(vocab), vocab["!"], vocab["Ġthe"], vocab["Ċ"]) == (50257, 0, 262, 198)
    assert vocab["<|endoftext|>"] == EOT
    assert vocab["ĠHello"] == get_tokenizer().encode(" Hello")[0]


def test_gpt2_s_own_files_are_known_whatever_their_form(tmp_path, files):
    assert other(tmp_path) is None  # nothing is known of it
    assert other(tmp_path, tokenizer_json=files["tokenizer.json"]) is None
    assert other(tmp_path, vocab_json=files["vocab.json"], vocab_txt="x") is None
    fast = json.loads(files["tokenizer.json"])
    fast["model"]["merges"] = []
    del fast["model"]["vocab"]["<|endoftext|>"]  # only among the added tokens
    assert other(tmp_path, tokenizer_json=json.dumps(fast)) is None
    fast["added_tokens"].append({"id": 50257, "content": "<|pad|>"})
    fast["model"]["vocab"]["brandnew"] = 50258
    assert other(tmp_path, tokenizer_json=json.dumps(fast)) is None


def test_a_hint_of_another_tokenizer_counts_only_without_files(tmp_path, files):
    assert find_other_tokenizer(in_folder(tmp_path), "eos_token_id 0") == "eos_token_id 0"
    (tmp_path / "vocab.json").write_text(files["vocab.json"], encoding="utf-8")
    assert find_other_tokenizer(in_folder(tmp_path), "eos_token_id 0") is None


def test_another_tokenizer_is_found_in_either_file(tmp_path, files):
    vocab = json.loads(files["vocab.json"])
    swapped = {**vocab, "Ġthe": vocab["Ġa"], "Ġa": vocab["Ġthe"]}
    less = {token: i for token, i in vocab.items() if i != 1000}
    fast = json.loads(files["tokenizer.json"])
    fast["model"]["merges"] = []
    good = json.dumps(fast)
    for wrong in (swapped, less, {}, {"a": 0, "b": 1}, {**vocab, "brandnew": 7}):
        assert other(tmp_path, vocab_json=json.dumps(wrong)) == "vocab.json"
    assert other(tmp_path, tokenizer_json=good) == "vocab.json"
    for wrong in (swapped, less):
        fast["model"]["vocab"] = wrong
        found = other(tmp_path, tokenizer_json=json.dumps(fast), vocab_json=files["vocab.json"])
        assert found == "tokenizer.json"
    fast["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -3.5]]}
    assert other(tmp_path, tokenizer_json=json.dumps(fast)) == "tokenizer.json"


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "tokenizer.model"])
def test_files_that_gpt2_never_has_are_another_tokenizer(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00")
    assert other(tmp_path) == name


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "[" * 100_000, '{"a": "b"}', '{"a": {}}'])
@pytest.mark.parametrize("name", ["tokenizer_json", "vocab_json"])
def test_a_damaged_file_is_named(tmp_path, name, text):
    with pytest.raises(ValueError, match=r"json is not a tokenizer .*: get the file again"):
        other(tmp_path, **{name: text})
