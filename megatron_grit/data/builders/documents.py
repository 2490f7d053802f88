"""JSONL documents to Megatron's indexed files: what preprocess_data.py does.

A document is a string under a key of a JSON object; every key gets an indexed file of its own. Tokens are those of
each document, or sentence, tokenised alone. A document without a token is kept, as in Megatron: it has no sequence and
no end-of-document token, so that document k of every key is that of line k.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_grit.data.builders.block_build import BuildRun, BuildSpec, BuildTotals, OutputSpec, build_blocks
from megatron_grit.data.builders.block_encoder import EncodedBlock, Rejection
from megatron_grit.data.builders.sentences import SentenceSplitter, find_language, load_punkt, train_punkt
from megatron_grit.data.indexed.reader import DOCUMENTS, describe_skipped, token_dtype
from megatron_grit.data.indexed.writer import IndexedFacts, TokenBlock
from megatron_grit.data.text.line_blocks import LineBlock, find_inputs
from megatron_grit.data.text.lines import filled_lines, parse_json
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.files import check_prefix, replacing
from megatron_grit.store.hub import local_folder
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

LOG = get_logger(__name__)

PUNKT_TRAINING_BYTES = 8 << 20
"""Of text at the begin of the corpus, for the sentence splitter. NLTK trains on about 0.3 MB/s."""
BAD_LINE = "bad_line"
"""Reason of a line that is not a document."""

TOKENIZER_FILES = {"SentencePieceTokenizer": "tokenizer.model", "HuggingFaceTokenizer": "tokenizer.json"}
"""By Megatron's names of the types."""

_VERSION = 2  # of the way from text to tokens: a journal of another version is not continued


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """How documents are tokenised. Sent to the workers."""

    tokenizer: str
    """See :func:`~megatron_grit.data.text.tokenizer.load_tokenizer`."""
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """Append the end-of-sequence token to each document."""
    punkt_model: str | None = None
    """Split documents into sentences, each a sequence of its own, with these Punkt parameters."""
    keep_newlines: bool = False
    """White space after a sentence stays with it."""


