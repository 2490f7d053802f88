"""A file in any of its forms through every reader of lines: the same records, or the same refusal of the same line."""

from __future__ import annotations

import codecs
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.builders.documents import DocumentOptions, preprocess
from megatron_grit.data.builders.sources.allnli import convert_allnli
from megatron_grit.data.builders.sources.msmarco import KeyedLines, convert_msmarco
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.text.lines import read_lines
from megatron_grit.data.text.records import BadLine, read_records
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.qa.files import read_predictions, read_references
from megatron_grit.evaluation.report import read_metrics, read_timings
from megatron_grit.evaluation.tasks import retrieval
from megatron_grit.inference.text_files import TextFile
from megatron_grit.retrieval.index.recall_queries import RecallQuestions
from megatron_grit.retrieval.mining.cross_encoder import ScoreFile
from megatron_grit.retrieval.mining.mine import read_embedding_records
from megatron_grit.retrieval.stages.tombstone import parse_documents
from tests.unit.data.samples import byte_level_json

BUDGET = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Reader(NamedTuple):
    """A place that reads lines."""

    line: Callable[[int, str], Any]
    """The line of a text and its number: JSON of an object, or the line itself."""
    read: Callable[[Path], list[str]]
    """Its texts, from the file."""
    blanks: bool = True
    """Whether it leaves blank lines out."""
    compressed: bool = True


def _built(path: Path) -> list[str]:
    tokenizer = path.with_name("tokenizer.json")
    preprocess([path], path.with_name("built"), DocumentOptions(tokenizer=str(tokenizer)), overwrite=True)
    file = IndexedFile(path.with_name("built_text_document"))
    documents = [file.read(number, number + 1).tolist() for number in range(file.num_sequences)]
    return [load_tokenizer(tokenizer).decode(tokens) for tokens in documents]


def _records(path: Path) -> list[str]:
    texts = []
    for record in read_records(path):
        if isinstance(record, BadLine):
            raise record.error
        texts.append(str(record.text))
    return texts


def _converted(path: Path, key: str = "query", **options: Any) -> list[str]:
    output = path.with_name("converted.jsonl")
    convert_allnli(path, output, **options)
    return list(dict.fromkeys(line.value()[key] for line in read_lines(output)))


def _queries(path: Path) -> list[str]:
    corpus, mined, output = (path.with_name(name) for name in ("corpus.tsv", "mined.jsonl", "queries.jsonl"))
    ids = [line.content.partition(b"\t")[0].decode() for line in read_lines(path) if not line.is_blank]
    mined.write_text("".join(json.dumps({"qid": one, "pos": [0], "neg": {"s": [1]}}) + "\n" for one in ids))
    convert_msmarco(path, corpus, mined, output, margin=None)
    return [line.value()["query"] for line in read_lines(output)]


def _recall_queries(path: Path) -> list[str]:
    config = RetroDbConfig(recall_queries=str(path))
    return RecallQuestions(SimpleNamespace(folder=path.parent, config=config), "").texts()  # type: ignore[arg-type]


JSON_READERS = {
    "build-grit and train-tokenizer": Reader(lambda _, text: {"text": text}, _records),
    "preprocess-data": Reader(lambda _, text: {"text": text}, _built),
    "evaluate": Reader(
        lambda _, text: {"query": text, "pos": [text]}, lambda path: [text for _, text in retrieval.read(path).queries]
    ),
    "mine-negatives": Reader(
        lambda _, text: {"query": text, "pos": [text]},
        lambda path: [record.query.text for record in read_embedding_records([path]) if record.query],
    ),
    "scores of pairs": Reader(
        lambda number, text: {"query": text, "passage": str(number), "score": 1},
        lambda path: [query for query, _ in ScoreFile(path)._scores],
    ),
    "convert-allnli": Reader(lambda _, text: {"anchor": text, "positive": "p", "negative": "n"}, _converted),
    "references of evaluate qa": Reader(
        lambda _, text: {"answers": [text]}, lambda path: [text for (text,) in read_references(path)]
    ),
    "answers of evaluate qa": Reader(lambda _, text: {"pred": text}, read_predictions),
    "metrics of report": Reader(
        lambda number, text: {"step": number, "note": text}, lambda path: [line["note"] for line in read_metrics(path)]
    ),
}
TEXT_READERS = {
    "encode": Reader(
        lambda _, text: text, lambda path: [line.text() for line in TextFile(path, path).lines()], blanks=False
    ),
    "lines of evaluate qa": Reader(lambda _, text: text, read_predictions, blanks=False),
    "samples of report": Reader(
        lambda _, text: text, lambda path: [line.text() for line in read_lines(path)], blanks=False
    ),
    "recall queries": Reader(lambda _, text: text, _recall_queries),
    "queries of convert-msmarco": Reader(lambda number, text: f"{number}\t{text}", _queries),
    "corpus of convert-msmarco": Reader(
        lambda number, text: f"{number}\t{text}",
        lambda path: [corpus.text(key.decode()) for corpus in [KeyedLines(path)] for key in corpus._starts],
        compressed=False,
    ),
    "timings of report": Reader(lambda _, text: f"{text}\t1.5", lambda path: list(read_timings(path))),
    "tombstones": Reader(
        lambda number, _: f"data:{number}",
        lambda path: [f"{document}" for _, document in parse_documents(str(path), [("data", 99)])],
    ),
}
READERS = JSON_READERS | TEXT_READERS

