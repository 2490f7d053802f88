"""Chunks read by id: mapped, and refused where the table is not the one that was built."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_grit.data.chunks.chunk_db import ChunkDb, map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.errors import DataError
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import CHUNK, make_project, make_texts, tokenizer_of, write_documents


@pytest.fixture
def project(tmp_path: Path) -> Project:
    prefix = write_documents(tmp_path / "a", make_texts(6), tokenizer_of(tmp_path))
    project = make_project(tmp_path / "db", [prefix], tmp_path, duplicates="keep")
    build_chunks(project, Worker())
    return project


def test_tokens_texts_and_continuations(project: Project) -> None:
    db, eod = ChunkDb(project), project.tokenizer.eos_id
    file = project.file(0)
    assert isinstance(db.rows, np.memmap)
    for chunk in range(len(db)):
        _, document, start, stop, _ = db.rows[chunk].tolist()
        whole = file.read(*file.sequences(document)).tolist()
        assert whole.pop() == eod
        assert db.tokens(chunk).tolist() == whole[start:stop]
        assert db.tokens(chunk, num_tokens=2 * CHUNK).tolist() == whole[start : start + 2 * CHUNK]
        assert db.texts([chunk]) == [project.tokenizer.decode(whole[start:stop])]
        assert db.describe(chunk) == f"a#{document}:{start}-{stop}"
    for chunk in (-1, len(db)):
        with pytest.raises(IndexError):
            db.tokens(chunk)


def test_many_chunks_are_read_at_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    prefixes = [write_documents(tmp_path / name, make_texts(9, seed), tokenizer) for seed, name in enumerate("ab")]
    project = make_project(tmp_path / "db", prefixes, tmp_path, duplicates="keep")
    build_chunks(project, Worker())
    db = ChunkDb(project)
    ids = np.random.default_rng(0).integers(0, len(db), (40, 3))
    ids[ids % 7 == 0] = -1
    for length in (CHUNK, 2 * CHUNK, 5):
        tokens, mask = db.read_tokens(ids, None if length == 2 * CHUNK else length, pad_id=3)
        assert tokens.shape == mask.shape == (40, 3, length) and tokens.dtype == np.int32
        for place in np.ndindex(ids.shape):
            chunk = int(ids[place])
            expected = db.tokens(chunk, num_tokens=length).tolist() if chunk >= 0 else []
            assert tokens[place][mask[place]].tolist() == expected, "as one at a time"
            assert (tokens[place][~mask[place]] == 3).all() and mask[place][: len(expected)].all()
    assert mask.any() and not mask.all()
    empty, _ = db.read_tokens(np.empty((0, 2), np.int64))
    assert empty.shape == (0, 2, 2 * CHUNK)
    with pytest.raises(IndexError):
        db.read_tokens(np.array([len(db)]))


def test_chunks_beyond_their_document_are_refused(project: Project) -> None:
    with h5py.File(project.merged / "train.hdf5", "r+") as file:
        row = file["chunks"][2]
        row[3] = 60_000
        file["chunks"][2] = row
        del file.attrs["rows_sha256"]  # a table that was written with it
    with pytest.raises(DataError, match="beyond their documents' ends"):
        ChunkDb(project).read_tokens(np.array([2]))


def test_a_table_of_another_build_is_refused(project: Project) -> None:
    path = project.merged / "train.hdf5"
    with h5py.File(path) as file:
        rows = file["chunks"][()]
    with h5py.File(path, "w") as file:
        file["chunks"] = rows[:-1]
    with pytest.raises(DataError, match=f"holds {len(rows) - 1} chunks, .* says {len(rows)}; run --tasks db-build"):
        ChunkDb(project)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:900])])
def test_damaged_tables_are_refused(project: Project, damage: object) -> None:
    damage(project.merged / "train.hdf5")  # type: ignore[operator]
    with pytest.raises(DataError, match="train.hdf5"):
        ChunkDb(project)


def test_what_is_not_in_one_piece_is_not_mapped(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("pieces", data=np.arange(10), chunks=(3,))
        file.create_dataset("empty", shape=(0, 4), dtype="u4")
    with pytest.raises(DataError, match="does not hold pieces in one piece"):
        map_dataset(tmp_path / "a.hdf5", "pieces")
    with pytest.raises(DataError, match="cannot be read"):
        map_dataset(tmp_path / "a.hdf5", "none")
    assert map_dataset(tmp_path / "a.hdf5", "empty").shape == (0, 4)
