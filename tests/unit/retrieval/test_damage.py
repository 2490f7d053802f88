"""Damage of any file of a database is refused, or mended, before something else is read; checksums cost one pass."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks.database_flips import Campaign, Flip, Reading, WrongContentError, build_database
from megatron_grit.config.database.schema import save_project_config
from megatron_grit.data.chunks import versions
from megatron_grit.data.chunks.chunk_db import VISIBLE, map_dataset
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.retrieval.database.cuts import writing_table
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.database.verification import verify_files
from megatron_grit.retrieval.database.versions import open_index
from megatron_grit.retrieval.index import manifest
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.inspect import inspect_database, report_lines
from megatron_grit.retrieval.stages.restore import restore_index, restore_tables
from megatron_grit.retrieval.work import Worker
from megatron_grit.store import content
from megatron_grit.store.blocks import set_text, text_of
from megatron_grit.store.content import forget_opened
from megatron_grit.store.digest import hashed_bytes
from megatron_grit.store.sealed import CHECKSUM
from tests.unit.retrieval.databases import (
    WordEmbedder,
    build,
    database_of,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)
from tests.unit.retrieval.workers import run_together


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("flips") / "here"
    folder.mkdir()
    build_database(folder)
    return Campaign(folder, seed=0)


def project_of(campaign: Campaign) -> Project:
    return Reading(campaign.folder, campaign.tokenizer).project


def test_flips_are_never_believed(campaign: Campaign) -> None:
    counts = Counter(campaign.run(campaign.draw()) for _ in range(5000))
    assert sum(counts.values()) == 5000 and counts["refused"] > 3000


def test_a_reader_that_trusts_is_seen(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can fail: with one comparison left out it finds flips that are believed."""
    right = campaign.folder / "db"
    monkeypatch.setattr(versions, "content_digest", lambda path: versions_of[Path(path)])
    versions_of = {right / file.path: file.sha256 for number in (1, 3) for file in read_version(right, number).files()}
    name = "db/db/versions/0002/train.hdf5"
    row = map_dataset(campaign.folder / name, "chunks")[3].tobytes()
    with pytest.raises(WrongContentError, match="tokens read something else without a word"):
        campaign.run(Flip(name, campaign.files[name].index(row) + 4 * VISIBLE, 2))


@pytest.mark.parametrize("name", ["first", "second"])  # with a .json, and without
def test_a_document_boundary_and_a_token(campaign: Campaign, name: str) -> None:
    num_sequences = {"first": 24, "second": 9}[name]  # with a mode byte each, at the end
    boundary = len(campaign.files[f"{name}.idx"]) - num_sequences - 2 * 8
    for file, byte in ((f"{name}.idx", boundary), (f"{name}.bin", 101)):
        with campaign.flipped(Flip(file, byte, 0)):
            forget_opened()
            with pytest.raises(DataError, match=f"{name}.*(does not match the checksum in its .json|no longer begins)"):
                VersionedDb(project_of(campaign), read_version(campaign.folder / "db"))
            with pytest.raises(DataError):
                inspect_database(campaign.folder / "db", verify=True)


def test_a_header_that_says_another_type(campaign: Campaign) -> None:
    """Strings of 8 bytes in place of int64, whose bytes are the same."""
    name = next(name for name in campaign.files if "query" in name and name.endswith("starts.npy"))
    assert campaign.files[name][22:26] == b"'<i8"
    with campaign.flipped(Flip(name, 24, 3)):
        for found in campaign.read(["neighbors:first", "resumption:first"]).values():
            assert isinstance(found, DataError) and "holds |S8 and not int64" in str(found)


def test_no_file_holds_a_heap(campaign: Campaign) -> None:
    """HDF5 crashes, or reads without end, where a bit of a heap of strings is another."""
    import h5py

    files = [content for name, content in campaign.files.items() if name.endswith(".hdf5")]
    assert len(files) > 10 and not any(b"GCOL" in content for content in files)
    with h5py.File(io.BytesIO(), "w") as file:
        set_text(file, "short", "text")
        file.attrs["long"] = "text"
        assert [text_of(file, name) for name in ("short", "long")] == ["text", "text"], "earlier releases' as well"


