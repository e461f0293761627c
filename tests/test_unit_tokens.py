"""common/unit_tokens.py: what a worker does with a unit, and gigatoken's ids compared."""

import numpy as np
import pytest
from data_helpers import expected_tokens, make_texts, write_jsonl

from common import tokenizer, unit_tokens
from common.corpus import find_files, source_units
from common.tokenizer import GigatokenError, get_gigatoken
from common.unit_tokens import SAMPLE_CHARS, chars_to_compare, tokenize_unit


@pytest.fixture
def faulty(monkeypatch):
    """gigatoken with a fault: the word WRONG has another id."""
    right = tokenizer.Gigatoken.ids

    def ids(self, text: str) -> np.ndarray:
        return right(self, text.replace("WRONG", "wrong"))

    monkeypatch.setattr(tokenizer.Gigatoken, "ids", ids)


def only_unit(path, texts: list[str]):
    source = find_files((str(write_jsonl(path, texts)),))
    [unit] = source_units(source, 0, 0)
    return source, unit


def test_both_engines_give_the_tokens_of_tiktoken(tmp_path):
    texts = [*make_texts(30), "half a pair \ud800 and a rest"]
    work = only_unit(tmp_path / "t.jsonl", texts)
    texts[-1] = texts[-1].replace("\ud800", "\ufffd")
    for engine in ("tiktoken", "gigatoken"):
        for compare in (0, 50, 1 << 20):
            made = tokenize_unit(*work, "auto", engine, compare)
            assert np.array_equal(made.tokens, expected_tokens(texts))
            assert made.tokens.dtype == np.uint16


@pytest.mark.parametrize("at", [0, SAMPLE_CHARS - 6])
def test_a_wrong_id_at_the_beginning_of_a_unit_is_found(tmp_path, faulty, at):
    work = only_unit(tmp_path / "t.jsonl", ["", "x" * at + " WRONG", "more"])
    with pytest.raises(GigatokenError, match=r"gigatoken and tiktoken .*t\.jsonl"):
        tokenize_unit(*work, "auto", "gigatoken", SAMPLE_CHARS)
    assert len(tokenize_unit(*work, "auto", "tiktoken", SAMPLE_CHARS).tokens)


def test_a_wrong_id_is_found_in_as_many_characters_as_are_compared(tmp_path, faulty):
    texts = [*make_texts(5), "here: WRONG"]
    work, chars = only_unit(tmp_path / "t.jsonl", texts), sum(map(len, texts))
    tokenize_unit(*work, "auto", "gigatoken", chars - 6)
    with pytest.raises(GigatokenError):
        tokenize_unit(*work, "auto", "gigatoken", chars)


@pytest.mark.parametrize("unit_bytes", [300, 5000, 2 << 20, 10 << 20])
def test_a_few_percent_are_compared_for_units_of_any_size(unit_bytes):
    """A file of 5 kB is a unit: 4,096 characters of each made tiktoken the limit again."""
    ends = range(unit_bytes, 500 << 20, unit_bytes)
    chars = [chars_to_compare(end - unit_bytes, end) for end in ends]
    compared = [min(n, unit_bytes) for n in chars]
    first = compared[: max(1, (4 << 20) // unit_bytes)]
    assert sum(first) > 0.99 * min(4 << 20, len(first) << 19), "the beginning is compared"
    later = compared[len(first) + 1 :]
    share = sum(later) / (len(later) * unit_bytes)
    assert 0.0002 < share < 0.005  # tiktoken is twenty times slower


def test_gigatoken_is_used_for_all_but_the_sample(tmp_path, monkeypatch):
    seen = []

    def ids(text: str) -> np.ndarray:
        seen.append(len(text))
        return right(text)

    right = tokenizer.tiktoken_ids
    monkeypatch.setattr(tokenizer, "tiktoken_ids", ids)
    monkeypatch.setattr(tokenizer.encode, "__defaults__", (ids,))
    work = only_unit(tmp_path / "t.jsonl", ["word " * 10_000, "a second text"])
    tokenize_unit(*work, "auto", "gigatoken", SAMPLE_CHARS)
    assert seen == [SAMPLE_CHARS]
    assert get_gigatoken() is get_gigatoken()


def test_what_is_wrong_with_a_later_unit_does_not_stop_this_one(tmp_path, monkeypatch):
    def broken(source: object, unit: object) -> None:
        raise ValueError(f"{unit} is damaged")

    monkeypatch.setattr(unit_tokens, "read_ahead", broken)
    texts = make_texts(5)
    work = only_unit(tmp_path / "t.jsonl", texts)
    made = tokenize_unit(*work, "auto", "gigatoken", 100, [work, work])
    assert np.array_equal(made.tokens, expected_tokens(texts))
