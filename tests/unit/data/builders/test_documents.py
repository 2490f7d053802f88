from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.builders import documents
from megatron_grit.data.builders.documents import DocumentOptions, describe, find_tokenizer, preprocess
from megatron_grit.data.builders.sentences import SentenceSplitter, load_punkt
from megatron_grit.data.indexed.reader import IndexedFile, read_meta, token_dtype
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.samples import sentence


@pytest.fixture(scope="module")
def json_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE: read through the cache of words, unlike the SentencePiece model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((sentence(number, 12) for number in range(200)), trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["SentencePiece", "byte-level BPE"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer_path: Path, json_tokenizer_path: Path) -> Path:
    return tokenizer_path if request.param == "SentencePiece" else json_tokenizer_path


def corpus(count: int = 60) -> list[dict[str, Any]]:
    """Documents with a text and a title; some texts are empty, cut already, or white space."""
    records = []
    for number in range(count):
        text: Any = f"{sentence(number, 5)}. {sentence(number + 1, 4)}!\n\n{sentence(number + 2, 3)}\u00e9 \u4e2d."
        if number % 7 == 3:
            text = ""
        if number % 11 == 5:
            text = [sentence(number, 4), "", sentence(number + 1, 3)]
        records.append({"text": text, "title": sentence(number, 2) if number % 5 else "", "id": number})
    return records


def write(path: Path, records: list[Any]) -> Path:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def build_by_megatron(prefix: Path, tokenizer_path: Path, texts: list[Any], append_eod: bool) -> None:
    """Document by document, through the engine's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load_tokenizer(tokenizer_path)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(tokenizer.vocab_size))
    for text in texts:
        sentences = [tokenizer.encode(part) for part in (text if isinstance(text, list) else [text])]
        sentences = [ids for ids in sentences if ids]
        if append_eod and sentences:
            sentences[-1] = [*sentences[-1], tokenizer.eos_id]
        builder.add_document([index for ids in sentences for index in ids], [len(ids) for ids in sentences])
    builder.finalize(f"{prefix}.idx")


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("append_eod", [False, True])
def test_every_key_is_what_megatron_writes(tmp_path, any_tokenizer, append_eod):
    records = corpus()
    path = write(tmp_path / "in.jsonl", records)
    options = DocumentOptions(tokenizer=str(any_tokenizer), json_keys=("text", "title"), append_eod=append_eod)
    totals = preprocess([path], tmp_path / "out", options, block_bytes=500)
    for key in ("text", "title"):
        texts = [record[key] for record in records]
        build_by_megatron(tmp_path / "expected", any_tokenizer, texts, append_eod)
        prefix = tmp_path / f"out_{key}_document"
        assert files(prefix) == files(tmp_path / "expected")
        assert totals.num_documents[key] == read_meta(prefix).num_records == len(records)
        IndexedRecords(prefix).verify()
    assert totals.num_records == len(records)
    assert describe(totals)[0] == "60 lines, 60 documents read"


def test_megatron_reads_it(tmp_path, tokenizer_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = write(tmp_path / "in.jsonl", corpus())
    preprocess([path], tmp_path / "out", DocumentOptions(tokenizer=str(tokenizer_path), append_eod=True))
    theirs = IndexedDataset(str(tmp_path / "out_text_document"))
    mine = IndexedFile(tmp_path / "out_text_document")
    assert len(theirs) == mine.num_sequences > 50
    for number in range(len(theirs)):
        assert np.array_equal(theirs[number], mine.read(number, number + 1))


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences_are_sequences_and_the_last_has_the_end_of_document(tmp_path, any_tokenizer, keep_newlines):
    pytest.importorskip("nltk")
    records = corpus()
    path = write(tmp_path / "in.jsonl", records)
    options = DocumentOptions(tokenizer=str(any_tokenizer), append_eod=True, keep_newlines=keep_newlines)
    preprocess([path], tmp_path / "out", options, split_sentences=True, block_bytes=500)
    splitter = SentenceSplitter(load_punkt(tmp_path / "out.punkt.json"), keep_newlines=keep_newlines)
    texts = [text if isinstance(text, list) else [text] for text in (record["text"] for record in records)]
    split = [[part for text in document for part in splitter.split(text)] for document in texts]
    assert max(map(len, split)) >= 3
    build_by_megatron(tmp_path / "expected", any_tokenizer, split, True)
    assert files(tmp_path / "out_text_sentence") == files(tmp_path / "expected")


def test_a_model_of_the_same_corpus_is_not_trained_again(tmp_path, tokenizer_path, monkeypatch):
    pytest.importorskip("nltk")
    path = write(tmp_path / "in.jsonl", corpus())
    options = DocumentOptions(tokenizer=str(tokenizer_path))
    preprocess([path], tmp_path / "out", options, split_sentences=True)
    before = (tmp_path / "out.punkt.json").read_bytes()
    trained = []
    train = documents.train_punkt
    monkeypatch.setattr(documents, "train_punkt", lambda *arguments: trained.append(1) or train(*arguments))
    preprocess([path], tmp_path / "out", options, split_sentences=True, overwrite=True)
    assert not trained and (tmp_path / "out.punkt.json").read_bytes() == before
    given = DocumentOptions(tokenizer=str(tokenizer_path), punkt_model=str(tmp_path / "out.punkt.json"))
    preprocess([path], tmp_path / "given", given, split_sentences=True)
    assert not trained and files(tmp_path / "given_text_sentence") == files(tmp_path / "out_text_sentence")
    write(path, corpus(61))
    preprocess([path], tmp_path / "out", options, split_sentences=True, overwrite=True)
    assert trained


def test_training_reads_no_more_than_it_may(tmp_path, monkeypatch):
    path = write(tmp_path / "in.jsonl", ["no JSON", *({"text": "x" * 100} for _ in range(50))])
    monkeypatch.setattr(documents, "PUNKT_TRAINING_BYTES", 1000)
    assert len(list(documents._corpus_texts([path], ["text"], False))) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"title": "x"}', 'no "text" in this document, only title'),
        ("{}", 'no "text" in this document, only an empty object'),
        ('{"text": null}', "must be a string or a list of strings, found NoneType"),
        ('{"text": ["a", 1]}', "must be a string or a list of strings"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "more than 4,300 digits"),
        (b'{"text": "\xff"}', "not UTF-8: byte 10 of the line"),
    ],
)
@pytest.mark.parametrize("partitions", [1, 3])
def test_a_line_that_is_no_document_is_named(tmp_path, tokenizer_path, line, message, partitions):
    good = [json.dumps(record).encode() for record in corpus(30)]
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([*good, line, b"", *good, line]))
    options = DocumentOptions(tokenizer=str(tokenizer_path))
    with pytest.raises(DataError, match=message) as caught:
        preprocess([path], tmp_path / "out", options, block_bytes=300, partitions=partitions)
    assert (caught.value.path, caught.value.line) == (path, 31)
    totals = preprocess([path], tmp_path / "out", options, block_bytes=300, partitions=partitions, on_error="skip")
    listed = [json.loads(entry) for entry in (tmp_path / "out_document.rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [31, 63]
    assert totals.rejected == {"bad_line": 2}
    assert "  rejected, bad_line: 2" in describe(totals)


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, tokenizer_path):
    records = corpus(20)
    options = DocumentOptions(tokenizer=str(tokenizer_path))
    preprocess([write(tmp_path / "plain.jsonl", records)], tmp_path / "plain", options)
    lines = [json.dumps(record).encode() for record in records]
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n \r\n".join(lines))
    totals = preprocess([tmp_path / "odd.jsonl"], tmp_path / "odd", options, block_bytes=100)
    assert files(tmp_path / "odd_text_document") == files(tmp_path / "plain_text_document")
    assert (totals.num_lines, totals.num_records) == (39, 20)


def test_a_large_vocabulary_has_four_bytes_a_token(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(documents, "token_dtype", lambda vocab_size: np.int32)
    path = write(tmp_path / "in.jsonl", corpus(5))
    preprocess([path], tmp_path / "out", DocumentOptions(tokenizer=str(tokenizer_path)))
    assert IndexedFile(tmp_path / "out_text_document").dtype == np.int32


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"json_keys": ("a", "a")}, {}, "must be different"),
        ({"json_keys": ()}, {}, "at least one"),
        ({"keep_newlines": True}, {}, "with split_sentences only"),
        ({"punkt_model": "x"}, {}, "with split_sentences only"),
        ({}, {"lang": "english"}, "with split_sentences only"),
        ({"punkt_model": "x"}, {"lang": "english", "split_sentences": True}, "not both"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, options, arguments, message):
    with pytest.raises(ConfigError, match=message):
        preprocess([], tmp_path / "out", DocumentOptions(tokenizer="none", **options), **arguments)


def test_a_key_without_any_text_is_an_error(tmp_path, tokenizer_path):
    path = write(tmp_path / "in.jsonl", [{"text": "a", "title": ""}])
    options = DocumentOptions(tokenizer=str(tokenizer_path), json_keys=("text", "title"))
    with pytest.raises(DataError, match="all 1 documents are empty for .*out_title_document"):
        preprocess([path], tmp_path / "out", options)
    assert not list(tmp_path.glob("out*"))


def test_the_tokenizer_is_found_by_its_type(tmp_path):
    assert find_tokenizer("x/tokenizer.json") == "x/tokenizer.json"
    assert find_tokenizer(tmp_path, "HuggingFaceTokenizer") == str(tmp_path / "tokenizer.json")
    assert find_tokenizer("a.model", "SentencePieceTokenizer") == "a.model"
    with pytest.raises(ConfigError, match="is not a SentencePieceTokenizer"):
        find_tokenizer("x/tokenizer.json", "SentencePieceTokenizer")
    with pytest.raises(ConfigError, match="none of auto"):
        find_tokenizer("x", "GPT2BPETokenizer")
