"""Filters on the text of records: duplicates, and records that share an n-gram with held-out files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.data.text.records import TEMPLATE_KEYS, Record, parse_record
from megatron_grit.errors import ConfigError, DataError

FINGERPRINT_BYTES = 16
_WORD = re.compile(r"\w+")
_TEXT_SUFFIXES = (".txt", ".text")
_COMPRESSED = (".gz", ".zst")


def fingerprint(record: Record, read: Collection[str] = TEMPLATE_KEYS) -> bytes:
    """16 bytes that are equal for records that differ in white space only.

    Args:
        record: of any kind.
        read: keys of messages beside role and content that tell records apart: those that the chat template reads.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for part in _parts(record, read):
        digest.update(" ".join(part.split()).encode())
        digest.update(b"\0")
    return digest.digest()


def _parts(record: Record, read: Collection[str]) -> Iterator[str]:
    """The texts of a record, each after its name and role."""
    for name, pairs in (("query", record.pairs[:1]), ("pos", record.positives), ("neg", record.negatives)):
        for pair in pairs:
            yield f"{name} {pair.instruction is not None}"
            yield pair.instruction or ""
            yield pair.text
    for side, rated in record.rated:
        yield side
        yield from _parts(rated, read)
    for message in record.messages:
        yield message.role
        yield message.content
        more = {key: held for key, held in (message.more or {}).items() if key in read or key == "content"}
        if more:
            yield json.dumps(more, sort_keys=True)
    if record.tools:
        yield json.dumps(record.tools, sort_keys=True)
    for name, text in (("text", record.text), ("prompt", record.prompt), ("completion", record.completion)):
        if text is not None:
            yield name
            yield text


def contents(record: Record) -> list[str]:
    """The texts of a record, tool calls and reasoning with them, without instructions, system messages and tools, which
    many records share."""
    texts = [pair.text for pair in record.pairs]
    for _, rated in record.rated:
        texts += contents(rated)
    for message in record.messages:
        if message.role != "system":
            texts.append(message.content)
            texts += _strings([held for key, held in (message.more or {}).items() if key in TEMPLATE_KEYS])
    return texts + [text for text in (record.text, record.prompt, record.completion) if text is not None]


def words(text: str) -> list[str]:
    """Words of a text, lower-cased, without punctuation."""
    return _WORD.findall(text.lower())


class HeldOut:
    """Text that must not be trained on, such as the test sets of an evaluation.

    Two records share an n-gram where ``ngram`` consecutive words of one text of each are equal. A held-out record
    whose texts are all shorter is compared as a whole: with each text of a record, and with all of them concatenated.

    Args:
        paths: JSONL of records, or of objects whose strings are all held out; or ``.txt``, a text a line. Plain or
            compressed.
        ngram: number of words.

    Raises:
        ConfigError: ``ngram`` is not positive.
        DataError: a file that cannot be read, a line that is no JSON object, or no text at all.
    """

    def __init__(self, paths: Sequence[str | Path], ngram: int = 13) -> None:
        if ngram < 1:
            raise ConfigError(f"n-grams of {ngram} words; at least 1 is needed")
        self.ngram = ngram
        self._ngrams: set[str] = set()
        self._whole: set[str] = set()
        self._vocabulary: set[str] = set()
        for path in paths:
            found = False
            for texts in _read_texts(path):
                found |= self._add([words(text) for text in texts])
            if not found:
                raise DataError("holds no text to keep out", path=path)

    def _add(self, texts: list[list[str]]) -> bool:
        whole = " ".join(word for text in texts for word in text)
        long = [text for text in texts if len(text) >= self.ngram]
        for text in long:
            self._vocabulary.update(text)
            self._ngrams.update(" ".join(text[at : at + self.ngram]) for at in range(len(text) - self.ngram + 1))
        if whole and not long:
            self._whole.add(whole)
        return bool(whole)

    def overlap(self, texts: Sequence[str]) -> str | None:
        """Words that a record's texts share with the held-out files, or None."""
        split = [words(text) for text in texts]
        for text in split:
            known = 0  # words in a row that the held-out files have: fewer than an n-gram's cannot hold one
            for place, word in enumerate(text, 1):
                known = known + 1 if word in self._vocabulary else 0
                if known >= self.ngram and (found := " ".join(text[place - self.ngram : place])) in self._ngrams:
                    return found
        if self._whole:
            for found in (*map(" ".join, split), " ".join(word for text in split for word in text)):
                if found in self._whole:
                    return found
        return None


def _read_texts(path: str | Path) -> Iterator[list[str]]:
    for line in filled_lines(path):
        suffixes = [suffix for suffix in line.path.suffixes if suffix not in _COMPRESSED]
        plain = bool(suffixes) and suffixes[-1] in _TEXT_SUFFIXES
        yield [line.text()] if plain else _texts_of(line)


def _texts_of(line: Line) -> list[str]:
    """Texts of a record, or all strings of an object of another format."""
    value = line.value()
    try:
        return contents(parse_record(value))
    except DataError as error:
        if not isinstance(value, dict):
            raise line.error(str(error)) from error
        return list(_strings(value))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
