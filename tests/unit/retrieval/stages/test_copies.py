"""Neighbors that repeat what they are neighbors for are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.index import overlap
from megatron_grit.retrieval.index.overlap import Outline, shared_at_most, shared_runs
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.sealed import read_sealed, write_sealed
from tests.unit.retrieval.databases import (
    CHUNK,
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)


def open_table(project: Project) -> tuple[VersionedDb, NeighborTable]:
    (folder,) = tables_of(project).values()
    return VersionedDb(project, read_version(project.folder)), NeighborTable(folder)


def test_overlapping_neighbors_are_left_out(tmp_path: Path) -> None:
    """A document stands twice, the second time with another beginning, so that chunks are cut elsewhere."""
    tokenizer = tokenizer_of(tmp_path)
    texts = make_texts(8, seed=4)
    texts += ["The socket is new. " + texts[0], "The queue is old. " + texts[1]]
    prefix = write_documents(tmp_path / "corpus", texts, tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    strict = another(project, max_overlap=0.25)
    query_neighbors(strict, Worker(), WordEmbedder())
    db = VersionedDb(strict, read_version(project.folder))
    worst = []
    for folder in sorted(project.folder.glob("query/*"), key=lambda path: path.stat().st_mtime_ns):
        table = NeighborTable(folder)
        shares = []
        for document in range(len(texts)):
            tokens = db.project.file(0).read(*db.project.file(0).sequences(document))[:-1].tolist()
            for number in range(int(table.starts[document + 1] - table.starts[document])):
                own = tokens[CHUNK * number : CHUNK * (number + 2)]
                for neighbor in table.neighbors[table.starts[document] + number].tolist():
                    theirs = db.tokens(neighbor, num_tokens=2 * CHUNK).tolist() if neighbor >= 0 else []
                    shares.append(plain_share(theirs, own))
        worst.append(max(shares))
    assert worst[0] > 0.5 and worst[1] <= 0.25


def plain_share(text: list[int], other: list[int]) -> float:
    """By comparing every run with every run."""
    width = min(8, len(text))
    runs = {tuple(text[i : i + width]) for i in range(len(text) - width + 1)} if text else set()
    theirs = {tuple(other[i : i + width]) for i in range(len(other) - width + 1)}
    return len(runs & theirs) / len(runs) if runs else 0.0


TOKENS = st.lists(st.integers(0, 2), max_size=30)


@settings(deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5))
def test_shared_runs(pairs: list[tuple[list[int], list[int]]]) -> None:
    """Beside every run compared with every run; texts of any length in one array."""

    def arrays(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((len(texts), 30), np.uint16)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        return tokens, np.array([len(text) for text in texts])

    texts, others = (arrays(list(side)) for side in zip(*pairs, strict=True))
    wanted = [plain_share(*pair) for pair in pairs]
    assert np.allclose(shared_runs(*texts, *others), wanted)
    assert (shared_at_most(Outline.of(*texts), Outline.of(*others)) >= np.array(wanted) - 1e-9).all()


def test_short_rows_are_searched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A passage has more copies than are searched, so its search ends before there is a neighbor; and so does one after
    an addition, although what came is none. Copies that earlier searches left out are counted still."""
    tokenizer, num_copies = tokenizer_of(tmp_path), []
    passage = tokenizer.decode(tokenizer.encode(" ".join(make_texts(3, seed=6)))[:16])
    texts = [passage] * 40 + make_texts(12, seed=8)
    settings = {"chunk_length": 16, "max_overlap": 0.25, "duplicates": "keep"}
    settings |= {"num_neighbors_query": 2, "num_neighbors_save": 2}
    prefix = write_documents(tmp_path / "corpus", texts[:43], tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder())
    num_copies.append(open_table(project)[1].manifest.num_copies)
    write_documents(tmp_path / "corpus", texts, tokenizer)
    add_documents(another(project), Worker(), WordEmbedder())
    with caplog.at_level("INFO"):
        query_neighbors(another(project), Worker(), WordEmbedder())
    table = open_table(another(project))[1]
    num_copies.append(table.manifest.num_copies)
    remove_documents(another(project), Worker(), "corpus:50")
    query_neighbors(another(project), Worker(), WordEmbedder())
    num_copies.append(open_table(another(project))[1].manifest.num_copies)
    whole = build(make_project(tmp_path / "whole", [prefix], tmp_path, **settings), WordEmbedder())
    at_once = open_table(whole)[1]
    assert (at_once.neighbors[:40, 0] == -1).all() and at_once.manifest.num_none == 40
    assert 0 < table.manifest.num_taken_over < 43
    for name in ("neighbors", "scores"):
        assert np.array_equal(getattr(table, name), getattr(at_once, name)), name
    assert num_copies[0] >= 40 * 31 and num_copies[1] >= num_copies[0] and num_copies[2] >= num_copies[1]
    assert f"{num_copies[1]:,} copies were left out" in caplog.text
    # Tables of an earlier release do not say how many: neither does what goes on from one.
    for path in project.folder.glob("query/*/table.json"):
        write_sealed(path, {name: value for name, value in read_sealed(path).items() if name != "num_copies"})
    remove_documents(another(project), Worker(), "corpus:51")
    query_neighbors(another(project), Worker(), WordEmbedder())
    last = open_table(another(project))[1].manifest
    assert last.num_taken_over > 0 and last.num_copies is None