TEXTS = st.lists(
    st.text(st.sampled_from('ab"\\ \u2028\u2029\x0b\x0c\x1c\x85\0\ré\U0001f600,:'), min_size=1, max_size=9).filter(
        lambda text: text == text.strip()
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


class Form(NamedTuple):
    """How lines are written."""

    mark: bool = False
    end: str = "\n"
    last_end: bool = True
    blank: str | None = None
    """A line before each."""
    suffix: str = ""
    escaped: bool = False

    def content(self, lines: list[bytes]) -> bytes:
        end = self.end.encode()
        if self.blank is not None:
            lines = [part for line in lines for part in (self.blank.encode(), line)]
        content = codecs.BOM_UTF8 * self.mark + end.join(lines) + end * self.last_end
        if self.suffix == ".gz":
            return gzip.compress(content, mtime=0)
        return zstandard.ZstdCompressor().compress(content) if self.suffix else content

    def lines(self, reader: Reader, texts: list[str]) -> list[bytes]:
        found = []
        for number, text in enumerate(texts):
            line = reader.line(number, text)
            line = line if isinstance(line, str) else json.dumps(line, ensure_ascii=self.escaped)
            found.append(line.encode())
        return found


FORMS = st.builds(
    Form,
    mark=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    last_end=st.booleans(),
    blank=st.sampled_from([None, None, "", " \t"]),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    escaped=st.booleans(),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    byte_level_json(folder)
    (folder / "corpus.tsv").write_text("".join(f"{number}\tpassage {number}\n" for number in range(9)))
    return folder


def written(folder: Path, name: str, content: bytes, suffix: str) -> Path:
    path = folder / f"in{'.jsonl' if name in JSON_READERS else '.txt'}{suffix}"
    path.write_bytes(content)
    return path


@BUDGET
@given(TEXTS, FORMS)
@example(["a\0b", "c\rd", "e\u2028f", "g\x85h"], Form(end="\r\n", last_end=False))
def test_every_reader_reads_the_same(folder: Path, texts: list[str], form: Form) -> None:
    if len(texts) == 1 and "\r" in texts[0]:  # else it is a file whose lines end with \r alone, which is refused
        form = form._replace(last_end=True)
    for name, reader in READERS.items():
        own = form
        if not reader.blanks:
            own = own._replace(blank=None)
        if not reader.compressed:
            own = own._replace(suffix="")
        path = written(folder, name, own.content(own.lines(reader, texts)), own.suffix)
        expected = [str(number) for number in range(len(texts))] if name == "tombstones" else texts
        assert reader.read(path) == expected, name


DAMAGE = {
    "not UTF-8": (b"a\xffb", r"not UTF-8: byte \d+ of the line; convert the file"),
    "half a character": (b"a\xc3", r"not UTF-8: byte \d+ of the line; convert the file"),
    "half of a pair": (b"\xed\xa0\x80", r"not UTF-8: byte \d+ of the line; convert the file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_line(folder: Path, name: str, damage: str) -> None:
    form, reader = Form(mark=True, end="\r\n"), READERS[name]
    lines = form.lines(reader, ["one", "two", "three"])
    content, message = DAMAGE[damage]
    lines[1] = content if name == "tombstones" else lines[1].replace(b"two", content)
    path = written(folder, name, form.content(lines), "")
    with pytest.raises((DataError, ConfigError)) as caught:
        reader.read(path)
    assert re.search(rf"{re.escape(str(path))}:2: {message}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_control_character_in_json_is_escaped(folder: Path, name: str) -> None:
    """A NUL in a string of JSON has to be; in a text it is a character."""
    reader, form = READERS[name], Form()
    lines = [line.replace(b"two", b"t\0o") for line in form.lines(reader, ["one", "two"])]
    path = written(folder, name, form.content(lines), "")
    if name in JSON_READERS:
        with pytest.raises(DataError, match=f"{re.escape(str(path))}:2: malformed JSON: Invalid control character"):
            reader.read(path)
    elif name != "tombstones":
        assert "t\0o" in reader.read(path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("one\ntwo\n".encode("utf-16"), "", "is UTF-16; convert it"),
        ("one\ntwo\n".encode("utf-32"), "", "is UTF-32; convert it"),
        (b"one\rtwo\r", "", "its lines end with .r alone; convert it"),
        (gzip.compress(b"one\n" * 99, mtime=0)[:-9], ".gz", "not a whole gzip file"),
        (b"one\n", ".gz", "not a whole gzip file: Not a gzipped file"),
        (zstandard.ZstdCompressor().compress(b"one\n" * 99)[:-3], ".zst", "not a whole zstd file"),
        (b"one\n", ".zst", "not a zstd file"),
    ],
)
def test_every_reader_refuses_the_file(folder: Path, name: str, content: bytes, suffix: str, message: str) -> None:
    if suffix and not READERS[name].compressed:
        message = "is compressed, and its lines are looked up in no order"
    path = written(folder, name, content, suffix)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        READERS[name].read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
