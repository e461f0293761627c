"""common/tokenizer.py: tokens equal tiktoken's, for any text."""

import random

import numpy as np
import pytest

from common import tokenizer
from common.tokenizer import EOT, encode, encode_prompt, get_tokenizer, text_cut


def test_texts_tokenised_in_parts_give_the_tokens_of_the_whole(monkeypatch):
    encode_whole = get_tokenizer().encode_ordinary
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
    blanks = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0"]
    blanks += ["\u2028", "\u3000"]
    for part in (1, 2, 5):
        monkeypatch.setattr(tokenizer, "PART_CHARS", part)
        for _ in range(3000):
            text = "".join(rng.choices(alphabet + 2 * blanks, k=rng.randrange(30)))
            assert encode(text).tolist() == encode_whole(text), repr(text)


def test_a_million_blanks_and_half_a_surrogate_pair_do_not_stop_the_tokenizer():
    encode_whole = get_tokenizer().encode_ordinary
    blank = encode_whole(" ")
    tokens = encode(" " * 1_200_000 + "x")
    assert tokens.tolist() == blank * 1_199_999 + encode_whole(" x")
    assert encode("a\ud800b").tolist() == encode_whole("a\ufffdb")


def test_tokens_are_uint16_and_endoftext_in_a_text_is_ordinary_text():
    assert encode("").dtype == encode("a").dtype == encode("a\ud800b").dtype == np.uint16
    assert encode("").tolist() == []
    assert EOT not in encode("before <|endoftext|> after")
    assert EOT == get_tokenizer().eot_token == get_tokenizer().max_token_value == 50256


def test_a_damaged_file_of_ranks_is_refused(tmp_path, monkeypatch):
    data = bytearray(tokenizer.RANKS_PATH.read_bytes())
    data[1000] ^= 1
    (tmp_path / "ranks").write_bytes(data)
    monkeypatch.setattr(tokenizer, "RANKS_PATH", tmp_path / "ranks")
    with pytest.raises(ValueError, match="ranks is damaged: restore it with `git checkout"):
        get_tokenizer.__wrapped__()


def test_a_text_cut_anywhere_has_the_tokens_of_the_whole():
    rng = random.Random(1)
    words = [*"a'.。中é1🙂\x00", "'s", "bc", "12", "!?", "<|endoftext|>"]
    blanks = [*" \n\t\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b", "  ", "\r\n"]
    blanks.append(" \xa0 \xa0")  # this is a token
    cuts = 0
    for _ in range(4000):
        text = "".join(rng.choices(words + blanks, k=rng.randrange(1, 14))).encode()
        parts, at = [], 0
        while (cut := text_cut(text, at + 1)) is not None:
            parts, at, cuts = [*parts, text[at:cut]], cut, cuts + 1
        parts.append(text[at:])
        assert all(not part[-1:].isspace() for part in parts[:-1])
        tokens = [token for part in parts for token in encode(part.decode()).tolist()]
        assert tokens == encode(text.decode()).tolist(), text
    assert cuts > 1500


def test_a_marker_written_in_a_prompt_is_the_token():
    hi = encode("Hi").tolist()
    assert encode_prompt("<|endoftext|>Hi<|endoftext|>").tolist() == [EOT, *hi, EOT]
    assert encode_prompt("Hi").tolist() == hi
    assert encode_prompt("").tolist() == []
