"""From a unit of a source to its tokens: the work of fineweb.py's worker processes."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from common.corpus import BadText, Source, Unit, blame, file_kind, read_ahead, unit_texts
from common.tokenizer import EOT, EOT_TEXT, Engine, GigatokenError, encode, engine_ids
from common.workers import Packed, pack

# The marker on a line of its own, as in TinyStories: the line ends belong to it.
SEPARATOR = re.compile(rf"(?:\r?\n)?{re.escape(EOT_TEXT)}(?:\r?\n)?")
BEFORE_DOCUMENT = np.array([EOT], np.uint16)


class UnitTokens(NamedTuple):
    """The tokens of a unit, and what a user wants to know about its text."""

    tokens: Packed  # uint16, with <|endoftext|> before every document
    counts: Counter  # empty, skipped: texts left out; separators, marks: written <|endoftext|>
    faults: list[str]  # what was skipped


def alone(source: Source, unit: Unit) -> tuple[Source, Unit]:
    """Return a unit with its file alone: to send 20,000 names with each took 9 of 10 seconds."""
    return replace(source, files=(source.files[unit.file],)), replace(unit, file=0)


# gigatoken's ids are compared: many in the first bytes that a run reads, and samples of the rest
COMPARED_BYTES, COMPARED_CHARS = 4 << 20, 1 << 19
SAMPLE_EVERY, SAMPLE_CHARS = 1 << 20, 4096  # bytes, characters: a few percent of the time


def chars_to_compare(before: float, after: float) -> int:
    """Return how many characters of a unit are compared: bytes `before` to `after` of a run."""
    if before < COMPARED_BYTES:
        return COMPARED_CHARS
    return SAMPLE_CHARS if after // SAMPLE_EVERY > before // SAMPLE_EVERY else 0


def is_blank(text: str | None) -> bool:
    return not text or text.isspace()


def tokenize_unit(
    source: Source,
    unit: Unit,
    split_eot: str = "auto",
    engine: Engine = "tiktoken",
    compare: int = 0,
    following: Iterable[tuple[Source, Unit]] = (),
) -> UnitTokens:
    """Tokenise one unit. Raises BadText for text that cannot be read, unless the source skips it.

    With `split_eot` (auto: in text files) a written <|endoftext|> separates documents. If gigatoken
    gives other ids than tiktoken in the first `compare` characters, this raises GigatokenError.
    Meanwhile the `following` units of this worker are downloaded.
    """
    for later in following:
        with contextlib.suppress(Exception):  # what is wrong with it shows in its turn
            read_ahead(*later)
    path, tokens, counts, faults = source.files[unit.file][0], [], Counter(), []
    is_txt = file_kind(path)[0] == "txt"
    splits = is_txt if split_eot == "auto" else split_eot == "on"
    continues = is_txt and unit.start > 0  # its first text is the rest of a document
    ids, compare = engine_ids(engine), compare if engine == "gigatoken" else 0
    with blame(path):
        for text in unit_texts(source, unit):
            if isinstance(text, BadText):
                if source.on_error == "stop":
                    raise BadText(f"{path} {text}; --on_error skip leaves it out")
                counts["skipped"] += 1
                faults.append(f"{path} {text}")
                if is_txt and unit.share < 1:  # what follows in the file is a new document
                    tokens.append(BEFORE_DOCUMENT)
            elif is_blank(text) and not continues:
                counts["empty"] += 1
            else:
                if sample := text[:compare]:
                    compare -= len(sample)
                    if not np.array_equal(encode(sample, ids), encode(sample)):
                        what = "gigatoken and tiktoken give different ids for a text of"
                        raise GigatokenError(f"{what} {path}")
                if marks := text.count(EOT_TEXT):
                    counts["separators" if splits else "marks"] += marks
                for document in SEPARATOR.split(text) if splits and marks else (text,):
                    if continues:
                        tokens.append(encode(document, ids))
                    elif not is_blank(document):
                        tokens += [BEFORE_DOCUMENT, encode(document, ids)]
                    continues = False
    return UnitTokens(pack(np.concatenate(tokens or [BEFORE_DOCUMENT[:0]])), counts, faults)
