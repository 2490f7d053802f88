"""Neighbors: whose they may be, what is computed once, and what an earlier table gives."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_grit.config.database.schema import save_project_config
from megatron_grit.data.chunks.neighbor_table import NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.queried import QueriedFile, tables_of
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.database.versions import open_index, version_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.recall_queries import RecallQueries
from megatron_grit.retrieval.index.search import ShardedIndex, find_allowed
from megatron_grit.retrieval.stages.inspect import inspect_database, report_lines
from megatron_grit.retrieval.stages.query_neighbors import Searcher, query_neighbors
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    CHUNK,
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    validate,
    write_documents,
)
from tests.unit.retrieval.workers import run_together


def open_table(project: Project) -> tuple[VersionedDb, NeighborTable]:
    db = VersionedDb(project, read_version(project.folder, project.config.version))
    (folder,) = tables_of(project).values()
    return db, NeighborTable(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Ten documents."""
    folder = tmp_path_factory.mktemp("small")
    prefix = write_documents(folder / "corpus", make_texts(10), tokenizer_of(folder))
    return build(make_project(folder / "db", [prefix], folder), WordEmbedder())


def test_neighbors_are_the_exact_ones_of_other_documents(small: Project) -> None:
    """Against numpy, over all chunks of all documents."""
    db, table = open_table(small)
    embedder = WordEmbedder()
    vectors = embedder.embed(db.texts(range(len(db))))
    file = small.file(0)
    assert table.manifest.num_places == table.starts[-1] > 40
    for document in range(10):
        length = int(file.lengths[document]) - 1
        tokens = file.read(*file.sequences(document))[:length]
        assert table.starts[document + 1] - table.starts[document] == -(-length // CHUNK)
        for offset in range(0, length, CHUNK):
            query = embedder.embed([small.tokenizer.decode(tokens[offset : offset + CHUNK].tolist())])
            distances = ((vectors - query) ** 2).sum(1)
            distances[db.rows[:, 1] == document] = np.inf
            found = table.read([(document, offset)], [], 5)[0]
            assert np.allclose(distances[found], np.sort(distances)[:5], atol=1e-4)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_never_a_neighbor_from_a_document_of_the_sample(small: Project, data: st.DataObject) -> None:
    db, table = open_table(small)
    documents = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9, unique=True))
    chunks = []
    for document in documents:
        count = int(table.starts[document + 1] - table.starts[document])
        chunks += [(document, CHUNK * data.draw(st.integers(0, count - 1)))]
    k = data.draw(st.integers(1, 5))
    ids = table.read(chunks, [(0, document) for document in documents], k)
    assert ids.shape == (len(chunks), k) and ids.dtype == np.int64
    for row, chunk in zip(ids, chunks, strict=True):
        there = row[row >= 0]
        assert not set(db.rows[there, 1].tolist()) & set(documents)
        assert (row[len(there) :] == -1).all(), "-1 stands before a neighbor"
        stored = table.neighbors[table.places([chunk])[0]]
        allowed = [i for i in stored.tolist() if i >= 0 and int(db.rows[i, 1]) not in documents]
        assert there.tolist() == allowed[:k], "an allowed neighbor was left out, or the order is another one"


@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat"])
def test_a_long_document_of_like_chunks_finds_others(
    tmp_path: Path, index: str, caplog: pytest.LogCaptureFixture
) -> None:
    """700 chunks that are nearest to each other, which is more than sixteen times the candidates; by numpy."""
    words = make_texts(1, seed=1, longest=1)[0].split()
    random = np.random.default_rng(0)
    alike = " ".join(" ".join(random.permutation(words)) for _ in range(900))
    prefix = write_documents(tmp_path / "corpus", [alike, *make_texts(12, seed=2)], tokenizer_of(tmp_path))
    settings = {"duplicates": "keep", "num_neighbors_save": 4, "index": index, "nprobe": 2 if "IVF" in index else None}
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder())
    db, table = open_table(project)
    own = int(np.sum(db.rows[:, 1] == 0))
    assert own > 16 * project.config.num_neighbors_query and len(db) - own >= 40
    found = table.neighbors[: table.starts[1]]
    assert (found >= 0).all() and (db.rows[found, 1] != 0).all()
    if index == "Flat":
        vectors = WordEmbedder().embed(db.texts(range(len(db))))
        distances = ((vectors[:own:70, None] - vectors[None, own:]) ** 2).sum(-1)
        nearest = np.take_along_axis(distances, found[::70][: len(distances)] - own, 1)
        assert np.allclose(nearest, np.sort(distances, axis=1)[:, :4], atol=1e-3)
    assert table.manifest.num_short == table.manifest.num_none == 0 and "have fewer" not in caplog.text


