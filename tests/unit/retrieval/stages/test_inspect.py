"""What a database is said to hold is what it holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.database.schema import save_project_config
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.database.verification import FOLDERS
from megatron_grit.retrieval.stages import inspect
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.inspect import Questions, inspect_database, report_lines
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tasks import TASKS
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    CHUNK,
    WordEmbedder,
    another,
    database_of,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)

TEXTS = make_texts(10)


def ask(folder: Path, *, version: int | None = None, verify: bool = False, **asked: Any) -> dict[str, Any]:
    return inspect_database(folder, Questions(**asked), version=version, verify=verify)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = database_of(tmp_path, {"corpus": TEXTS}, embedder="words")
    monkeypatch.setattr(inspect, "project_embedder", lambda config, **_: WordEmbedder())
    return project


def test_summary(project: Project) -> None:
    db = VersionedDb(project, read_version(project.folder))
    summary = ask(project.folder)["summary"]
    assert (summary["version"], summary["num_chunks"], summary["num_removed_chunks"]) == (1, len(db), 0)
    assert summary["datasets"][0]["num_documents"] == 10 and summary["datasets"][0]["num_chunks"] == len(db)
    assert summary["index"]["factory"] == "Flat" and summary["index"]["num_vectors"] == len(db)
    assert summary["index"]["search"]["recall"] == 1.0
    assert summary["tables"][0]["num_places"] == NeighborTable(*tables_of(project).values()).manifest.num_places

    remove_documents(project, Worker(), "corpus:2")
    removed = ask(project.folder)["summary"]
    assert removed["num_removed_chunks"] == (db.rows[:, 1] == 2).sum() > 0
    assert ask(project.folder, version=1)["summary"]["num_removed_chunks"] == 0
    assert any(line.startswith("version 2: ") for line in report_lines(ask(project.folder)))


def test_files_of_the_user_are_not_verified(project: Project) -> None:
    """As the documents and the model that examples/build_retro_db.sh keeps in the directory with SCALE=tiny."""
    mine = project.folder / "data"
    (mine / "model").mkdir(parents=True)
    for name, content in {"model/config.json": "{}", "broken.json": "{", "x.hdf5": "no", "x.faissindex": "no"}.items():
        (mine / name).write_text(content)
    shutil.copy(f"{project.config.data_paths[0]}.json", mine)
    summary = ask(project.folder, verify=True)["summary"]
    assert summary["verified"] and not summary["without_checksum"]
    for task in TASKS.values():
        assert {name.split("/")[0] for name in (*task.makes, task.trace) if name} <= set(FOLDERS), task.name
    stranger = project.folder / "index" / "stranger.json"
    stranger.write_text("{}")
    assert ask(project.folder, verify=True)["summary"]["without_checksum"] == ["index/stranger.json"]


def test_chunks_and_documents(project: Project) -> None:
    db = VersionedDb(project, read_version(project.folder))
    report = ask(project.folder, documents=["corpus:4"], chunks=[0])
    (document,) = report["documents"]
    assert document["text"].strip() == TEXTS[4]
    assert document["chunks"] == [i for i in range(len(db)) if db.rows[i, 1] == 4]
    chunks = ask(project.folder, chunks=document["chunks"])["chunks"]
    assert [chunk["start"] for chunk in chunks] == sorted(chunk["start"] for chunk in chunks)
    for chunk in chunks:
        assert chunk["text"].strip() in TEXTS[4] and chunk["continuation"].strip() in TEXTS[4]
        assert bool(chunk["continuation"]) == (chunk["stop"] < db.project.file(0).lengths[4] - 1)
    assert "summary" not in report


def test_neighbors(project: Project) -> None:
    table = NeighborTable(*tables_of(project).values())
    (found,) = ask(project.folder, neighbors=[f"corpus:3:{CHUNK}"], k=4)["neighbors"]
    assert [chunk["chunk"] for chunk in found["neighbors"]] == table.read([(3, CHUNK)], [(0, 3)], 4)[0].tolist()
    assert found["text"].strip() in TEXTS[3]
    lines = list(report_lines({"neighbors": [found]}))
    assert any(line.startswith("1. chunk ") for line in lines)


def test_search(project: Project) -> None:
    db = VersionedDb(project, read_version(project.folder))
    text = db.texts([5])[0]
    (found,) = ask(project.folder, searches=[text], k=2)["searches"]
    assert found["hits"][0]["chunk"] == 5 and found["hits"][0]["score"] == pytest.approx(0, abs=1e-4)
    remove_documents(project, Worker(), f"corpus:{db.rows[5, 1]}")
    (found,) = ask(project.folder, searches=[text], k=2)["searches"]
    assert all(hit["document"] != db.rows[5, 1] for hit in found["hits"]) and len(found["hits"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": [9999]}, "chunk 9999: the database has chunks 0 to"),
        ({"documents": ["corpus:99"]}, "documents 0 to 9"),
        ({"neighbors": ["corpus:3:5"]}, "no chunk at token 5; chunks begin at multiples of 8"),
        ({"neighbors": ["nothing:3:0"]}, "there are tables of"),
        ({"neighbors": ["corpus:²:0"]}, "give PREFIX:DOCUMENT:OFFSET"),
        ({"neighbors": ["corpus:3:" + "9" * 30]}, "give PREFIX:DOCUMENT:OFFSET"),
        ({"documents": ["corpus:²"]}, "document 'corpus:²': corpus has documents 0 to 9"),
        ({"documents": ["corpus:1,corpus:2"]}, "names 2 documents"),
        ({"chunks": [0], "k": 0}, "num must be at least 1"),
        ({"chunks": [0], "k": -1}, "num must be at least 1"),
    ],
)
def test_what_is_not_there(project: Project, options: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(project.folder, **options)


def test_verify_reads_every_file(project: Project) -> None:
    assert ask(project.folder, verify=True)["summary"]["verified"]
    for pattern in ("db/merged/train.hdf5", "query/*/neighbors.npy", "index/**/added_*.faissindex"):
        (path,) = project.folder.glob(pattern)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for verify in (False, True):
            with pytest.raises(DataError, match="was changed|does not match its checksum"):
                ask(project.folder, verify=verify)
        path.write_bytes(whole)


def test_a_database_that_has_grown(project: Project, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "other", make_texts(5, seed=3), project.tokenizer)
    grown = another(project, data_paths=[*project.config.data_paths, other])
    add_documents(grown, Worker(), WordEmbedder())
    save_project_config(grown.config, grown.folder)
    query_neighbors(grown, Worker(), WordEmbedder())
    report = ask(project.folder, documents=["other:2"], neighbors=["corpus:3:0"], verify=True, k=2)
    summary, db = report["summary"], VersionedDb(grown, read_version(grown.folder))
    old = [segment.num_chunks for segment in db.version.segments][0]
    assert [dataset["num_chunks"] for dataset in summary["datasets"]] == [old, len(db) - old]
    assert report["documents"][0]["chunks"] == [n for n, row in enumerate(db.rows[:].tolist()) if row[:2] == [1, 2]]
    assert len(list(report_lines(report))) > 10 and report["neighbors"][0]["version"] == 2
    # An earlier version has tables of its own, and neighbors of its own.
    (found,) = ask(project.folder, version=1, neighbors=["corpus:3:0"], k=5)["neighbors"]
    assert found["version"] == 1 and all(chunk["chunk"] < old for chunk in found["neighbors"])
    with pytest.raises(ConfigError, match="up to version 1 there are tables of"):
        ask(project.folder, version=1, neighbors=["other:0:0"])


def test_a_database_without_an_index(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer_of(tmp_path))
    project = make_project(tmp_path / "db", [prefix], tmp_path)
    save_project_config(project.config, project.folder)
    with pytest.raises(DataError, match="run --tasks db-build"):
        ask(project.folder)
    build_chunks(project, Worker())
    db = ChunkDb(project)
    report = ask(project.folder, chunks=[3], documents=["corpus:4"], verify=True)
    summary = report["summary"]
    assert (summary["version"], summary["index"], summary["num_chunks"]) == (None, None, len(db))
    assert summary["datasets"][0]["num_chunks"] == summary["built"]["datasets"][0]["train"] == len(db)
    assert report["chunks"][0]["text"] == db.texts([3])[0] and not report["chunks"][0]["removed"]
    assert report["documents"][0]["chunks"] == [n for n, row in enumerate(db.rows.tolist()) if row[1] == 4]
    lines = list(report_lines(report))
    assert any("no index yet" in line for line in lines) and any("exact duplicates" in line for line in lines)
    for options in ({"searches": ["a"]}, {"neighbors": ["corpus:3:0"]}):
        with pytest.raises(ConfigError, match="no index yet|run --tasks query-neighbors"):
            ask(project.folder, **options)
    with pytest.raises(DataError, match="versions that are there: none"):
        ask(project.folder, version=1)
    path = project.merged / "train.hdf5"
    whole = path.read_bytes()
    place = whole.index(db.rows[7].tobytes())
    for offset in range(0, 20, 4):  # a number of each column
        path.write_bytes(whole[: place + offset] + bytes([whole[place + offset] ^ 2]) + whole[place + offset + 1 :])
        with pytest.raises(DataError, match="does not match its checksum"):
            ask(project.folder, verify=True)


@pytest.mark.parametrize("name", ["index/*/*/search.json", "db/report.json", "query/*/table.json"])
@pytest.mark.parametrize("content", ["", "null", "[]", "{}"])
def test_damaged_files_are_named(project: Project, name: str, content: str) -> None:
    (path,) = project.folder.glob(name)
    path.write_text(content)
    with pytest.raises(DataError, match="cannot be read") as error:
        ask(project.folder)
    assert path.name in str(error.value)


def test_command(project: Project, repository: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(repository / "tools" / "retro" / "inspect_db.py"), "--project-dir"]
    run = subprocess.run([*tool, str(project.folder), "--json"], capture_output=True, text=True, timeout=120)
    assert json.loads(run.stdout)["summary"]["version"] == 1
    nowhere = subprocess.run([*tool, str(tmp_path / "nowhere")], capture_output=True, text=True, timeout=120)
    assert nowhere.returncode == 2 and "is no project directory" in nowhere.stderr
