"""Documents cut into chunks, by the offsets of their tokens alone: no text is made and no token is moved.

A chunk is up to ``chunk_length`` consecutive tokens of one document (Retro, arXiv 2112.04426, section 2.1); the last
of a document is shorter. A closing end-of-document token is no part of it.

The rows are those of Megatron's Retro tools, with one difference: their fourth column counts the WordPieces of the
chunk's text, which takes a tokeniser and most of their time; here it counts the tokens that hold more than white space.
Both serve to tell empty chunks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from megatron_grit.store.blocks import Arrays

DOCUMENT, START, STOP, VISIBLE = range(4)
"""Columns of a chunk: document, first token and one after the last within it, and tokens that are not blank."""


@dataclass(frozen=True, kw_only=True)
class ChunkRules:
    """How documents are cut and which chunks are left out."""

    chunk_length: int = 64
    """Tokens of a chunk."""
    min_tokens: int = 1
    """Chunks of fewer tokens that hold more than white space are left out."""
    eod_id: int = -1
    """Left out where it ends a document. -1: none is."""
    minhash: int = 0
    """Permutations of the MinHash of each chunk's words, for near duplicates. 0: none is computed."""


def visible_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocab_size]: whether a token holds more than white space; special tokens do not."""
    visible = np.fromiter(
        (bool(tokenizer.decode([index]).strip()) for index in range(tokenizer.vocab_size)), bool, tokenizer.vocab_size
    )
    visible[list(tokenizer.special_tokens.values())] = False
    return visible


def chunk_documents(file: IndexedFile, first: int, last: int, rules: ChunkRules, visible: np.ndarray) -> Arrays:
    """Chunks of documents ``first`` to ``last - 1``.

    Args:
        file: the tokens.
        first: first document.
        last: document after the last.
        rules: how they are cut.
        visible: of :func:`visible_tokens`.

    Returns:
        ``chunks_valid`` and ``chunks_invalid``, uint32 [n, 4], in the order of the text; ``doc_offsets``, uint64
        [documents, 2]: the document's number and how many valid chunks there are up to its end; ``hashes``, uint64
        [valid, 2], of the tokens of each valid chunk; and ``minhashes``, uint32 [valid, rules.minhash], if that is set.

    Raises:
        DataError: a damaged file, an id outside the vocabulary, or a document beyond 2**32 tokens.
    """
    tokens, begins, lengths = _documents(file, first, last, rules.eod_id, len(visible))
    counts = -(-lengths // rules.chunk_length)
    document = np.repeat(np.arange(last - first), counts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * rules.chunk_length
    stop = np.minimum(start + rules.chunk_length, lengths[document])
    seen = np.concatenate(([0], np.cumsum(visible[tokens])))
    begin = begins[document]
    num_visible = seen[begin + stop] - seen[begin + start]
    rows = np.stack([document + first, start, stop, num_visible], axis=1).astype(np.uint32)
    is_valid = num_visible >= max(rules.min_tokens, 1)
    valid = rows[is_valid]
    per_document = np.bincount(document[is_valid], minlength=last - first)
    places = np.stack([begin + start, begin + stop], axis=1)[is_valid]
    arrays = {
        "chunks_valid": valid,
        "chunks_invalid": rows[~is_valid],
        "doc_offsets": np.stack([np.arange(first, last), np.cumsum(per_document)], axis=1).astype(np.uint64),
        "hashes": _hashes(tokens, places),
    }
    if rules.minhash:
        arrays["minhashes"] = minhashes(tokens, places, rules.minhash)
    return arrays


def _documents(
    file: IndexedFile, first: int, last: int, eod_id: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of all documents, where each begins among them, and how many count."""
    sequence, stop = int(file.documents[first]), int(file.documents[last])
    if not 0 <= sequence <= stop <= file.num_sequences or (np.diff(file.documents[first : last + 1]) < 0).any():
        raise DataError(f"documents {first} to {last} are out of order; preprocess it again", path=file.idx_path)
    tokens = file.read(sequence, stop)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise DataError(
            f"documents {first} to {last} hold ids outside the vocabulary of {vocab_size}; give the tokenizer "
            "that they were made with",
            path=file.bin_path,
        )
    ends = np.concatenate(([0], np.cumsum(file.lengths[sequence:stop], dtype=np.int64)))
    edges = ends[file.documents[first : last + 1] - sequence]
    begins, lengths = edges[:-1], np.diff(edges)
    if len(lengths) and int(lengths.max()) > np.iinfo(np.uint32).max:
        raise DataError("a document has more than 2**32 tokens", path=file.bin_path)
    if len(tokens):
        closing = np.where(lengths > 0, tokens[edges[1:] - 1], -2)
        lengths = lengths - (closing == eod_id)
    return tokens, begins, lengths