def test_the_type_of_a_table_is_compared(tmp_path: Path) -> None:
    """Every bit of the message that holds it; the checksum is of the bytes of the rows alone."""
    rows, path = np.arange(35, dtype=np.uint32).reshape(7, 5), tmp_path / "train.hdf5"
    with writing_table(path, len(rows), "signature", 3) as table:
        table.add(rows, np.arange(9).reshape(3, 3))
    content, refused = path.read_bytes(), 0
    for place in range(8 * 940, 8 * 1060):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = map_dataset(path, "chunks")
            assert found.dtype == rows.dtype and np.array_equal(found, rows), place
        except DataError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_damage_before_the_first_build(tmp_path: Path, ending: str) -> None:
    prefix = write_documents(tmp_path / "corpus", make_texts(6), tokenizer_of(tmp_path))
    path = tmp_path / f"corpus.{ending}"
    damaged = bytearray(path.read_bytes())
    damaged[-12] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"corpus.{ending}.*does not match the checksum in its .json"):
        build_chunks(make_project(tmp_path / "db", [prefix], tmp_path), Worker())


@pytest.mark.parametrize("table", ["db/merged/train.hdf5", "db/merged/valid.hdf5", "db/versions/0002/train.hdf5"])
@pytest.mark.parametrize("is_gone", [False, True], ids=["damaged", "gone"])
def test_tables_of_a_grown_database_are_made_again(campaign: Campaign, table: str, is_gone: bool) -> None:
    path = campaign.folder / "db" / table
    path.unlink() if is_gone else path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    forget_opened()
    restore_tables(project_of(campaign), Worker())
    assert path.read_bytes() == campaign.files[f"db/{table}"]
    assert not (campaign.folder / "db" / "db" / "duplicates").exists()


@pytest.mark.parametrize("is_gone", [False, True], ids=["damaged", "gone"])
def test_index_files_of_a_grown_database_are_made_again(campaign: Campaign, is_gone: bool) -> None:
    """That of the first build and that of the addition, by the task index-add."""
    folder = campaign.folder / "db"
    paths = [folder / file.path for segment in read_version(folder).segments for file in segment.index]
    assert len(paths) == 2 and "added_v" in paths[1].name
    for path in paths:
        path.unlink() if is_gone else path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
        forget_opened()
        with pytest.raises(DataError, match="index-add index files"):
            open_index(project_of(campaign), read_version(folder))
        run_together(2, lambda worker: restore_index(project_of(campaign), worker, WordEmbedder()))
        assert path.read_bytes() == campaign.files[path.relative_to(campaign.folder).as_posix()]
    trained = folder / read_version(folder).trained.path
    trained.unlink() if is_gone else trained.write_bytes(b"x" + trained.read_bytes()[1:])
    forget_opened()
    run_together(2, lambda worker: restore_index(project_of(campaign), worker, WordEmbedder()))
    assert trained.read_bytes() == campaign.files[trained.relative_to(campaign.folder).as_posix()]
    open_index(project_of(campaign), read_version(folder))
    assert {path.name for path in paths[1].parent.iterdir()} == {
        Path(name).name for name in campaign.files if Path(name).parent == paths[1].parent.relative_to(campaign.folder)
    } | {".digests"} & {path.name for path in paths[1].parent.iterdir()}


def test_a_table_that_would_be_another_is_refused(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project_of(campaign)
    project.config.duplicates = "keep"  # its blocks would be merged to more chunks
    path = project.merged / "train.hdf5"
    path.unlink()
    with pytest.raises(DataError, match="was changed since this version"):
        restore_tables(project, Worker())
    restore_tables(project_of(campaign), Worker())
    assert path.read_bytes() == campaign.files["db/db/merged/train.hdf5"]


def test_neighbors_of_another_database(campaign: Campaign, tmp_path: Path) -> None:
    other = database_of(tmp_path, {"first": make_texts(24)}, min_chunk_tokens=2)
    (theirs,) = tables_of(other).values()
    mine = next(folder for prefix, folder in tables_of(project_of(campaign)).items() if prefix.endswith("first"))
    own = np.load(mine / "neighbors.npy")
    assert own.shape == np.load(theirs / "neighbors.npy").shape
    db = VersionedDb(project_of(campaign), read_version(campaign.folder / "db"))
    kept = tmp_path / "kept"
    shutil.copytree(mine, kept)
    shutil.copy(theirs / "neighbors.npy", mine / "neighbors.npy")
    forget_opened()
    with pytest.raises(DataError, match="neighbors.npy.*does not match its checksum"):
        NeighborTable(mine, db.rows)
    for name in ("neighbors.npy", "starts.npy", "table.json"):  # all of the table
        shutil.copy(theirs / name, mine / name)
    with pytest.raises(DataError, match="is of another database"):
        NeighborTable(mine, db.rows, db.version.chunks)
    shutil.rmtree(mine)
    kept.rename(mine)


def test_opening_again_hashes_samples_alone(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)
    monkeypatch.setattr(content, "NUM_SAMPLES", 2)

    def open_all() -> int:
        reading, before = Reading(campaign.folder, campaign.tokenizer), hashed_bytes()
        forget_opened()
        for name, *of in (("tokens",), ("neighbors", "first"), ("neighbors", "second"), ("search",)):
            getattr(reading, name)(*of)
        return hashed_bytes() - before

    first, again = open_all(), open_all()
    opened = [f"{name}.{ending}" for name in ("first", "second") for ending in ("bin", "idx")]
    opened += [name for name in campaign.files if name.endswith((".npy", ".faissindex")) or "train.hdf5" in name]
    assert first > sum(len(campaign.files[name]) for name in opened if "empty" not in name and "again" not in name)
    assert again <= 4 * 64 * len(opened)
    for folder in campaign.folder.rglob(".digests"):
        shutil.rmtree(folder)


def test_a_build_hashes_its_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)
    monkeypatch.setattr(content, "NUM_SAMPLES", 2)
    hashed, hash_file = Counter[str](), content._hash
    monkeypatch.setattr(content, "_hash", lambda path: (hashed.update([path.name]), hash_file(path))[1])
    project = database_of(tmp_path, {"corpus": make_texts(12)})
    for _ in range(2):
        forget_opened()
        open_index(project, read_version(project.folder))
        build(Project(project.folder, project.config), WordEmbedder())
    (index,) = project.folder.glob("index/*/*/added_*.faissindex")
    assert hashed[index.name] == hashed["corpus.bin"] == hashed["corpus.idx"] == hashed["train.hdf5"] == 1
    assert manifest.is_whole(index, manifest.read_manifest(index))


