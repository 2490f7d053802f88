"""Merged tables: what is left out, what is kept for validation, and the report of both."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_grit.compat import install_command
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.cuts import is_validation
from megatron_grit.retrieval.dedup import duplicates, keys
from megatron_grit.retrieval.stages.db_build import COUNTS, build_chunks
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import CHUNK, make_project, make_texts, tokenizer_of, write_documents
from tests.unit.retrieval.workers import run_together


def project_of(folder: Path, *corpora: list[str], **settings: object) -> Project:
    tokenizer = tokenizer_of(folder)
    paths = [write_documents(folder / f"corpus{n}", texts, tokenizer) for n, texts in enumerate(corpora)]
    return make_project(folder / "db", paths, folder, **settings)


def report_of(project: Project) -> list[dict[str, int]]:
    return json.loads((project.folder / "db" / "report.json").read_text())["datasets"]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def plain_chunks(project: Project) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """Dataset, document, first token and tokens of all chunks that are not empty, by a plain loop."""
    eod, out = project.tokenizer.eos_id, []
    for number in range(len(project.config.data_paths)):
        file = project.file(number)
        for document in range(file.num_documents):
            tokens = file.read(*file.sequences(document)).tolist()
            tokens = tokens[:-1] if tokens and tokens[-1] == eod else tokens
            for start in range(0, len(tokens), CHUNK):
                out.append((number, document, start, tuple(tokens[start : start + CHUNK])))
    return out


def test_equal_chunks_are_kept_once(tmp_path: Path) -> None:
    texts = make_texts(20)
    project = project_of(tmp_path, texts, texts[5:10] + make_texts(5, seed=3))
    infos = build_chunks(project, Worker())
    seen, wanted = set(), []
    for chunk in plain_chunks(project):
        if chunk[3] not in seen:
            seen.add(chunk[3])
            wanted.append(chunk)
    db = ChunkDb(project)
    found = [(*row[:3].tolist(), tuple(db.tokens(number).tolist())) for number, row in enumerate(np.asarray(db.rows))]
    assert found == wanted
    assert sum(info.n_chunks_duplicate for info in infos) == len(plain_chunks(project)) - len(wanted)
    counts = report_of(project)
    assert counts[1]["exact_duplicates"] == infos[1].n_chunks_duplicate > 0
    for count, number in zip(counts, range(2), strict=True):
        assert sum(count[name] for name in COUNTS) == sum(chunk[0] == number for chunk in plain_chunks(project))


@pytest.mark.parametrize("mode", ["exact", "near"])
def test_neither_memory_nor_processes_change_what_is_built(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(20)
    settings = {"duplicates": mode, "near_threshold": 0.6}
    once = project_of(tmp_path / "a", texts, texts[:7], **settings)
    build_chunks(once, Worker())
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 60)
    again = project_of(tmp_path / "b", texts, texts[:7], **settings)
    run_together(2, lambda worker: build_chunks(again, worker) and None)
    assert sum(count[f"{mode}_duplicates"] for count in report_of(once)) > 3
    found, wanted = (content_of(project.folder / "db") for project in (again, once))
    # Of smaller parts there are more, with the same keys.
    found, wanted = ({n: c for n, c in each.items() if not n.startswith("keys/")} for each in (found, wanted))
    assert found.keys() == wanted.keys() and not any("duplicates" in name for name in found)
    # The report and the list of datasets name the files that the database was made of.
    different = {name for name in found if found[name] != wanted[name]}
    assert different <= {"report.json", "indexed_dataset_infos.json"}
    assert report_of(again)[0]["train"] == report_of(once)[0]["train"]


def test_a_merge_that_was_killed_finds_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_texts(20)
    settings = {"duplicates": "near", "near_threshold": 0.6}
    straight = project_of(tmp_path / "a", texts, texts[:7], **settings)
    build_chunks(straight, Worker())
    project = project_of(tmp_path / "b", texts, texts[:7], **settings)
    folder = project.folder / "db" / "duplicates"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "megatron_grit.retrieval.stages.db_build.write_sealed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        build_chunks(project, Worker())
    assert any(folder.rglob("*.hdf5"))
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "find_pairs", None)
        build_chunks(project, Worker())
    assert not folder.exists()
    assert np.array_equal(ChunkDb(project).rows, ChunkDb(straight).rows)
    # Killed before the last folder was removed.
    folder.mkdir()
    build_chunks(project, Worker())
    assert not folder.exists()


def test_near_duplicates_need_datasketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=rf"duplicates near needs datasketch: {re.escape(install_command('retro'))}"):
        build_chunks(project_of(tmp_path, make_texts(3), duplicates="near"), Worker())


def test_similar_chunks_are_left_out_and_shown(tmp_path: Path) -> None:
    text = "The parser opens a file and two lists and the header and every byte and a string and the table."
    texts = [text, text.replace("table", "record"), make_texts(1, seed=9)[0]]
    project = project_of(tmp_path, texts, duplicates="near", near_threshold=0.6, chunk_length=64)
    infos = build_chunks(project, Worker())
    assert infos[0].n_chunks_duplicate == report_of(project)[0]["near_duplicates"] == 1
    (example,) = json.loads((project.folder / "db" / "report.json").read_text())["near_duplicates"]
    assert example["kept"].endswith("corpus0#0:0-" + example["kept"].rpartition("-")[2])
    assert "table" in example["kept_text"] and "record" in example["left_out_text"]
    strict = project_of(tmp_path / "strict", texts, duplicates="near", near_threshold=1.0, chunk_length=64)
    assert build_chunks(strict, Worker())[0].n_chunks_duplicate == 0


def test_short_chunks_are_counted(tmp_path: Path) -> None:
    project = project_of(tmp_path, make_texts(30), min_chunk_tokens=4, duplicates="keep")
    (info,) = build_chunks(project, Worker())
    assert report_of(project)[0]["too_short"] == info.n_chunks_invalid > 0
    assert (np.asarray(ChunkDb(project).rows)[:, 4] >= 4).all()


def test_validation_documents_stay_out(tmp_path: Path) -> None:
    project = project_of(tmp_path, make_texts(60), valid_fraction=0.3, duplicates="keep")
    (info,) = build_chunks(project, Worker())
    train, valid = (set(np.asarray(ChunkDb(project, part).rows)[:, 1].tolist()) for part in ("train", "valid"))
    assert not train & valid
    assert train | valid == set(range(60))
    assert 6 <= len(valid) <= 30
    assert info.n_chunks - info.n_chunks_train == len(ChunkDb(project, "valid"))
    assert info.n_docs_train == len(train)


def test_which_documents_are_for_validation_does_not_change_as_they_grow() -> None:
    few, many = (is_validation("a", np.arange(count), 0.25, 7) for count in (100, 10_000))
    assert few.tolist() == many[:100].tolist()
    assert many.mean() == pytest.approx(0.25, abs=0.02)
    assert is_validation("b", np.arange(100), 0.25, 7).tolist() != few.tolist()
    assert not is_validation("a", np.arange(100), 0.0, 7).any()


def test_document_offsets_count_chunks(tmp_path: Path) -> None:
    project = project_of(tmp_path, make_texts(20), make_texts(9, seed=4), valid_fraction=0.2)
    build_chunks(project, Worker())
    rows = np.asarray(ChunkDb(project).rows)
    with h5py.File(project.merged / "train.hdf5") as file:
        offsets, written = file["doc_offsets"][()], file["n_written"][()]
    assert written.tolist() == [len(rows)]
    before = 0
    for dataset, document, end in offsets.tolist():
        assert {tuple(row) for row in rows[before:end, :2].tolist()} <= {(dataset, document)}
        before = end
    assert before == len(rows)


def test_nothing_is_merged_again(tmp_path: Path) -> None:
    project = project_of(tmp_path, make_texts(10))
    build_chunks(project, Worker())
    times = {path: path.stat().st_mtime_ns for path in project.folder.rglob("*.hdf5")}
    build_chunks(project, Worker())
    assert {path: path.stat().st_mtime_ns for path in project.folder.rglob("*.hdf5")} == times
    # Other filters use the same blocks and merge anew.
    other = make_project(project.folder, project.config.data_paths, tmp_path, duplicates="keep")
    build_chunks(other, Worker())
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {project.merged / "train.hdf5", project.merged / "valid.hdf5"}


def test_no_data(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    with pytest.raises(ConfigError, match="data_paths is empty"):
        build_chunks(make_project(tmp_path / "db", [], tmp_path), Worker())
    with pytest.raises(DataError, match="no such indexed file"):
        build_chunks(make_project(tmp_path / "db", [str(tmp_path / "none")], tmp_path), Worker())


def test_no_chunk_is_left(tmp_path: Path) -> None:
    project = project_of(tmp_path, make_texts(3), valid_fraction=0.9999)
    with pytest.raises(DataError, match="no chunk is left"):
        build_chunks(project, Worker())


def test_a_damaged_table_is_made_again_before_there_is_a_version(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "a", make_texts(30), tokenizer)
    project = make_project(tmp_path / "db", [prefix], tmp_path)
    build_chunks(project, Worker())
    path = project.merged / "train.hdf5"
    whole = path.read_bytes()
    rows = ChunkDb(project).rows
    place = whole.index(np.asarray(rows).tobytes()) + 7
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    build_chunks(Project(project.folder, project.config), Worker())
    assert path.read_bytes() == whole


def test_a_table_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project_of(tmp_path, make_texts(3))
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="train.hdf5: cannot be written .* 1,000 are free"):
        build_chunks(project, Worker())
    monkeypatch.undo()
    assert build_chunks(project, Worker())
