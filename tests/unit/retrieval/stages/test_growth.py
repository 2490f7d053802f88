"""What a database that grows and shrinks costs: what is new is searched, and the neighbors are those of a search for
everything."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.chunks.chunk_db import read_places, sources_of
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.database.versions import open_index
from megatron_grit.retrieval.dedup.keys import KeyedChunks
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.compact import join_additions
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.restore import restore_index
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    validate,
    write_documents,
)

TEXTS = make_texts(70, seed=3, longest=5)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts query x vector comparisons of all searches, as an exact index makes them."""
    counts: Counter[str] = Counter()
    search = VectorIndex.search

    def counting(self: VectorIndex, vectors_ND: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
        counts["pairs"] += len(vectors_ND) * len(self)
        return search(self, vectors_ND, *options)

    monkeypatch.setattr(VectorIndex, "search", counting)
    return counts


def newest_table(project: Project) -> NeighborTable:
    (folder,) = tables_of(project).values()
    return NeighborTable(folder)


def test_after_twenty_changes_the_table_is_the_one_built_at_once(tmp_path: Path, compared: Counter[str]) -> None:
    """Ids, scores and sources, with chunks that stand there several times. What is searched after an addition: the new
    chunks by all places, all chunks by the new places and by those that had too few neighbors; after a removal, all
    chunks by the places that lost one."""
    tokenizer, random = tokenizer_of(tmp_path), np.random.default_rng(0)
    prefix = write_documents(tmp_path / "corpus", TEXTS[:20], tokenizer)
    settings = {"index": "Flat", "duplicates": "keep"}
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    embed_chunks(open_vectors(project, Worker(), WordEmbedder()), Worker())
    query_neighbors(project, Worker(), WordEmbedder())
    count, removed, least = 20, set[int](), 0
    for change in range(20):
        before, table = read_version(project.folder), newest_table(project)
        old = NeighborTable(table.folder).neighbors
        embedder = WordEmbedder()
        if change % 3 == 2:
            document = int(random.integers(count))
            removed.add(document)
            remove_documents(project, Worker(), f"corpus:{document}")
        else:
            count += int(random.integers(1, 6))
            write_documents(Path(prefix), TEXTS[:count], tokenizer)
            add_documents(another(project), Worker(), embedder)
        project = another(project)
        version = read_version(project.folder)
        if version.number == before.number:
            continue
        db = VersionedDb(project, version)
        num_new = version.num_chunks - before.num_chunks
        assert embedder.num_embedded == num_new
        compared.clear()
        query_neighbors(project, Worker(), embedder)
        assert embedder.num_embedded == num_new, "chunks were embedded twice"
        table = newest_table(project)
        gone = sources_of(db.rows, old)[..., 1] == document if change % 3 == 2 else old < 0
        again = (gone & ((old >= 0) | (change % 3 != 2))).any(axis=1).sum()
        whole = again + len(table.neighbors) - len(old)
        expected = whole * version.num_chunks + (len(old) - again) * num_new
        # Where filters leave too few, a query is searched once more, for more candidates.
        assert expected <= compared["pairs"] < 1.5 * expected + 1
        least += whole
    assert least < 0.5 * len(table.neighbors) * 20
    assert read_version(project.folder).number == 21

    whole_project = make_project(tmp_path / "whole", [prefix], tmp_path, **settings)
    build(whole_project, WordEmbedder(), query=False)
    remove_documents(whole_project, Worker(), ",".join(f"corpus:{document}" for document in sorted(removed)))
    query_neighbors(another(whole_project), Worker(), WordEmbedder())
    grown, at_once = newest_table(project), newest_table(whole_project)
    ties = (np.diff(at_once.scores, axis=1) == 0) & (at_once.neighbors[:, 1:] >= 0)
    assert at_once.manifest.num_taken_over == 0 and ties.any(axis=1).mean() > 0.05, "nothing is equally near"
    for name in ("neighbors", "scores", "sources"):
        assert np.array_equal(getattr(grown, name), getattr(at_once, name)), name
    assert validate("query-neighbors", another(project), Worker(), WordEmbedder(), 1.0) > 0
    ids = np.asarray(grown.neighbors[:, :2])
    tokens, mask = read_places(project, grown.sources[:, :2], ids >= 0, 16)
    wanted, wanted_mask = VersionedDb(project, read_version(project.folder)).read_tokens(ids, 16)
    assert (tokens == wanted).all() and (mask == wanted_mask).all() and mask.any()


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "IVF4,PQ4x4", "PQ4x4", "HNSW8"])
def test_joined_files_find_what_they_found(tmp_path: Path, compared: Counter[str], index: str) -> None:
    """Scores and ids of searches, and tables: nothing is searched again. What is added afterwards is searched alone."""
    tokenizer, nprobe = tokenizer_of(tmp_path), 4 if "IVF" in index else None
    prefix = write_documents(tmp_path / "corpus", TEXTS[:30], tokenizer)
    project = make_project(tmp_path / "db", [prefix], tmp_path, index=index, nprobe=nprobe, num_neighbors_query=10)
    build(project, WordEmbedder())
    for count in (36, 41, 45):
        write_documents(Path(prefix), TEXTS[:count], tokenizer)
        add_documents(another(project), Worker(), WordEmbedder())
        if count == 41:
            query_neighbors(another(project), Worker(), WordEmbedder())
    grown = another(project)
    before, queries = read_version(project.folder), WordEmbedder().embed(TEXTS[:9])
    found = open_index(grown, before).search(queries, 10)
    join_additions(grown, Worker())
    after = read_version(project.folder)
    assert (after.number, after.num_chunks, len(after.segments)) == (5, before.num_chunks, 4)
    assert [len(segment.index) for segment in after.segments] == [1, 1, 0, 0]
    joined = open_index(grown, after)
    assert len(joined.shards) == 2 and len(joined) == before.num_chunks
    again = joined.search(queries, 10)
    if index != "HNSW8":  # another graph, of which other vectors may be found
        assert all(np.array_equal(*pair) for pair in zip(found, again, strict=True))
    join_additions(grown, Worker())
    assert read_version(project.folder).number == 5, "one file was joined with nothing"

    # The table of version 3, in the middle of the joined file, is gone on from.
    compared.clear()
    query_neighbors(another(project), Worker(), WordEmbedder())
    manifest, num_new = newest_table(project).manifest, before.segments[-1].num_chunks
    whole = manifest.num_places - manifest.num_taken_over
    expected = whole * after.num_chunks + manifest.num_taken_over * num_new
    assert 0 < expected <= compared["pairs"] < 1.5 * expected and whole < 0.4 * manifest.num_places
    remove_documents(grown, Worker(), "corpus:2")
    write_documents(Path(prefix), TEXTS[:50], tokenizer)
    add_documents(another(project), Worker(), WordEmbedder())
    last = read_version(project.folder)
    assert [segment.num_covered for segment in last.segments] == [1, 3, 0, 0, 1]
    assert len(open_index(another(project), last)) == last.num_chunks
    assert len(open_index(another(project), last, first_segment=4)) == last.segments[4].num_chunks
    assert len(open_index(another(project), last, first_segment=2)) == sum(s.num_chunks for s in last.segments[2:])
    validate("compact", another(project), Worker(), None, 1.0)
    path = project.folder / after.segments[1].index[0].path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(DataError, match="was changed since"):
        validate("compact", another(project), Worker(), None, 1.0)
    # It is joined again, of a file that is made again as well; a file that no one needs stays away.
    (project.folder / before.segments[2].index[0].path).unlink()
    unneeded = project.folder / before.segments[1].index[0].path
    restore_index(another(project), Worker(), WordEmbedder())
    assert path.read_bytes() == content
    validate("compact", another(project), Worker(), None, 1.0)
    unneeded.unlink()
    restore_index(another(project), Worker(), WordEmbedder())
    assert not unneeded.exists()


