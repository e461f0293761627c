"""common/tokenizer.py: tokens equal tiktoken's, for any text."""

import base64
import hashlib
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common import tokenizer
from common.tokenizer import (
    EOT,
    choose_engine,
    encode,
    encode_prompt,
    get_gigatoken,
    get_tokenizer,
    text_cut,
)


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


def test_the_ranks_are_read_from_the_file_and_no_copy_is_kept(tmp_path, monkeypatch):
    """tiktoken would trust a copy in the folder for temporary files, which anyone may have made."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    copy = tmp_path / hashlib.sha1(str(tokenizer.RANKS_PATH).encode()).hexdigest()
    the, cat = (base64.b64encode(word) for word in (b" the", b" cat"))
    data = tokenizer.RANKS_PATH.read_bytes().replace(the, b"-").replace(cat, the)
    copy.write_bytes(data.replace(b"-", cat))
    assert get_tokenizer.__wrapped__().encode(" the cat") == encode(" the cat").tolist()
    copy.unlink()
    get_tokenizer.__wrapped__()
    assert not list(tmp_path.iterdir())


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


# -----------------------------------------------------------------------------
# gigatoken: tiktoken is the reference


PLAIN = [*"aIzé東한я7²½٣_.-'\"/\\\x00\x7f", "'s", "'ll", "'T", "'\u017f", "don't", "\ufb01"]
BLANKS = [*" \n\t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u202f\u205f\u3000"]
BLANKS += ["  ", "\r\n", "\u200b", "\u2060", "\ufeff"]
MARKS = [*"\u0300\u0301\u20dd\ufe0f\u200d🙂🏽👩\U000e0067\ud7ff\ue000\uffff\U00010000\U0010ffff"]
MARKS += ["<|endoftext|>", "\u088f", "\U00032e22"]  # the last two are letters in Unicode 17


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Texts of characters of every kind, next to each other in every combination."""
    rng, kinds = random.Random(seed), [PLAIN, PLAIN + BLANKS, PLAIN + 2 * BLANKS + MARKS]
    for _ in range(count):
        text = rng.choices(rng.choice([*kinds, MARKS + BLANKS]), k=rng.randrange(40))
        text += [chr(c) for c in rng.choices(range(0x110000), k=3) if not 0xD800 <= c < 0xE000]
        rng.shuffle(text)
        yield "".join(text)


def test_gigatoken_gives_the_ids_of_tiktoken_for_random_unicode():
    whole, fast = get_tokenizer().encode_ordinary, get_gigatoken().ids
    for text in random_texts(20_000, seed=1):
        assert fast(text).tolist() == whole(text), repr(text)


def test_both_engines_split_at_the_same_characters():
    """A letter before 's makes another piece than a sign or a character that is not assigned."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    old = "".join(f"{c}'s " for c in characters if not tokenizer.UNICODE_17.match(c))
    tokens = get_gigatoken().tokenizer.encode(old)
    assert np.array_equal(tokens, encode(old)), "the tables of Unicode differ: see UNICODE_17"
    new = [c for c in characters if tokenizer.UNICODE_17.match(c)]
    for text in (f"one {c}'s word" for c in new):
        assert np.array_equal(get_gigatoken().ids(text), tokenizer.tiktoken_ids(text)), ascii(text)


def test_gigatoken_gives_the_ids_of_tiktoken_for_real_text():
    """Licences, documentation and sources of the packages that are installed."""
    chars, fast = 0, get_gigatoken().ids
    for path in sorted(Path(np.__file__).parent.rglob("*.py*")) + sorted(ROOT.rglob("docs/*.md")):
        if path.suffix in (".py", ".pyi", ".md"):
            text = path.read_text("utf-8")
            assert np.array_equal(fast(text), tokenizer.tiktoken_ids(text)), path
            chars += len(text)
        if chars > 3_000_000:
            break
    assert chars > 3_000_000


def test_both_engines_agree_on_what_stops_other_tokenizers():
    fast = get_gigatoken().ids
    for text in (" " * 1_200_000 + "x", "ab" * 400_000, "\u0301" * 300_000, "a\ud800b", "", "\x00"):
        assert np.array_equal(encode(text, fast), encode(text)), repr(text[:20])
        assert encode(text, fast).dtype == np.uint16


@pytest.fixture
def begun(monkeypatch) -> list[int]:
    """Grows by one for each gigatoken that is loaded."""
    begun, begin = [], tokenizer.Gigatoken.begin

    def counted(self) -> None:
        begun.append(1)
        begin(self)

    monkeypatch.setattr(tokenizer.Gigatoken, "begin", counted)
    return begun


@pytest.mark.parametrize("known", [True, False])
def test_gigatoken_forgets_its_words_when_they_take_too_much_memory(monkeypatch, begun, known):
    monkeypatch.setattr(tokenizer.Gigatoken, "MOST_CHARS", 3 << 20)
    memory = itertools.count(1 << 30, 50 << 20)  # 50 MB more at each look
    monkeypatch.setattr(tokenizer, "resident_memory", lambda: next(memory) if known else None)
    engine = tokenizer.Gigatoken()
    for _ in range(8):
        engine.ids("word " * (1 << 18))
    assert len(begun) == 3
    assert np.array_equal(engine.ids("as before"), encode("as before"))


def test_memory_of_libraries_loaded_after_gigatoken_is_not_taken_for_words(monkeypatch, begun):
    memory = 100 << 20
    monkeypatch.setattr(tokenizer, "resident_memory", lambda: memory)
    engine = tokenizer.Gigatoken()
    engine.ids("a short text")
    memory += 100 << 20  # tiktoken, and what reads the file
    for _ in range(8):
        engine.ids("word " * (1 << 18))
    assert len(begun) == 1


class Broken:
    """A module of which nothing can be imported."""

    def __init__(self, error: ImportError):
        self.__dict__["error"] = error

    def __getattr__(self, name: str) -> object:
        raise self.error


def test_without_gigatoken_the_reason_is_known(monkeypatch):
    assert choose_engine() == ("gigatoken", "")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    engine, why = choose_engine()
    assert engine == "tiktoken" and "gigatoken" in why
    for error in (ImportError(), ImportError("made for\nanother numpy")):
        sys.modules["gigatoken"] = Broken(error)
        assert choose_engine() == ("tiktoken", f"ImportError: {' '.join(str(error).split())}")