def test_removed_documents_hide_nothing(tmp_path: Path) -> None:
    """Copies of all that is asked, in more chunks than candidates, are removed."""
    texts = make_texts(6, seed=3)
    prefix = write_documents(tmp_path / "corpus", texts + 60 * texts[:3], tokenizer_of(tmp_path))
    settings = {"duplicates": "keep", "num_neighbors_query": 6, "num_neighbors_save": 5}
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    remove_documents(project, Worker(), ",".join(f"corpus:{number}" for number in range(6, 186)))
    query_neighbors(project, Worker(), WordEmbedder())
    _, table = open_table(project)
    alone = write_documents(tmp_path / "alone", texts, tokenizer_of(tmp_path))
    other = build(make_project(tmp_path / "other", [alone], tmp_path, **settings), WordEmbedder())
    assert (table.neighbors[: table.starts[6]] == open_table(other)[1].neighbors).all()


def test_one_document_alone_has_no_neighbors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(1, longest=30), tokenizer_of(tmp_path))
    with caplog.at_level("INFO"):
        project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    _, table = open_table(project)
    assert (table.neighbors == -1).all()
    count = len(table.neighbors)
    assert table.manifest.num_short == table.manifest.num_none == count
    assert f"{count} have fewer than 5, {count} of them none" in caplog.text
    save_project_config(project.config, project.folder)
    summary = inspect_database(tmp_path / "db")
    assert f" x 5, {count} with fewer ({count} with none), version 1" in "\n".join(report_lines(summary))
    assert (table.read([(0, 0)], [(0, 0)], 3) == -1).all()


def test_a_file_of_the_database_is_known_by_another_path(tmp_path: Path) -> None:
    """A copy and a relative spelling hold the same documents; each filters its own."""
    tokenizer, texts = tokenizer_of(tmp_path), make_texts(8)
    prefix = write_documents(tmp_path / "corpus", texts, tokenizer)
    copy = write_documents(tmp_path / "other" / "copy", texts, tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder(), query=False)
    for name in (copy, str(tmp_path / "other" / ".." / "corpus")):
        query_neighbors(another(project, query_paths=[name]), Worker(), WordEmbedder())
    tables = [NeighborTable(path) for path in tables_of(project).values()]
    rows = VersionedDb(project, read_version(project.folder)).rows
    for table in tables:
        assert table.manifest.datasets == [0]
        document = np.repeat(np.arange(8), np.diff(table.starts))
        ids = table.neighbors
        assert ((ids < 0) | (rows[np.maximum(ids, 0), 1] != document[:, None])).all()


@pytest.mark.parametrize("change", ["no json", "longer", "shorter"])
def test_a_copy_of_documents_of_the_database_is_known(tmp_path: Path, change: str) -> None:
    """Without its checksums, with documents after it, or only the first ones: no neighbor of a chunk's own document."""
    tokenizer, texts = tokenizer_of(tmp_path), make_texts(8)
    prefix = write_documents(tmp_path / "corpus", texts, tokenizer)
    asked = {"longer": texts + make_texts(3, seed=9), "shorter": texts[:5], "no json": texts}[change]
    copy = write_documents(tmp_path / "copy", asked, tokenizer)
    Path(f"{copy}.json").unlink()
    project = make_project(tmp_path / "db", [prefix], tmp_path, query_paths=[copy])
    build(project, WordEmbedder())
    db, table = open_table(project)
    assert table.manifest.datasets == [0]
    document = np.repeat(np.arange(len(asked)), np.diff(table.starts))
    assert ((table.neighbors < 0) | (db.rows[np.maximum(table.neighbors, 0), 1] != document[:, None])).all()
    queries = RecallQueries(project, "chunks", "embedder")
    assert queries.source()[0] == "chunks of the database"


