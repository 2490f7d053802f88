"""Databases that grow, and versions that stay as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.data.chunks.joined_rows import JoinedRows
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    VersionedDb,
    begins_with,
    read_version,
    shares_documents,
    sorted_keys,
    source_of,
    version_numbers,
)
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.cuts import is_validation
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.database.versions import is_grown, open_index, record_version
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tombstone import parse_documents, remove_documents
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.digest import hashed_bytes
from megatron_grit.store.sealed import read_sealed, write_sealed
from tests.unit.retrieval.databases import (
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)
from tests.unit.retrieval.workers import run_together

TEXTS, MORE, OTHER = make_texts(12), make_texts(7, seed=1), make_texts(9, seed=2)


def grow(project: Project, embedder: WordEmbedder | None = None, **settings: object) -> Project:
    grown = another(project, **settings)
    add_documents(grown, Worker(), embedder or WordEmbedder())
    return grown


def content(project: Project) -> dict[str, bytes]:
    """Every file of the database that a version may be made of."""
    return {
        path.relative_to(project.folder).as_posix(): path.read_bytes()
        for path in sorted(project.folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def project(tmp_path: Path) -> Project:
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer_of(tmp_path))
    return build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())


@pytest.fixture
def other(tmp_path: Path) -> str:
    return write_documents(tmp_path / "other", OTHER, tokenizer_of(tmp_path))


def texts_of(project: Project, number: int | None = None) -> list[str]:
    db = VersionedDb(project, read_version(project.folder, number))
    return db.texts(range(len(db)))


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "IVF4,PQ4x4"])
def test_a_grown_database_is_the_one_built_at_once(tmp_path: Path, index: str) -> None:
    """A dataset gets documents and another dataset comes; same chunks, and, where the index is exact, neighbors."""
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer)
    settings = {"index": index, "nprobe": 4 if "IVF" in index else None}
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder())
    before = content(project)
    write_documents(tmp_path / "corpus", TEXTS + MORE, tokenizer)
    paths = [prefix, write_documents(tmp_path / "other", OTHER, tokenizer)]
    embedder = WordEmbedder()
    grown = grow(project, embedder, data_paths=paths)
    db = VersionedDb(grown, read_version(grown.folder))
    num_old, num_new = [segment.num_chunks for segment in db.version.segments]
    assert embedder.num_embedded == num_new < num_old + num_new == len(db) == len(open_index(grown, db.version))
    query_neighbors(grown, Worker(), WordEmbedder())
    assert {name: data for name, data in content(grown).items() if name in before} == before, "a file was changed"

    whole = build(make_project(tmp_path / "whole", paths, tmp_path, **settings), WordEmbedder())
    everything = VersionedDb(whole, read_version(whole.folder))
    assert sorted(map(tuple, db.rows[:].tolist())) == sorted(map(tuple, everything.rows.tolist()))
    if index.endswith("Flat"):
        for name in paths:
            mine = NeighborTable(tables_of(grown)[name])
            theirs = NeighborTable(tables_of(whole)[name])
            for number in np.flatnonzero(db.rows[:][:, 0] == paths.index(name))[::3].tolist():
                document, start = db.rows[number][1:3].tolist()
                query = WordEmbedder().embed(db.texts([number]))
                ids = (table.neighbors[table.places([(document, start)])[0]] for table in (mine, theirs))
                texts = (both.texts(row) for both, row in zip((db, everything), ids, strict=True))
                found = [((WordEmbedder().embed(part) - query) ** 2).sum(1) for part in texts]
                assert np.allclose(*found, rtol=1e-4, atol=1e-4)


def test_an_old_version_stays_as_it_was(project: Project, other: str) -> None:
    first = read_version(project.folder)
    db, index = VersionedDb(project, first), open_index(project, first)
    queries = WordEmbedder().embed(OTHER)
    old_texts, old_rows, old_found = db.texts(range(len(db))), np.array(db.rows), index.search(queries, 7)
    old_tables = {path: (path / "neighbors.npy").read_bytes() for path in project.folder.glob("query/*")}

    write_documents(Path(project.config.data_paths[0]), TEXTS + MORE, project.tokenizer)
    grown = grow(project, data_paths=[*project.config.data_paths, other])
    remove_documents(grown, Worker(), "corpus:0,other:3")
    query_neighbors(grown, Worker(), WordEmbedder())
    assert version_numbers(grown.folder) == [1, 2, 3] and is_grown(grown)

    pinned = another(grown, version=1)
    again = VersionedDb(pinned, read_version(pinned.folder, 1))
    assert again.texts(range(len(again))) == old_texts and (again.rows[:] == old_rows).all()
    scores, ids = open_index(pinned, again.version).search(queries, 7)
    assert (scores == old_found[0]).all() and (ids == old_found[1]).all()
    assert all((path / "neighbors.npy").read_bytes() == data for path, data in old_tables.items())
    # Its tables are gone on with: of the file that has grown only the new documents are searched.
    embedder = WordEmbedder()
    query_neighbors(another(pinned, query_paths=pinned.config.data_paths[:1]), Worker(), embedder)
    tables = [NeighborTable(path) for path in pinned.folder.glob("query/*")]
    grown_table = next(table for table in tables if table.manifest.num_taken_over and table.manifest.version == 1)
    assert grown_table.neighbors.max() < len(again)
    assert embedder.num_queries == len(grown_table.neighbors) - grown_table.manifest.num_taken_over > 0
    # The newest finds more.
    assert len(texts_of(grown)) > len(old_texts) and texts_of(grown)[: len(old_texts)] == old_texts


def test_new_chunks_that_are_there_already_are_left_out(project: Project, tmp_path: Path) -> None:
    repeated = write_documents(tmp_path / "other", [TEXTS[3], *OTHER, OTHER[0], TEXTS[5]], project.tokenizer)
    grown = grow(project, data_paths=[*project.config.data_paths, repeated])
    db = VersionedDb(grown, read_version(grown.folder))
    start = db.version.segments[0].num_chunks
    rows = db.rows[start:]
    assert set(rows[:, 1].tolist()) <= set(range(1, len(OTHER) + 1)), "a repeated document came in"
    texts = db.texts(range(len(db)))
    assert len(set(texts)) == len(texts)
    kept = another(project, duplicates="keep", data_paths=grown.config.data_paths)
    assert len(rows) < sum(-(-int(n - 1) // 8) for n in kept.file(1).lengths)


def test_similar_chunks_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer)
    near = [text.replace("queue", "cursor") + " The end." for text in TEXTS[:4]]
    settings = {"duplicates": "near", "near_threshold": 0.5, "chunk_length": 32}
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, **settings), WordEmbedder(), query=False)
    paths = [prefix, write_documents(tmp_path / "other", [*near, *OTHER], tokenizer)]
    grown = grow(project, data_paths=paths)
    db = VersionedDb(grown, read_version(grown.folder))
    documents = db.rows[db.version.segments[0].num_chunks :][:, 1]
    exact = make_project(tmp_path / "exact", [prefix], tmp_path, **settings | {"duplicates": "exact"})
    bigger = grow(build(exact, WordEmbedder(), query=False), data_paths=paths)
    all_new = VersionedDb(bigger, read_version(bigger.folder))
    others = all_new.rows[all_new.version.segments[0].num_chunks :][:, 1]
    assert (others < 4).sum() > 4 * (documents < 4).sum(), "similar chunks came in"
    assert (documents >= 4).sum() > 0.5 * (others >= 4).sum(), "other chunks did not"


def test_removed_documents_are_never_found(project: Project) -> None:
    db = VersionedDb(project, read_version(project.folder))
    remove_documents(project, Worker(), "0:2, corpus:5")
    remove_documents(project, Worker(), f"{project.config.data_paths[0]}:7")
    query_neighbors(project, Worker(), WordEmbedder())
    version = read_version(project.folder)
    assert (version.number, version.num_tombstones, version.num_chunks) == (3, 3, len(db))
    table = NeighborTable(next(p for p in tables_of(project).values()))
    assert table.manifest.version == 3
    found = db.rows[table.neighbors[table.neighbors >= 0], 1]
    assert not {2, 5, 7} & set(found.tolist())
    old = [NeighborTable(path) for path in project.folder.glob("query/*")]
    before = next(t for t in old if t.manifest.version == 1)
    assert {2, 5, 7} & set(db.rows[before.neighbors[before.neighbors >= 0], 1].tolist())
    # As many as before: what was removed makes room for others.
    assert (table.neighbors >= 0).sum() == (before.neighbors >= 0).sum()


def test_removing_again_changes_nothing(project: Project, tmp_path: Path) -> None:
    listed = tmp_path / "removed.txt"
    listed.write_text("corpus:1\n\ncorpus:4\n")
    remove_documents(project, Worker(), str(listed))
    remove_documents(project, Worker(), "corpus:4")
    assert version_numbers(project.folder) == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus:99", "documents 0 to 11"),
        ("nothing:1", "0 datasets are called 'nothing'"),
        ("corpus:x", "documents 0 to 11"),
        ("same:1", "2 datasets are called 'same'"),
        ("missing.txt", "neither DATASET:DOCUMENT nor a file"),
    ],
)
def test_documents_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_documents(text, [("data/corpus", 12), ("a/same", 3), ("b/same", 3)])


@pytest.mark.parametrize("text", ["corpus:²", "corpus:-1", "corpus:", "corpus:" + "1" * 30])
def test_a_document_is_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="documents 0 to 11"):
        parse_documents(text, [("data/corpus", 12)])


def test_lists_of_documents(tmp_path: Path) -> None:
    listed = tmp_path / "removed.txt"
    for content in (b"", b"\n \n"):
        listed.write_bytes(content)
        with pytest.raises(ConfigError, match="names no document"):
            parse_documents(str(listed), [("data/corpus", 12)])
    listed.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="neither DATASET:DOCUMENT nor a file that can be read"):
        parse_documents(str(listed), [("data/corpus", 12)])
    # Longer than the name of a file may be.
    assert len(parse_documents(",".join(["corpus:3"] * 600), [("data/corpus", 12)])) == 600


@pytest.mark.parametrize("duplicates", ["exact", "near"])
def test_what_was_removed_may_come_again(tmp_path: Path, duplicates: str, caplog: pytest.LogCaptureFixture) -> None:
    """Document 5 equals document 2, so its chunks were left out; with document 2 they are gone."""
    if duplicates == "near":
        pytest.importorskip("datasketch")
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", [*TEXTS[:5], TEXTS[2], TEXTS[6]], tokenizer)

    def held_out(seed: int) -> list[list[int]]:
        return [np.flatnonzero(is_validation(name, np.arange(7), 0.3, seed)).tolist() for name in ("corpus", "again")]

    seed = next(seed for seed in range(10_000) if held_out(seed) == [[6], []])
    settings = {"duplicates": duplicates, "near_threshold": 0.9, "valid_fraction": 0.3, "seed": seed}
    project = make_project(tmp_path / "db", [prefix], tmp_path, **settings)
    build(project, WordEmbedder(), query=False)
    texts = set(texts_of(project))
    db = VersionedDb(project, read_version(project.folder))
    gone = set(db.texts(np.flatnonzero(db.rows[:, 1] == 2)))
    assert gone and not (db.rows[:, 1] == 5).any()
    caplog.clear()
    with caplog.at_level("WARNING"):
        remove_documents(project, Worker(), "corpus:3")
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        remove_documents(project, Worker(), "corpus:2")
    assert f"any more either: {len(gone)}, of other documents: 1 (as {prefix}, document 5)" in caplog.text

    again = write_documents(tmp_path / "again", [TEXTS[2], TEXTS[1], TEXTS[6], *OTHER], tokenizer)
    contents = []
    for num_workers in (1, 2):
        copy = Project(tmp_path / f"copy{num_workers}", project.config)
        shutil.copytree(project.folder, copy.folder)
        run_together(
            num_workers,
            lambda worker, copy=copy: add_documents(another(copy, data_paths=[prefix, again]), worker, WordEmbedder()),
        )
        contents.append(content(copy))
        assert not (copy.folder / "db" / "versions" / "0004" / "duplicates").exists()
    assert contents[0] == contents[1]
    grown = another(copy, data_paths=[prefix, again])
    db = VersionedDb(grown, read_version(grown.folder))
    new = db.rows[db.version.segments[0].num_chunks :]
    assert {db.texts([place])[0] for place in np.flatnonzero((db.rows[:, 0] == 1) & (db.rows[:, 1] == 0))} == gone
    assert not {1, 2} & set(new[:, 1].tolist()), "what is there still, or is kept for validation, came in"
    assert len(new) > len(gone) and not gone & (texts - gone)


def test_an_addition_of_what_is_there_already(project: Project, other: str, tmp_path: Path) -> None:
    """A version without new chunks, so that the same command has nothing to do the next time."""
    repeated = write_documents(tmp_path / "again", TEXTS[2:6], project.tokenizer)
    paths = [*project.config.data_paths, repeated]
    grown = grow(project, data_paths=paths)
    before, after = read_version(grown.folder, 1), read_version(grown.folder)
    assert (after.number, after.num_chunks, len(after.segments)) == (2, before.num_chunks, 2)
    assert "whose chunks were all there" in after.notes[0] and is_grown(grown)
    grow(project, data_paths=paths)
    assert version_numbers(grown.folder) == [1, 2]
    query_neighbors(grown, Worker(), WordEmbedder())
    assert len(tables_of(grown)) == 2
    # And it grows on from there.
    embedder = WordEmbedder()
    larger = grow(grown, embedder, data_paths=[*paths, other])
    version = read_version(larger.folder)
    assert [len(segment.index) for segment in version.segments] == [1, 0, 1] and embedder.num_embedded
    index = open_index(larger, version)
    _, ids = index.search(WordEmbedder().embed(texts_of(larger)), 1)
    assert (ids[:, 0] == np.arange(version.num_chunks)).all()


def test_chunks_of_documents(project: Project, other: str) -> None:
    grown = grow(project, data_paths=[*project.config.data_paths, other])
    db = VersionedDb(grown, read_version(grown.folder))
    pairs = [(0, 3), (1, 0), (1, 5)]
    wanted = [n for n, row in enumerate(db.rows[:].tolist()) if tuple(row[:2]) in pairs]
    assert db.chunks_of(sorted_keys(pairs)).tolist() == wanted and len(db.chunks_of(sorted_keys([]))) == 0


@pytest.mark.parametrize("change", ["same", "no json", "longer", "shorter", "one token", "another order"])
def test_documents_under_the_same_numbers(tmp_path: Path, change: str) -> None:
    tokenizer = tokenizer_of(tmp_path)
    own = Path(write_documents(tmp_path / "corpus", TEXTS, tokenizer))
    texts = {"longer": TEXTS + MORE, "shorter": TEXTS[:4], "another order": TEXTS[::-1]}.get(change, TEXTS)
    if change == "one token":
        texts = [*TEXTS[:-1], f"{TEXTS[-1][:-1]}!"]
    path = Path(write_documents(tmp_path / "copy", texts, tokenizer))
    if change in ("no json", "longer", "shorter"):
        Path(f"{path}.json").unlink()
    wanted = change in ("same", "no json", "longer", "shorter")
    assert shares_documents(path, own, source_of(str(own), own)) == wanted


def test_chunks_that_were_damaged_are_found_and_made_again(project: Project, other: str) -> None:
    table = project.merged / "train.hdf5"
    whole = table.read_bytes()
    place = whole.index(np.asarray(VersionedDb(project, read_version(project.folder)).rows[5]).tobytes())
    table.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for task in (query_neighbors, add_documents):
        with pytest.raises(DataError, match="was changed since this version"):
            task(another(project, data_paths=[*project.config.data_paths, other]), Worker(), WordEmbedder())
    build_chunks(project, Worker())
    assert table.read_bytes() == whole
    stamp = table.stat().st_mtime_ns
    build_chunks(project, Worker())
    assert table.stat().st_mtime_ns == stamp


def test_adding_nothing_makes_no_version(project: Project) -> None:
    grow(project)
    assert version_numbers(project.folder) == [1] and not is_grown(project)


def test_an_addition_that_was_stopped_goes_on(project: Project, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_grit.retrieval.database import versions

    paths = [*project.config.data_paths, other]
    calls: list[int] = []

    class Stopping(WordEmbedder):
        def embed(self, texts, side="passage"):
            calls.append(len(texts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().embed(texts, side)

    with pytest.raises(KeyboardInterrupt):
        grow(project, Stopping(), data_paths=paths)
    assert version_numbers(project.folder) == [1], "a version is there before its files"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(versions, "write_version", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        grow(project, data_paths=paths)
    embedder = WordEmbedder()
    grown = grow(project, embedder, data_paths=paths)
    assert embedder.num_embedded == 0, "codes were made twice"
    fresh = {file.path: file.sha256 for file in read_version(grown.folder).files()}
    straight = make_project(project.folder.parent / "db3", project.config.data_paths, project.folder.parent)
    whole = grow(build(straight, WordEmbedder()), data_paths=paths)
    assert {file.path: file.sha256 for file in read_version(whole.folder).files()} == fresh


def test_an_addition_that_was_given_up_is_not_part_of_the_database(
    project: Project, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks would all be there already."""
    from megatron_grit.retrieval.stages import add

    paths = [*project.config.data_paths, other]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(add, "writing_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        grow(project, data_paths=paths)
    remove_documents(project, Worker(), "corpus:2")
    grown = grow(project, data_paths=paths)
    before, after = read_version(grown.folder, 2), read_version(grown.folder)
    assert after.number == 3 and after.num_chunks > before.num_chunks


def test_an_addition_is_the_same_from_several_processes(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    tokenizer = tokenizer_of(tmp_path)
    near = [text.replace("queue", "cursor") + " The end." for text in TEXTS[:4]]
    paths = [write_documents(tmp_path / "corpus", TEXTS, tokenizer)]
    new = write_documents(tmp_path / "other", [*near, *OTHER, *near[:2]], tokenizer)
    contents = []
    for name, num_workers in (("alone", 1), ("shared", 2)):
        project = make_project(tmp_path / name, paths, tmp_path, duplicates="near", near_threshold=0.6)
        build(project, WordEmbedder(), query=False)
        run_together(
            num_workers,
            lambda worker, built=project: add_documents(
                another(built, data_paths=[*paths, new]), worker, WordEmbedder()
            ),
        )
        contents.append(content(project))
        assert not (project.folder / "db" / "versions" / "0002" / "duplicates").exists()
    assert contents[0].keys() == contents[1].keys()
    assert {name for name in contents[0] if contents[0][name] != contents[1][name]} == set()


def test_changed_documents_are_refused(project: Project) -> None:
    path = Path(project.config.data_paths[0])
    for texts in (TEXTS[:5], [*TEXTS[:3], "The stream reads a file.", *TEXTS[4:], *MORE]):
        write_documents(path, texts, project.tokenizer)
        with pytest.raises(DataError, match="no longer begins with the 12 documents of version 1"):
            grow(project)
        with pytest.raises(DataError, match="no longer begins with"):
            VersionedDb(another(project), read_version(project.folder))
    write_documents(path, TEXTS, project.tokenizer)
    VersionedDb(another(project), read_version(project.folder))


def test_datasets_are_appended_and_never_taken_out(project: Project, other: str) -> None:
    with pytest.raises(DataError, match="new datasets are appended"):
        grow(project, data_paths=[other, *project.config.data_paths])


def test_an_index_that_was_built_again_is_another_version(project: Project) -> None:
    first = read_version(project.folder)
    build(another(project, index="IVF2,Flat", nprobe=2), WordEmbedder())
    assert version_numbers(project.folder) == [1, 2]
    open_index(project, first)
    path = project.folder / first.segments[0].index[0].path
    write_sealed(path.with_suffix(".json"), read_sealed(path.with_suffix(".json")) | {"sha256": "0" * 64})
    with pytest.raises(DataError, match="was built again since version 1"):
        open_index(project, first)


def test_versions_that_cannot_be_opened(project: Project) -> None:
    with pytest.raises(DataError, match="versions that are there: 1"):
        read_version(project.folder, 7)
    version = read_version(project.folder)
    table = project.folder / version.segments[0].table.path
    with table.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="was changed since this version"):
        VersionedDb(project, version)
    (project.folder / "db" / "versions" / "0001.json").write_text('{"number": 1}')
    with pytest.raises(DataError, match="cannot be read"):
        read_version(project.folder)
    with pytest.raises(ConfigError, match="set it to null"):
        add_documents(another(project, version=1), Worker(), WordEmbedder())


def test_a_version_is_of_one_embedder(project: Project, other: str) -> None:
    with pytest.raises(DataError, match="another embedder"):
        grow(project, WordEmbedder(name="others"), data_paths=[*project.config.data_paths, other])
    record_version(project, Worker(), WordEmbedder())
    assert version_numbers(project.folder) == [1]


def test_joined_rows_read_like_one_array() -> None:
    rows = np.random.default_rng(0).integers(0, 99, (23, 5), dtype=np.uint32)
    joined = JoinedRows([rows[:7], rows[7:7], rows[7:20], rows[20:]])
    assert len(joined) == 23 and joined.shape == rows.shape
    ids = np.random.default_rng(1).integers(0, 23, (4, 6))
    for index in (0, 6, 7, 22, -1, slice(5, 21), ids, ids[0], np.empty(0, np.int64)):
        assert (joined[index] == rows[index]).all() and joined[index].shape == rows[index].shape
    mask = np.random.default_rng(2).random(23) < 0.5
    for index in (mask, slice(6, 21), slice(None), slice(20, 3), slice(21, 2, -3), ids, 9, -1):
        assert np.array_equal(joined[index], rows[index])
        for column in (0, -1, slice(1, 3)):
            found, wanted = joined[index, column], rows[index][..., column]
            assert np.array_equal(found, wanted) and found.dtype == wanted.dtype
    for index in (23, mask[:7], (slice(None), [0, 1])):
        with pytest.raises(IndexError):
            joined[index]


def test_a_source_without_its_json_is_read(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer_of(tmp_path))
    with_json = source_of(prefix, Path(prefix))
    Path(prefix + ".json").unlink()
    without = source_of(prefix, Path(prefix))
    assert (with_json.bin_sha256, with_json.index_sha256) == (without.bin_sha256, without.index_sha256)


def test_the_beginning_of_a_file_is_hashed_once(tmp_path: Path) -> None:
    """Of a file that has grown since: what a process has found it remembers, and the next one that opens it samples."""
    tokenizer = tokenizer_of(tmp_path)
    path = Path(write_documents(tmp_path / "corpus", TEXTS, tokenizer))
    source = source_of(str(path), path)
    longer = Path(write_documents(tmp_path / "longer", TEXTS + MORE, tokenizer))
    before = hashed_bytes()
    assert begins_with(longer, source)
    first = hashed_bytes() - before
    assert begins_with(longer, source) and hashed_bytes() - before == first >= source.bin_bytes
    other = Path(write_documents(tmp_path / "other", [MORE[0], *TEXTS[1:], *MORE], tokenizer))
    assert not begins_with(other, source)  # the control: equal sizes are not believed
