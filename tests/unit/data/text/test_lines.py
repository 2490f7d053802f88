"""The same file through every reader: the same texts, or the same refusal with file, line and remedy."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.builders.documents import DocumentOptions, preprocess
from megatron_grit.data.builders.filters import HeldOut
from megatron_grit.data.builders.grit_builder import build_grit, read_texts
from megatron_grit.data.builders.sources.allnli import convert_allnli
from megatron_grit.data.builders.sources.msmarco import convert_msmarco
from megatron_grit.data.text import line_blocks
from megatron_grit.data.text.lines import Line, parse_json, read_lines
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.qa.files import read_references
from megatron_grit.evaluation.tasks import retrieval
from megatron_grit.inference.text_files import TextFile
from megatron_grit.retrieval.mining.cross_encoder import ScoreFile
from megatron_grit.retrieval.mining.mine import read_embedding_records
from megatron_grit.retrieval.stages.tombstone import parse_documents
from tests.unit.data.samples import byte_level_json

BAD = {
    '{"text": "a", "unread": ' + "1" * 5000 + "}": "a whole number of more than 4,300 digits; write it as a string",
    '{"text": "a", "unread": [-Infinity]}': "malformed JSON: -Infinity is no JSON; write null",
    '{"text": "a", "unread": NaN}': "malformed JSON: NaN is no JSON; write null",
    '{"text": "a", "unread": 1e999}': "the number 1e999, which is larger than any double; write it as a string",
    '{"text": "a", "unread": {"k": 1, "l": 2, "k": 1}}': 'the key "k" is twice in an object; leave one',
    '{"text": "a", "unread": "\\ud800"}': "half of a surrogate pair (\\ud...) stands alone in a string; write",
    '{"text": "a", "unread": ' + "[" * 100_000 + "]" * 100_000 + "}": "malformed JSON: nested too deeply; flatten it",
    '{"text": "a\tb"}': "malformed JSON: Invalid control character at at column 12",
    '{"text": "a"} {"text": "b"}': "malformed JSON: Extra data at column 15",
    '{"text": "a"': "malformed JSON: Expecting ',' delimiter at column 13",
    '\ufeff{"text": "a"}': "malformed JSON: Expecting value at column 1",
}
BYTES = {b'{"text": "\xff"}': "not UTF-8: byte 10 of the line; convert the file"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_json(tmp_path_factory.mktemp("tokenizer"))


def readers(folder: Path, tokenizer: Path) -> dict[str, Callable[[Path], Any]]:
    pair = folder / "pair.tsv"
    pair.write_text("1\ttext\n")
    known = folder / "known.jsonl"
    known.write_text('{"qid": 1, "pos": [1], "neg": {"s": [{"pid": 1, "ce-score": 0}]}}\n')
    out = folder / "out"
    return {
        "build-grit": lambda path: build_grit([path], out, tokenizer),
        "preprocess-data": lambda path: preprocess([path], out, DocumentOptions(tokenizer=str(tokenizer))),
        "train-tokenizer": lambda path: list(read_texts([path])),
        "decontaminate": lambda path: HeldOut([path]),
        "convert-allnli": lambda path: convert_allnli(path, out),
        "convert-msmarco": lambda path: convert_msmarco(pair, pair, path, out),
        "its scores": lambda path: convert_msmarco(pair, pair, known, out, scores_path=path),
        "evaluate": retrieval.read,
        "evaluate qa": read_references,
        "mine-negatives": lambda path: read_embedding_records([path]),
        "its scores of pairs": ScoreFile,
    }


@pytest.mark.parametrize("number", range(len(BAD) + len(BYTES)))
def test_every_reader_of_json_refuses_the_same(tmp_path: Path, tokenizer: Path, number: int) -> None:
    line, message = [*((line.encode(), message) for line, message in BAD.items()), *BYTES.items()][number]
    path = tmp_path / "in.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b"\r\n" + line + b"\r\n")
    told = {}
    for name, read in readers(tmp_path, tokenizer).items():
        with pytest.raises(DataError) as caught:
            read(path)
        told[name] = str(caught.value)
    assert len(set(told.values())) == 1, told
    assert told["build-grit"].startswith(f"{path}:2: ") and message in told["build-grit"]


def test_builders_skip_what_they_would_refuse(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = '{"text": "a line\u2028in one\\u0000"}'
    path.write_bytes("\n".join([*BAD, good]).encode() + b"\n" + b"\n".join([*BYTES, good.encode()]))
    report = build_grit([path], tmp_path / "grit", tokenizer, on_error="skip")
    totals = preprocess([path], tmp_path / "docs", DocumentOptions(tokenizer=str(tokenizer)), on_error="skip")
    assert (report.num_kept, report.dropped) == (2, {"bad_line": len(BAD) + 1})
    assert (totals.num_documents, totals.rejected) == ({"text": 2}, {"bad_line": len(BAD) + 1})
    rejected = [(tmp_path / f"{name}.rejected.jsonl").read_text() for name in ("grit", "docs_document")]
    assert rejected[0] == rejected[1]


TEXTS = ["one", "line\u2028in\x0bone", " two\x85", "NUL\0", "last\rof all"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["in.txt", "in.txt.gz"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_every_reader_of_texts_reads_the_same(tmp_path: Path, end: str, name: str, mark: bytes) -> None:
    path = tmp_path / name
    content = mark + end.join(TEXTS).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [line.text() for line in read_lines(path)] == TEXTS
    assert [line.text() for line in TextFile(path, path).lines()] == TEXTS
    held_out = HeldOut([path], ngram=5)
    assert all(held_out.overlap([text]) for text in TEXTS)
    table = tmp_path / f"table{name.removeprefix('in')}"
    content = mark + end.join(f"{number}\t{text}" for number, text in enumerate(TEXTS)).encode()
    table.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    plain, mined = tmp_path / "plain.tsv", tmp_path / "mined.jsonl"
    plain.write_bytes(content)
    mined.write_text("".join(json.dumps({"qid": n, "pos": [n], "neg": {"s": [(n + 1) % 5]}}) + end for n in range(5)))
    convert_msmarco(table, plain, mined, tmp_path / "out.jsonl", margin=None)
    records = [line.value() for line in read_lines(tmp_path / "out.jsonl")]
    assert [record["query"] for record in records] == [text.strip() for text in TEXTS]
    assert [record["pos"] for record in records] == [[text.strip()] for text in TEXTS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ntwo\n".encode("utf-16"), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (codecs.BOM_UTF16_BE + "one".encode("utf-16-be"), "is UTF-16; convert it"),
        ("one\n".encode("utf-32"), "is UTF-32; convert it: iconv -f UTF-32 -t UTF-8"),
        (b"one\rtwo\r", r"its lines end with \r alone; convert it: tr '\r' '\n'"),
    ],
)
def test_files_that_are_refused_as_a_whole(tmp_path: Path, tokenizer: Path, content: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    every = readers(tmp_path, tokenizer) | {
        "encode": lambda path: TextFile(path, path).survey(),
        "queries of convert-msmarco": lambda path: convert_msmarco(path, path, path, tmp_path / "out"),
        "corpus of convert-msmarco": lambda path: convert_msmarco(
            tmp_path / "pair.tsv", path, tmp_path / "known.jsonl", tmp_path / "out"
        ),
    }
    for read in every.values():
        with pytest.raises(DataError) as caught:
            read(path)
        assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="in.jsonl"):
        parse_documents(str(path), [("data", 1)])


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("block_bytes", [10, 50])
def test_lines_that_are_too_long(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    """They are never held, and skipped like others; lines up to the limit are read."""
    monkeypatch.setattr(line_blocks, "BLOCK_BYTES", 50)
    for module in (line_blocks, __import__("megatron_grit.data.text.lines", fromlist=["lines"])):
        monkeypatch.setattr(module, "LONGEST_LINE", 200)
    texts = [b"a" * size for size in (1, 200, 201, 30, 1000, 3, 100_000, 7, 5000)]
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"\n".join(texts)) if name.endswith(".gz") else b"\n".join(texts))
    inputs = line_blocks.find_inputs([path])
    refs = list(line_blocks.iterate_blocks(inputs, line_blocks.partition_files(inputs, 1)[0], block_bytes=block_bytes))
    assert refs[-1].stop == sum(map(len, texts)) + len(texts) - 1
    found = [line for ref in refs for line in ref.read().lines()]
    assert [len(line) for line in found if not isinstance(line, line_blocks.TooLong)] == [1, 200, 30, 3, 7]
    assert [number for number, line in enumerate(found) if isinstance(line, line_blocks.TooLong)] == [2, 4, 6, 8]
    for number, stopped in enumerate(refs):
        skipped = line_blocks.iterate_blocks(
            inputs, line_blocks.partition_files(inputs, 1)[0], block_bytes=block_bytes, skip_to=(0, stopped.stop)
        )
        assert [ref.start for ref in skipped] == [ref.start for ref in refs[number + 1 :]]
    with pytest.raises(DataError, match=f"{path}:3: longer than 200 bytes; split it into several"):
        [Line.text(line) for line in read_lines(path)]


def test_numbers_that_can_be_told() -> None:
    assert parse_json(b'{"a": [1e308, -0.0, 12345678901234567890, null, true], "b": {}}\r') == {
        "a": [1e308, -0.0, 12345678901234567890, None, True],
        "b": {},
    }