def other_bit(path: Path, place: int) -> None:
    whole = path.read_bytes()
    place %= len(whole)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "neighbors missing": lambda folder: (folder / "neighbors.npy").unlink(),
    "neighbors short": lambda folder: os.truncate(folder / "neighbors.npy", 200),
    "neighbors flipped": lambda folder: other_bit(folder / "neighbors.npy", -6),
    "starts missing": lambda folder: (folder / "starts.npy").unlink(),
    "starts short": lambda folder: os.truncate(folder / "starts.npy", 140),
    "starts flipped": lambda folder: other_bit(folder / "starts.npy", -8),
    "manifest empty": lambda folder: (folder / "table.json").write_text(""),
    "manifest null": lambda folder: (folder / "table.json").write_text("null"),
    "manifest {}": lambda folder: (folder / "table.json").write_text("{}"),
    "other datasets": lambda folder: (folder / "table.json").write_text(
        json.dumps(json.loads((folder / "table.json").read_text()) | {"datasets": []})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_made_again(tmp_path: Path, damage: str) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(6), tokenizer_of(tmp_path))
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    (folder,) = tables_of(project).values()
    before = content_of(folder)
    DAMAGE[damage](folder)
    with pytest.raises(DataError):
        validate("query-neighbors", project, Worker(), WordEmbedder(), 1.0)
    embedder = WordEmbedder()
    run_together(2, lambda worker: query_neighbors(another(project), worker, embedder))
    assert content_of(folder) == before
    assert embedder.num_embedded == 0, "its blocks were there still"
    assert validate("query-neighbors", project, Worker(), WordEmbedder(), 1.0) > 0