def document_tokens(file: IndexedFile, document: int, begin: int, count: int, eod_id: int) -> np.ndarray:
    """Tokens of a document from one on, without its closing ``eod_id``; fewer than ``count`` at its end."""
    first, last = file.sequences(document)
    length = int(file.lengths[first:last].sum(dtype=np.int64))
    tokens = file.read(first, last, begin, min(count, length - begin))
    ends = begin + len(tokens) == length and len(tokens) and tokens[-1] == eod_id
    return tokens[:-1] if ends else tokens


def read_windows(
    file: IndexedFile, documents: np.ndarray, starts: np.ndarray, length: int, eod_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`document_tokens` at many places at once.

    Args:
        file: the tokens.
        documents: int [n].
        starts: int [n], first token of each within its document.
        length: tokens from there on.
        eod_id: left out where it ends a document.

    Returns:
        Tokens, [n, length], 0 after a document's end, and how many there are of each, int64 [n].

    Raises:
        IndexError: no such document.
        DataError: a damaged file.
    """
    begins, lengths = file.extents(documents)
    tokens, counts = read_runs(file, begins, lengths, np.asarray(starts, dtype=np.int64), length, eod_id)
    return padded(tokens, counts, length), counts


def read_runs(
    file: IndexedFile, begins: np.ndarray, lengths: np.ndarray, starts: np.ndarray, length: int, eod_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`read_windows`, of documents whose extents are known (first byte and tokens of each, int64 [n]), and one
    run after another: [sum of counts], and the counts, int64 [n]."""
    counts = np.minimum(np.maximum(lengths - starts, 0), length)
    tokens = file.read_runs(begins + starts * file.dtype.itemsize, counts)
    closing = (starts + counts == lengths) & (counts > 0)
    if closing.any():
        last = np.cumsum(counts)[closing] - 1
        is_eod = tokens[last] == eod_id
        tokens = np.delete(tokens, last[is_eod])
        counts[closing] -= is_eod
    return tokens, counts


def padded(tokens: np.ndarray, counts: np.ndarray, length: int, pad_id: int = 0) -> np.ndarray:
    """Runs one after another, [sum of counts], as rows: [n, length], ``pad_id`` behind each."""
    rows = np.full((len(counts), length), pad_id, dtype=tokens.dtype)
    rows[np.arange(length) < counts[:, None]] = tokens
    return rows


def _hashes(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    content = np.ascontiguousarray(tokens)
    view = content.data.cast("B") if content.size else memoryview(b"")
    size = content.dtype.itemsize
    digests = b"".join(
        hashlib.blake2b(view[start * size : stop * size], digest_size=16).digest() for start, stop in places.tolist()
    )
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


def minhashes(tokens: np.ndarray, places: np.ndarray, num_permutations: int) -> np.ndarray:
    """MinHash signatures of the runs of three tokens in each chunk (Broder, 1997), by datasketch.

    Args:
        tokens: of several documents.
        places: int64 [n, 2], first token of each chunk and one after the last.
        num_permutations: length of a signature.

    Returns:
        uint32 [n, num_permutations]; the share of equal entries of two rows estimates their Jaccard similarity.
    """
    from datasketch import MinHash

    content = np.ascontiguousarray(tokens)
    size = content.dtype.itemsize
    bytes_of = content.tobytes()

    def shingles(start: int, stop: int) -> list[bytes]:
        width = min(3, stop - start)
        return [bytes_of[place * size : (place + width) * size] for place in range(start, stop - width + 1)]

    rows = [shingles(start, stop) for start, stop in places.tolist()]
    signatures: list[Any] = MinHash.bulk(rows, num_perm=num_permutations, seed=1) if rows else []
    out = np.empty((len(rows), num_permutations), dtype=np.uint32)
    for number, signature in enumerate(signatures):
        out[number] = signature.hashvalues
    return out