def test_verify_reads_what_samples_miss(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of many blocks, and a disk that changes a bit and nothing else that is known of the file."""
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)
    monkeypatch.setattr(content, "NUM_SAMPLES", 0)
    monkeypatch.setattr(content, "_stamp", lambda path: (path.stat().st_size, path.stat().st_mtime_ns, 0, 0))
    folder = campaign.folder / "db"
    verify_files(project_of(campaign), read_version(folder))
    unnoticed = 0
    for name in ("first.bin", "second.bin", "first.idx", "db/db/merged/train.hdf5", "db/query/*/neighbors.npy"):
        for path in campaign.folder.glob(name):
            found = path.relative_to(campaign.folder).as_posix()
            with campaign.flipped(Flip(found, len(campaign.files[found]) // 2, 1)):
                unnoticed += all(not isinstance(each, GritError) for each in campaign.read(["tokens"]).values())
                forget_opened()
                with pytest.raises(DataError):
                    verify_files(project_of(campaign), read_version(folder))
            forget_opened()
            verify_files(project_of(campaign), read_version(folder))
    assert unnoticed > 3, "the ends alone were compared"
    for digests in campaign.folder.rglob(".digests"):
        shutil.rmtree(digests)


@pytest.fixture
def old(campaign: Campaign) -> Iterator[Path]:
    """The database as an earlier release wrote it: its JSON without checksums."""
    folder = campaign.folder / "db"
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        for entry in values if isinstance(values, list) else [values]:
            entry.pop(CHECKSUM, None)
        path.write_text(json.dumps(values))
    yield folder
    for name, whole in campaign.files.items():
        (campaign.folder / name).write_bytes(whole)


def test_a_database_of_an_earlier_release(campaign: Campaign, old: Path) -> None:
    forget_opened()
    readers = ["settings", "tokens", "neighbors:first", "neighbors:second", "search"]
    assert campaign.read(readers) == {name: campaign.written[name] for name in readers}
    report = inspect_database(old, verify=True)
    without = report["summary"]["without_checksum"]
    assert (
        "config.json" in without and "db/versions/0003.json" in without and not any(".hdf5" in name for name in without)
    )
    assert any("without a checksum, as earlier releases wrote them" in line for line in report_lines(report))


def test_config_json_was_edited(campaign: Campaign) -> None:
    folder = campaign.folder / "db"
    config = project_of(campaign).config
    values = json.loads((folder / "config.json").read_text()) | {"num_neighbors_save": 3}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match='config.json: does not match its own checksum.*remove its line "checksum"'):
        inspect_database(folder)
    del values[CHECKSUM]
    (folder / "config.json").write_text(json.dumps(values))
    inspect_database(folder)
    save_project_config(config, folder)
    assert (folder / "config.json").read_bytes() == campaign.files["db/config.json"]


def test_blocks_read_by_name_are_compared(campaign: Campaign) -> None:
    name = next(name for name in campaign.files if "embeddings" in name)
    path = campaign.folder / name
    assert len(map_dataset(path, "data")) == 128
    with campaign.flipped(Flip(name, len(campaign.files[name]) - 1000, 3)):
        os.utime(path)
        with pytest.raises(DataError, match="does not match its checksum"):
            map_dataset(path, "data")
    assert asdict(read_version(campaign.folder / "db"))["number"] == 3