@pytest.mark.parametrize("duplicates", ["exact", "near"])
def test_keys_of_what_is_there_are_looked_up(tmp_path: Path, duplicates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks are those of a database that is built at once, and no block of earlier ones is read whole: counted,
    with a database whose keys are lost as a control."""
    if duplicates == "near":
        pytest.importorskip("datasketch")
    made: list[Path] = []
    make_run = KeyedChunks._make_run

    def making(self: KeyedChunks, block: Any) -> Any:
        made.extend(each.path for each in self.blocks[slice(*self._groups[block.start])])
        return make_run(self, block)

    monkeypatch.setattr(KeyedChunks, "_make_run", making)
    tokenizer, settings = tokenizer_of(tmp_path), {"duplicates": duplicates, "near_threshold": 0.6}
    texts = [text + TEXTS[number // 2] for number, text in enumerate(TEXTS[:40])]
    prefix = write_documents(tmp_path / "corpus", texts[:16], tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    for count, is_kept in ((20, True), (29, True), (35, True), (40, False)):
        there = set(project.folder.rglob("individual/*/*.hdf5"))
        assert len(there) > 2
        if not is_kept:
            for folder in list(project.folder.rglob("keys")):
                shutil.rmtree(folder)
        write_documents(Path(prefix), texts[:count], tokenizer)
        made.clear()
        add_documents(another(project), Worker(), WordEmbedder())
        new = set(project.folder.rglob("individual/*/*.hdf5")) - there
        assert set(made) == (new if is_kept else new | there) and len(made) == len(set(made))
    whole = build(make_project(tmp_path / "whole", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    grown, at_once = (VersionedDb(each, read_version(each.folder)).rows for each in (another(project), whole))
    assert np.array_equal(grown[np.arange(len(grown))], at_once[np.arange(len(at_once))])
    left_out = json.loads((whole.folder / "db" / "report.json").read_text())["datasets"][0]
    assert left_out["exact_duplicates"] > 20 and (duplicates == "exact" or left_out["near_duplicates"] > 20)


def test_an_addition_is_rounded_as_a_first_build_is(tmp_path: Path) -> None:
    """Vectors that are kept in 16 bits are compared as such, whether they came first or later."""
    tokenizer, settings = tokenizer_of(tmp_path), {"embedding_dtype": "float16", "duplicates": "keep"}
    prefix = write_documents(tmp_path / "corpus", TEXTS[:10], tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    write_documents(Path(prefix), TEXTS[:20], tokenizer)
    add_documents(another(project), Worker(), WordEmbedder())
    whole = build(make_project(tmp_path / "whole", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    queries = WordEmbedder().embed(TEXTS[:9])
    found = [open_index(another(each), read_version(each.folder)).search(queries, 10) for each in (project, whole)]
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_a_table_without_scores_is_searched_wholly_once(tmp_path: Path) -> None:
    """As older versions wrote them: it is read still, and the next addition searches everything."""
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", TEXTS[:12], tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    table = newest_table(project)
    manifest = json.loads((table.folder / "table.json").read_text())
    for name in ("scores", "sources"):
        (table.folder / f"{name}.npy").unlink()
        del manifest[f"{name}_sha256"]
    manifest.pop("checksum")
    (table.folder / "table.json").write_text(json.dumps(manifest))
    rows = VersionedDb(project, read_version(project.folder)).rows
    assert (NeighborTable(table.folder, rows).read([(0, 0)], [], 3) == table.neighbors[:1, :3]).all()
    for texts, taken in ((14, False), (16, True)):
        write_documents(Path(prefix), TEXTS[:texts], tokenizer)
        add_documents(another(project), Worker(), WordEmbedder())
        query_neighbors(another(project), Worker(), WordEmbedder())
        assert (newest_table(project).manifest.num_taken_over > 0) == taken