@pytest.mark.parametrize("most_kept", [1 << 18, 0])
def test_copies_are_left_out_and_counted(
    tmp_path: Path, most_kept: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A passage stands in 40 documents, cut elsewhere in each, so that a copy is nearest and holds what
    is to be predicted. Beside numpy and every run compared with every run."""
    monkeypatch.setattr(overlap, "_MOST_KEPT", most_kept)
    tokenizer = tokenizer_of(tmp_path)
    passage = tokenizer.decode(tokenizer.encode(" ".join(make_texts(3, seed=6)))[:48])
    begin = make_texts(1, seed=7, longest=9)[0]
    texts = [passage, *(begin[: 3 * number] + passage for number in range(40)), *make_texts(30, seed=8)]
    prefix = write_documents(tmp_path / "corpus", texts, tokenizer)
    asked = write_documents(tmp_path / "asked", texts[:1], tokenizer)
    settings = {"chunk_length": 16, "max_overlap": RetroDbConfig.max_overlap, "query_paths": [asked]}
    project = make_project(tmp_path / "db", [prefix], tmp_path, duplicates="keep", num_neighbors_query=200, **settings)
    with caplog.at_level("INFO"):
        build(project, WordEmbedder())
    db, table = open_table(project)
    tokens = project.file(0).read(*project.file(0).sequences(0))[:-1].tolist()
    vectors, num_copies = WordEmbedder().embed(db.texts(range(len(db)))), 0
    for place, found in enumerate(table.neighbors.tolist()):
        own = tokens[16 * place : 16 * place + 32]
        distances = ((vectors - WordEmbedder().embed([tokenizer.decode(own[:16])])) ** 2).sum(1)
        ranked = [chunk for chunk in np.argsort(distances).tolist() if db.rows[chunk, 1] != 0]
        is_copy = [plain_share(db.tokens(chunk, num_tokens=32).tolist(), own) > 0.25 for chunk in ranked]
        left = [chunk for chunk, copy in zip(ranked, is_copy, strict=True) if not copy][:5]
        assert np.allclose(distances[found], distances[left], atol=1e-4) and set(found) <= set(ranked)
        num_copies += sum(is_copy[: ranked.index(left[-1])])
    assert table.manifest.num_copies == num_copies > 40
    assert f"{num_copies} copies were left out" in caplog.text
    everything = another(project, max_overlap=None)
    query_neighbors(everything, Worker(), WordEmbedder())
    nearest = open_table(everything)[1].neighbors[:, 0]
    assert all(plain_share(db.tokens(int(chunk), num_tokens=32).tolist(), tokens) > 0.5 for chunk in nearest)
