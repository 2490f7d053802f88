"""A project's inputs: found, and known again when they are copied or changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import another, make_project, make_texts, tokenizer_of, write_documents


@pytest.fixture(params=[True, False], ids=["with json", "without json"])
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    prefix = write_documents(tmp_path / "a", make_texts(6), tokenizer_of(tmp_path))
    if not request.param:
        (tmp_path / "a.json").unlink()
    project = make_project(tmp_path / "db", [prefix], tmp_path)
    build_chunks(project, Worker())
    return project


def test_a_copy_is_the_same(project: Project, tmp_path: Path) -> None:
    before = fingerprint(tmp_path / "a")
    for ending in ("bin", "idx"):
        os.utime(tmp_path / f"a.{ending}", ns=(1, 1))
    assert fingerprint(tmp_path / "a") == before
    assert len(project.infos()) == 1


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_change_of_one_byte_is_found(project: Project, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    content = bytearray(path.read_bytes())
    content[-1 if ending == "idx" else 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="has changed since the database was built|not match the checksum in its .json"):
        project.infos()


def test_a_file_that_was_cut_short(project: Project, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="not as long as its .json|has changed since"):
        project.infos()


def test_paths_count_from_the_project_first(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in ("bin", "idx"):
        (project.folder / f"here.{ending}").write_bytes((tmp_path / f"a.{ending}").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert project.resolve("here") == project.folder / "here"
    assert project.resolve("a") == Path("a")
    with pytest.raises(DataError, match="none: no such indexed file"):
        project.resolve("none")


def test_a_tokenizer_is_needed(project: Project) -> None:
    with pytest.raises(ConfigError, match="tokenizer is not set"):
        _ = another(project, tokenizer=None).tokenizer


@pytest.mark.parametrize("content", ["{", '[{"prefix": "a", "unknown": 1}]'])
def test_damaged_infos(project: Project, content: str) -> None:
    project.infos_path.write_text(content)
    with pytest.raises(DataError, match="indexed_dataset_infos.json: cannot be read"):
        project.infos()
    project.infos_path.unlink()
    with pytest.raises(DataError, match="run --tasks db-build"):
        project.infos()
