"""A build that is compared with what is computed now."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import read_version
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.question_recall import measure_questions
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tasks import TASKS
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
from tests.unit.retrieval.workers import run_together

TEXTS, MORE, OTHER = make_texts(12), make_texts(7, seed=1), make_texts(9, seed=2)


@pytest.fixture
def grown(tmp_path: Path) -> Project:
    """Everything is kept; a file got documents, another file came, a document was removed."""
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer)
    settings = {"index": "IVF2,Flat", "nprobe": 2, "keep_embeddings": True, "valid_fraction": 0.2}
    project = make_project(tmp_path / "db", [prefix], tmp_path, **settings)
    build(project, WordEmbedder())
    embed_chunks(open_vectors(project, Worker(), WordEmbedder()), Worker())
    write_documents(tmp_path / "corpus", TEXTS + MORE, tokenizer)
    other = write_documents(tmp_path / "other", OTHER, tokenizer)
    grown = another(project, data_paths=[prefix, other])
    add_documents(grown, Worker(), WordEmbedder())
    remove_documents(grown, Worker(), "corpus:1")
    query_neighbors(grown, Worker(), WordEmbedder())
    return another(grown)


def test_a_database_that_has_grown(grown: Project, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("what is a file\nwho wrote it\n")
    grown = another(grown, recall_queries=str(tmp_path / "questions.txt"))
    measure_questions(grown, Worker(), WordEmbedder())
    for stage in TASKS:
        counts: list[int] = []
        run_together(
            2,
            lambda worker, stage=stage, counts=counts: counts.append(
                validate(stage, another(grown), worker, WordEmbedder(), 1.0)
            ),
        )
        assert counts[0] == counts[1] and (counts[0] > 0) == (stage not in ("tombstone", "compact")), stage


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        ("db-build", "db/individual/*/*.hdf5"),
        ("db-build", "db/merged/train.hdf5"),
        ("embed", "embeddings/*.hdf5"),
        ("index-train", "index/train_emb/blocks/*.hdf5"),
        ("index-add", "index/*/*/add_codes/*.hdf5"),
        ("add", "db/versions/0002/individual/*/*.hdf5"),
        ("add", "db/versions/0002/train.hdf5"),
        ("add", "index/*/*/add_codes_v0002/*.hdf5"),
        ("add", "index/*/*/added_v0002.faissindex"),
        ("tombstone", "db/versions/*.tombstones.npy"),
        ("query-neighbors", "query/*/neighbors.npy"),
        ("query-neighbors", "query/*/*-*.hdf5"),
    ],
)
def test_damage_is_found(grown: Project, stage: str, pattern: str) -> None:
    for path in grown.folder.glob(pattern):
        place = path.stat().st_size - 9
        if path.suffix == ".hdf5":
            with h5py.File(path) as file:
                place = next(dataset.id.get_offset() for dataset in file.values() if dataset.size)
        whole = path.read_bytes()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError):
        validate(stage, another(grown), Worker(), WordEmbedder(), 1.0)


def test_rows_that_are_no_chunks_are_found_before_there_is_a_version(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "corpus", TEXTS, tokenizer_of(tmp_path))
    project = make_project(tmp_path / "db", [prefix], tmp_path, valid_fraction=0.3)
    build_chunks(project, Worker())
    assert validate("db-build", project, Worker(), None, 1.0) > 0
    for part in ("train", "valid"):
        path = project.merged / f"{part}.hdf5"
        with h5py.File(path, "r+") as file:
            del file.attrs["rows_sha256"]  # by which they would be found sooner
        whole, rows = path.read_bytes(), np.array(ChunkDb(project, part).rows)
        assert len(rows) > 3
        # A number of a row, and two rows that changed places.
        for damaged in (rows[2] ^ np.array([0, 0, 1, 0, 0], np.uint32), rows[1]):
            path.write_bytes(whole.replace(rows[2].tobytes(), damaged.tobytes()))
            with pytest.raises(DataError, match="are no chunks of the documents"):
                validate("db-build", another(project), Worker(), None, 1.0)
        path.write_bytes(whole)


def test_files_that_no_longer_begin_as_they_did(grown: Project, tmp_path: Path) -> None:
    write_documents(tmp_path / "corpus", MORE + TEXTS, grown.tokenizer)
    for stage in ("db-build", "embed", "add"):
        with pytest.raises(DataError, match="no longer begins with the"):
            validate(stage, another(grown), Worker(), WordEmbedder(), 1.0)
    assert read_version(grown.folder).number == 3