@settings(deadline=None, max_examples=6, phases=[Phase.generate], derandomize=True)
@given(st.data())
def test_after_a_removal_only_what_it_changes_is_searched(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Removals one after the other, with documents appended to what is queried between them: each table is that of a
    search for everything."""
    folder = tmp_path_factory.mktemp("removal")
    tokenizer, num_documents = tokenizer_of(folder), data.draw(st.integers(4, 12))
    base = write_documents(folder / "base", make_texts(num_documents, seed=num_documents, longest=6), tokenizer)
    texts = make_texts(12, seed=num_documents + 1, longest=6)
    asked = write_documents(folder / "asked", texts[:8], tokenizer)
    settings = {
        "index": data.draw(st.sampled_from(["Flat", "IVF3,Flat"])),
        "max_overlap": data.draw(st.sampled_from([None, 0.3])),
        "num_neighbors_query": data.draw(st.integers(4, 12)),
        "num_neighbors_save": data.draw(st.integers(1, 4)),
        "query_paths": [asked, base],
    }
    settings["nprobe"] = 2 if settings["index"] != "Flat" else None
    project = build(make_project(folder / "db", [base], folder, **settings), WordEmbedder())
    num_versions = 1
    for number in range(data.draw(st.integers(1, 3))):
        removed = data.draw(st.lists(st.integers(0, num_documents - 1), min_size=1, max_size=3))
        remove_documents(project, Worker(), ",".join(f"base:{document}" for document in removed))
        if read_version(project.folder).number == num_versions:
            continue  # all of them were removed before
        num_versions += 1
        if data.draw(st.booleans()):
            write_documents(folder / "asked", texts[: 9 + number], tokenizer)
        fresh = Project(folder / f"fresh{number}", project.config)
        shutil.copytree(project.folder, fresh.folder)
        shutil.rmtree(fresh.folder / "query")
        embedder, all_embedder = WordEmbedder(), WordEmbedder()
        query_neighbors(another(project), Worker(), embedder)
        query_neighbors(fresh, Worker(), all_embedder)
        num_taken = num_places = 0
        for prefix, path in tables_of(project).items():
            table, whole = NeighborTable(path), NeighborTable(tables_of(fresh)[prefix])
            table.verify()
            assert (table.neighbors == whole.neighbors).all()
            num_taken += table.manifest.num_taken_over
            num_places += table.manifest.num_places
        assert whole.manifest.num_taken_over == 0
        assert embedder.num_queries == all_embedder.num_queries - num_taken
        num_blocks = validate("query-neighbors", another(project), Worker(), WordEmbedder(), 1.0)
        assert (num_blocks > 0) == (num_taken < num_places)


def test_a_removal_that_concerns_few_costs_little(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(40, longest=4), tokenizer_of(tmp_path))
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, num_neighbors_save=2), WordEmbedder())
    db, table = open_table(project)
    concerned = (db.rows[np.maximum(table.neighbors, 0), 1] == 3) & (table.neighbors >= 0)
    remove_documents(project, Worker(), "corpus:3")
    embedder = WordEmbedder()
    query_neighbors(project, Worker(), embedder)
    assert 0 < embedder.num_queries == concerned.any(axis=1).sum() < len(table.neighbors) / 4
    # A pinned version with fewer removals goes on from none that had more.
    shutil.rmtree(table.folder)
    embedder = WordEmbedder()
    query_neighbors(another(project, version=1), Worker(), embedder)
    assert embedder.num_queries == len(table.neighbors)


def test_a_new_seed_batch_or_sequence_length_searches_nothing(small: Project) -> None:
    before = sorted(small.folder.glob("query/*"))
    embedder = WordEmbedder()
    # Nothing of a training run reaches a table: its settings are those of the database alone.
    query_neighbors(another(small, batch_tokens=64, num_shards=1), Worker(), embedder)
    assert embedder.num_embedded == 0 and sorted(small.folder.glob("query/*")) == before


@pytest.mark.parametrize("change", [{"num_neighbors_query": 15}, {"num_neighbors_save": 3}, {"max_overlap": 0.5}])
def test_other_settings_have_a_folder_of_their_own(tmp_path: Path, change: dict[str, float]) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(6), tokenizer_of(tmp_path))
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    first = {path: (path / "neighbors.npy").read_bytes() for path in project.folder.glob("query/*")}
    query_neighbors(another(project, **change), Worker(), WordEmbedder())
    assert len(list(project.folder.glob("query/*"))) == 2
    assert all((path / "neighbors.npy").read_bytes() == content for path, content in first.items())


def test_another_nprobe_has_a_folder_of_its_own(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(30), tokenizer_of(tmp_path))
    project = make_project(tmp_path / "db", [prefix], tmp_path, index="IVF4,Flat", nprobe=1)
    build(project, WordEmbedder())
    embedder = WordEmbedder()
    query_neighbors(another(project, nprobe=4), Worker(), embedder)
    manifests = [read_table_manifest(path) for path in project.folder.glob("query/*")]
    assert embedder.num_embedded and len(manifests) == 2
    assert {(manifest.nprobe, manifest.recall is None) for manifest in manifests} == {(1, False), (4, True)}
    tables = [NeighborTable(path) for path in project.folder.glob("query/*")]
    assert (tables[0].neighbors != tables[1].neighbors).any()


def test_appended_documents_alone_are_searched(tmp_path: Path) -> None:
    """The file that is queried grows, the database does not: old documents keep their neighbors."""
    tokenizer = tokenizer_of(tmp_path)
    base = write_documents(tmp_path / "base", make_texts(12), tokenizer)
    texts = make_texts(9, seed=3)
    asked = write_documents(tmp_path / "asked", texts[:6], tokenizer)
    project = build(make_project(tmp_path / "db", [base], tmp_path, query_paths=[asked]), WordEmbedder())
    old = NeighborTable(tables_of(project)[asked])
    old_neighbors, num_old = np.array(old.neighbors), old.manifest.num_places

    write_documents(tmp_path / "asked", texts, tokenizer)
    embedder = WordEmbedder()
    query_neighbors(another(project), Worker(), embedder)
    manifests = [read_table_manifest(path) for path in project.folder.glob("query/*")]
    grown = max(manifests, key=lambda manifest: manifest.num_places)
    assert len(manifests) == 2 and grown.num_taken_over == num_old
    assert embedder.num_queries == grown.num_places - num_old > 0
    folder = next(p for p in project.folder.glob("query/*") if read_table_manifest(p).num_taken_over)
    table = NeighborTable(folder)
    table.verify()
    assert (table.neighbors[:num_old] == old_neighbors).all()
    old.check_source(Path(asked))  # who reads the old table goes on

    fresh = make_project(tmp_path / "db2", [base], tmp_path, query_paths=[asked])
    whole = NeighborTable(tables_of(build(fresh, WordEmbedder()))[asked])
    assert (whole.neighbors == table.neighbors).all(), "what was taken over differs from what is searched"

    write_documents(tmp_path / "asked", [*texts[1:], *texts], tokenizer)
    embedder = WordEmbedder()
    query_neighbors(another(project), Worker(), embedder)
    assert embedder.num_queries > grown.num_places, "the neighbors of other documents were taken over"
    with pytest.raises(DataError, match="has changed since its neighbors were searched"):
        old.check_source(Path(asked))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 8), st.floats(0, 1))
def test_searching_around_a_filter_is_searching_without_what_it_drops(
    seed: int, num_query: int, num_save: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((120, 4)).astype(np.float32)
    dropped = random.random(120) < share
    index = VectorIndex.train("Flat", "l2", vectors)
    index.add_codes(index.encode(vectors), np.arange(120))
    queries = random.standard_normal((6, 4)).astype(np.float32)
    _, found = find_allowed(
        ShardedIndex([index]), queries, max(num_query, 8), num_save, lambda rows, ids: ~dropped[np.maximum(ids, 0)]
    )
    left = np.flatnonzero(~dropped)
    for row, query in zip(found, queries, strict=True):
        nearest = left[np.argsort(((vectors[left] - query) ** 2).sum(1), kind="stable")][:num_save]
        assert row[row >= 0].tolist() == nearest.tolist()


def test_a_finished_table_is_not_gone_on_from(small: Project) -> None:
    """As --validate opens it: its blocks are those that were searched."""
    db = VersionedDb(small, read_version(small.folder))
    file = QueriedFile(small, db, small.config.data_paths[0], Worker())
    before = content_of(file.folder)
    plan = file.open()
    assert plan.first == 0 and content_of(file.folder) == before
    vectors = version_vectors(db, Worker(), WordEmbedder())
    searcher = Searcher(file, plan, open_index(small, db.version), WordEmbedder(), vectors)
    for block in plan.blocks.blocks:
        plan.blocks.check(block, searcher.compute(block))


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stored_embeddings_are_used(tmp_path: Path) -> None:
    """After the task embed a database's own chunks are not embedded again."""
    prefix = write_documents(tmp_path / "corpus", make_texts(9), tokenizer_of(tmp_path))
    project = make_project(tmp_path / "db", [prefix], tmp_path)
    plain = build(make_project(tmp_path / "plain", [prefix], tmp_path), WordEmbedder())
    build(project, WordEmbedder(), query=False)
    embed_chunks(open_vectors(project, Worker(), WordEmbedder()), Worker())
    embedder = WordEmbedder()
    query_neighbors(project, Worker(), embedder)
    table, other = open_table(project)[1], open_table(plain)[1]
    repeated = len(table.neighbors) - len(VersionedDb(project, read_version(project.folder)))
    assert embedder.num_embedded == repeated, "only chunks that were left out as repeated have no vector on disk"
    assert (table.neighbors == other.neighbors).all()


def test_a_table_of_an_index_that_is_gone_is_refused(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(6), tokenizer_of(tmp_path))
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    with pytest.raises(DataError, match="another embedder"):
        query_neighbors(another(project), Worker(), WordEmbedder(name="others"))
    (index,) = project.folder.glob("index/**/added_*.faissindex")
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="was changed since this version"):
        query_neighbors(another(project, num_neighbors_save=2), Worker(), WordEmbedder())
