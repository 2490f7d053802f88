"""Documents cut into chunks, against a plain loop over documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.chunks.chunking import ChunkRules, chunk_documents, minhashes, visible_tokens
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.errors import DataError
from tests.unit.retrieval.databases import tokenizer_of

EOD, VOCAB = 9, 10
VISIBLE = np.array([False, False, *[True] * 7, False])


def write(prefix: Path, documents: list[list[list[int]]]) -> IndexedFile:
    """Documents of one sequence or two."""
    roles = {1: [Role.TEXT], 2: [Role.USER, Role.ANSWER]}
    with IndexedWriter(prefix, RowKind.GENERATIVE, VOCAB, overwrite=True) as writer:
        for sequences in documents:
            writer.add(list(zip(roles[len(sequences)], sequences, strict=True)))
        writer.finalize(tokenizer_fingerprint="none", template="none", limits={})
    return IndexedFile(prefix)


def plainly(documents: list[list[list[int]]], length: int, min_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Valid and invalid rows by the definition."""
    valid, invalid = [], []
    for number, sequences in enumerate(documents):
        tokens = [token for sequence in sequences for token in sequence]
        if tokens and tokens[-1] == EOD:
            tokens = tokens[:-1]
        for start in range(0, len(tokens), length):
            chunk = tokens[start : start + length]
            seen = sum(bool(VISIBLE[token]) for token in chunk)
            rows = valid if seen >= max(min_tokens, 1) else invalid
            rows.append([number, start, start + len(chunk), seen])
    return valid, invalid


sequences = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
corpora = st.lists(st.lists(sequences, min_size=1, max_size=2), min_size=1, max_size=6)


@given(documents=corpora, length=st.integers(1, 7), min_tokens=st.integers(0, 4), split=st.integers(0, 6))
def test_rows_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, documents: list, length: int, min_tokens: int, split: int
) -> None:
    file = write(tmp_path_factory.mktemp("corpus") / "a", documents)
    rules = ChunkRules(chunk_length=length, min_tokens=min_tokens, eod_id=EOD)
    split = min(split, len(documents))
    # In one block and in two.
    parts = [chunk_documents(file, *ends, rules, VISIBLE) for ends in ((0, split), (split, len(documents)))]
    whole = chunk_documents(file, 0, len(documents), rules, VISIBLE)
    valid, invalid = plainly(documents, length, min_tokens)
    assert whole["chunks_valid"].tolist() == valid
    assert whole["chunks_invalid"].tolist() == invalid
    assert whole["chunks_valid"].dtype == np.uint32
    for name in ("chunks_valid", "chunks_invalid", "hashes"):
        assert np.concatenate([part[name] for part in parts]).tolist() == whole[name].tolist()
    ends = [sum(row[0] <= number for row in valid) for number in range(len(documents))]
    assert whole["doc_offsets"].tolist() == [[number, end] for number, end in enumerate(ends)]


def test_equal_chunks_have_equal_hashes(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [[[2, 3, 4, 5, 2, 3]], [[2, 3, 4, EOD]], [[4, 3, 2]]])
    hashes = chunk_documents(file, 0, 3, ChunkRules(chunk_length=3, eod_id=EOD), VISIBLE)["hashes"]
    assert hashes[0].tolist() == hashes[2].tolist()
    assert len({tuple(row) for row in hashes.tolist()}) == 3


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [[[2, 3]], [[9]]])
    with pytest.raises(DataError, match="outside the vocabulary of 5; give the tokenizer"):
        chunk_documents(file, 0, 2, ChunkRules(), np.ones(5, dtype=bool))


def test_minhash_estimates_how_much_is_shared() -> None:
    random = np.random.default_rng(0)
    first = random.integers(0, 1000, 200).astype(np.int32)
    second = first.copy()
    second[100:110] = 1001
    other = random.integers(2000, 3000, 200).astype(np.int32)
    tokens = np.concatenate([first, second, other])
    signatures = minhashes(tokens, np.array([[0, 200], [200, 400], [400, 600]]), 256)
    runs = [{tuple(part[i : i + 3].tolist()) for i in range(198)} for part in (first, second)]
    jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert (signatures[0] == signatures[1]).mean() == pytest.approx(jaccard, abs=0.1)
    assert (signatures[0] == signatures[2]).mean() < 0.05


def test_tokens_of_white_space_are_not_visible(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    visible = visible_tokens(tokenizer)
    assert not visible[tokenizer.eos_id]
    assert visible[tokenizer.encode("parser")].any()
    blank = [number for number in range(tokenizer.vocab_size) if not tokenizer.decode([number]).strip()]
    assert not visible[blank].any()