class DocumentEncoder:
    """Turns lines of JSON into documents; one in each worker."""

    def __init__(self, options: DocumentOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._splitter = None
        if options.punkt_model is not None:
            self._splitter = SentenceSplitter(load_punkt(options.punkt_model), keep_newlines=options.keep_newlines)

    def encode(self, block: LineBlock) -> EncodedBlock:
        """Documents of a block, by key; those without a token have no sequence."""
        keys = self._options.json_keys
        texts: dict[str, list[list[str]]] = {key: [] for key in keys}
        rejections = []
        num_records = 0
        lines = block.lines()
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            num_records += 1
            try:
                found = parse_document(line, keys)
            except DataError as error:
                rejections.append(Rejection(number, BAD_LINE, str(error)))
                continue
            for key, document in zip(keys, found, strict=True):
                texts[key].append(document)
        return EncodedBlock(
            outputs={key: self._encode_documents(texts[key]) for key in keys},
            num_lines=len(lines),
            num_records=num_records,
            rejections=rejections,
        )

    def _encode_documents(self, documents: list[list[str]]) -> TokenBlock:
        if self._splitter is not None:
            split = self._splitter.split
            documents = [[part for text in document for part in split(text)] for document in documents]
        ids, lengths = self._tokenizer.encode_batch_arrays([text for document in documents for text in document])
        counts = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        owners = np.repeat(np.arange(len(documents)), counts)
        counts = np.bincount(owners[lengths > 0], minlength=len(documents))
        lengths = lengths[lengths > 0]
        if self._options.append_eod:
            last = np.cumsum(counts)[counts > 0] - 1  # sequence of each document that has one
            ids = np.insert(ids, np.cumsum(lengths)[last], self._tokenizer.eos_id)
            lengths[last] += 1
        return TokenBlock(
            tokens=ids.astype(self._dtype),
            lengths=lengths.astype(np.int32),
            documents=counts.astype(np.int32),
        )


def parse_document(line: bytes, keys: Sequence[str]) -> list[list[str]]:
    """The texts under each key. A list of strings is a document that is split already.

    Raises:
        DataError: no JSON object, a key that is missing, or something else than text under it. It names no place.
    """
    value = parse_json(line)
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {type(value).__name__}")
    return [_texts_of(value, key) for key in keys]


def _texts_of(value: dict[str, Any], key: str) -> list[str]:
    if key not in value:
        raise DataError(f'no "{key}" in this document, only {", ".join(sorted(value)) or "an empty object"}')
    found = value[key]
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'"{key}" must be a string or a list of strings, found {type(found).__name__}')
    return texts


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    options: DocumentOptions,
    *,
    split_sentences: bool = False,
    lang: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    **run: Any,
) -> BuildTotals:
    """Write ``<output_prefix>_<key>_document.bin``, ``.idx`` and ``.json`` of every key; ``_sentence`` where documents
    are split into sentences.

    Args:
        inputs: JSONL files and glob patterns, plain, ``.gz`` or ``.zst``.
        output_prefix: path without extension.
        options: how documents are tokenised.
        split_sentences: split documents into sentences, with ``options.punkt_model`` if there is one, with NLTK's
            parameters of ``lang`` if that is given, else with parameters that are trained on the first
            PUNKT_TRAINING_BYTES of text and kept in ``<output_prefix>.punkt.json``.
        lang: language of NLTK's parameters.
        on_error: what to do with a line that is not a document.
        run: fields of :class:`~megatron_grit.data.builders.block_build.BuildRun`: workers, partitions, overwrite ...

    Returns:
        Counts, and the metadata of each key's file.

    Raises:
        DataError: see :func:`~megatron_grit.data.builders.block_build.build_blocks`.
        ConfigError: options that exclude each other, or a package that is missing.
    """
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise ConfigError(f"the JSON keys must be different and at least one: {', '.join(options.json_keys)}")
    if not split_sentences and (options.punkt_model or lang or options.keep_newlines):
        raise ConfigError("a Punkt model, a language and keep_newlines have a meaning with split_sentences only")
    if lang and options.punkt_model:
        raise ConfigError("give a Punkt model or a language, not both")
    check_prefix(output_prefix)
    how = BuildRun(**{"description": "preprocess_data"} | run)
    tokenizer = load_tokenizer(options.tokenizer)
    options = replace(options, tokenizer=str(tokenizer.path))  # what a name on the hub means is asked once
    level = "sentence" if split_sentences else "document"
    prefixes = {key: Path(f"{os.fspath(output_prefix)}_{key}_{level}") for key in options.json_keys}
    if split_sentences and options.punkt_model is None:
        model = (
            find_language(lang) if lang else _train_on_corpus(inputs, output_prefix, options.json_keys, how.progress)
        )
        options = replace(options, punkt_model=str(model))
    facts = IndexedFacts(kind=DOCUMENTS, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
    dtype = token_dtype(tokenizer.vocab_size)
    signature = {
        "tokenizer": tokenizer.fingerprint,
        "options": [_VERSION, level, options.append_eod, options.keep_newlines, *options.json_keys],
        "punkt_model": _digest(options.punkt_model),
    }
    spec = BuildSpec(
        outputs={key: OutputSpec(prefix=prefixes[key], dtype=dtype, with_modes=False, facts=facts) for key in prefixes},
        factory=partial(DocumentEncoder, options),
        signature=signature,
        work_prefix=Path(f"{os.fspath(output_prefix)}_{level}"),
        stop_on={BAD_LINE} if on_error == "stop" else set(),
        reads=[path for path in (tokenizer.path, options.punkt_model) if path is not None],
    )
    return build_blocks(inputs, spec, how)


def find_tokenizer(path: str | os.PathLike[str], kind: str = "auto") -> str:
    """The tokenizer file that a path stands for.

    Args:
        path: a file, a folder with ``tokenizer.model`` or ``tokenizer.json``, or a name on the Hugging Face hub.
        kind: "SentencePieceTokenizer", "HuggingFaceTokenizer", or "auto": whichever it is.

    Raises:
        ConfigError: another kind of tokenizer, or an unknown one.
    """
    if kind == "auto":
        return os.fspath(path)
    if kind not in TOKENIZER_FILES:
        raise ConfigError(f"tokenizer type {kind} is none of auto, {', '.join(TOKENIZER_FILES)}")
    name = TOKENIZER_FILES[kind]
    found = local_folder(os.fspath(path), weights=False)
    found = found / name if found.is_dir() else found
    if found.suffix != Path(name).suffix:
        raise ConfigError(f"{path} is not a {kind}: give a {name} or its folder, or another --tokenizer-type")
    return str(found)


def describe(totals: BuildTotals) -> list[str]:
    """What :func:`preprocess` did, as text."""
    lines = [f"{totals.num_lines} lines, {totals.num_records} documents read"]
    lines += [f"  rejected, {reason}: {count}" for reason, count in sorted(totals.rejected.items())]
    for key, count in totals.num_documents.items():
        meta = totals.metas.get(key)
        lines.append(
            f"  {key}: {count} documents"
            + (f"{describe_skipped(meta.num_skipped)}, {meta.num_tokens} tokens" if meta else " in this partition")
        )
    return lines


def _train_on_corpus(
    inputs: Sequence[str | os.PathLike[str]], output_prefix: str | os.PathLike[str], keys: Sequence[str], progress: bool
) -> Path:
    """Train Punkt on the first part of the corpus, unless there is a model of the same text."""
    path = Path(f"{os.fspath(output_prefix)}.punkt.json")
    files = find_inputs(inputs)
    trained_on = {
        "inputs": [[os.fspath(file.path), file.size, file.mtime_ns] for file in files],
        "json_keys": list(keys),
        "max_bytes": PUNKT_TRAINING_BYTES,
    }
    if path.exists() and load_punkt(path).trained_on == trained_on:
        return path
    LOG.info("training the sentence splitter on up to %.0f MB of text: %s", PUNKT_TRAINING_BYTES / 1e6, path)
    model = train_punkt(_corpus_texts(inputs, keys, progress), trained_on)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(model.to_json())
    return path


def _corpus_texts(inputs: Sequence[str | os.PathLike[str]], keys: Sequence[str], progress: bool) -> Iterator[str]:
    """The first texts of the corpus. Lines that are no documents are skipped; the build reports them."""
    room = PUNKT_TRAINING_BYTES
    with Progress(room, "training the sentence splitter", "B", enabled=progress) as bar:
        for line in (line for given in inputs for line in filled_lines(given)):
            try:
                documents = parse_document(line.content, keys)
            except DataError:
                continue
            for text in (text for document in documents for text in document):
                if room <= 0:
                    return
                yield text
                room -= len(text.encode())
                bar.update(len(text.encode()))


def _digest(model: str | None) -> str | None:
    """Digest of a Punkt model, for the build's signature."""
    if model is None:
        return None
    return hashlib.sha256(load_punkt(model).to_json().encode()).hexdigest()
