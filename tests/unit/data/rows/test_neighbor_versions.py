"""Which version of a database a run reads: the newest that all of its sources have neighbors in."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.rows import version_follower
from megatron_grit.data.rows.held_out import HeldOutLoader
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.prospects import neighbor_errors
from megatron_grit.data.rows.version_follower import VersionFollower
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.digest import count_hashed
from tests.unit.retrieval.databases import WordEmbedder, another, database_of, make_texts

pytest.importorskip("faiss")

AHEAD = 2


def run_of(project: Project) -> RunConfig:
    """A run that reads the newest version."""
    config = RunConfig()
    config.data.retro_project, config.data.retro_version = str(project.folder), "newest"
    config.data.over_long, config.data.tokens_per_row, config.data.prefetch_steps = "split", 50, AHEAD
    config.training.objective, config.training.generative_batch_size = "generative", 4
    config.model.retro = RetroConfig(num_neighbors=2, layers=[0])
    return resolve_retro_project(config, {})


def test_a_version_is_read_once_its_neighbors_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    project = database_of(tmp_path, {"a": make_texts(12)})
    remove_documents(project, Worker(), "a:0")  # version 2, without neighbors
    config = run_of(project)
    loader = GritDataLoader(config, project.tokenizer)
    (first,) = loader.versions_read()
    assert first["version"] == 1 and first["identity"] and caplog.text.count("is passed over") == 1
    context: Any = SimpleNamespace(rank=0)
    follower = VersionFollower(config, context, loader)
    follower.found = 1
    for _ in range(2):
        follower.look()
    assert follower.found == 1 and caplog.text.count("is not read yet") == 1
    follower._told.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "open_version", lambda number: [][number])
        follower.look()
    assert follower.found == 1 and "is not read yet: IndexError" in caplog.text
    query_neighbors(project, Worker(), WordEmbedder())
    follower.look()
    assert follower.found == 2
    config.training.steps = 1 + AHEAD + 1
    follower.take(2, 1)
    assert len(loader.versions_read()) == 1 and "from step" not in caplog.text, "no step of the run reads it"
    rows = {step: [row.neighbors for row in loader.batch(step).rows] for step in range(6)}
    trained = 1
    assert loader.change_version(2, trained) == trained + AHEAD + 1
    assert [change["version"] for change in loader.versions_read()] == [1, 2]
    for step in (*range(6), 0):  # in whatever order
        same = all(
            a is not None and b is not None and a.tokens_1N.equal(b.tokens_1N)
            for a, b in zip(rows[step], [row.neighbors for row in loader.batch(step).rows], strict=True)
        )
        assert same == (step < trained + AHEAD + 1), step


def test_held_out_texts_are_read_with_the_version_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One version for texts that are trained on and for held-out ones: the newest that both have neighbors in."""
    caplog.set_level("INFO")
    project = database_of(tmp_path, {"a": make_texts(12)}, {"held": make_texts(6, seed=3)})
    remove_documents(project, Worker(), "a:0")
    prefix, held_out = project.config.query_paths
    query_neighbors(another(project, query_paths=[prefix]), Worker(), WordEmbedder())  # version 2, of one file
    config = run_of(project)
    config.data.generative, config.data.valid = [prefix], [held_out]
    loader, held = (kind(config, project.tokenizer) for kind in (GritDataLoader, HeldOutLoader))
    assert [each.versions_read()[0]["version"] for each in (loader, held)] == [2, 1]
    assert list(neighbor_errors(config, project.tokenizer)) == []
    monkeypatch.setattr(version_follower, "from_rank_0", lambda number, context: number)
    follower = VersionFollower(config, cast(Any, SimpleNamespace(rank=0)), loader, [held])
    caplog.clear()
    follower.start(None)
    assert [change["version"] for change in loader.versions_read()] == [1]
    assert f"version 2 of {project.folder} is passed over: {held_out}: has no neighbors" in caplog.text
    follower.look()
    assert follower.newest() == 1
    query_neighbors(project, Worker(), WordEmbedder())
    follower.look()
    assert follower.newest() == 2
    follower.close()
    follower.take(2, num_trained=1)
    changed = 1 + AHEAD + 1
    for step in (changed - 1, changed):
        held.read_as(loader, step)
        assert held.versions_read()[0]["version"] == (2 if step == changed else 1)


def test_no_version_that_all_can_read_is_refused(tmp_path: Path) -> None:
    project = database_of(tmp_path, {"a": make_texts(12)}, {"held": make_texts(6, seed=3)}, query=False)
    prefix, held_out = project.config.query_paths
    query_neighbors(another(project, query_paths=[held_out]), Worker(), WordEmbedder())
    remove_documents(project, Worker(), "a:0")
    query_neighbors(another(project, query_paths=[prefix]), Worker(), WordEmbedder())
    config = run_of(project)
    config.data.generative, config.data.valid = [prefix], [held_out]
    (error,) = neighbor_errors(config, project.tokenizer)
    assert f"{held_out}: has no neighbors in version 2" in str(error)


def test_a_comparison_with_checksums_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that opens a version may be hashing a large file."""
    project = database_of(tmp_path, {"a": make_texts(12)})
    config = run_of(project)
    loader, hashing = GritDataLoader(config, project.tokenizer), threading.Event()
    remove_documents(project, Worker(), "a:0")

    def open_version(number: int) -> str:
        while True:
            count_hashed(1)
            hashing.set()
            time.sleep(0.001)

    monkeypatch.setattr(loader, "open_version", open_version)
    monkeypatch.setattr(version_follower, "SECONDS", 0.001)
    follower = VersionFollower(config, cast(Any, SimpleNamespace(rank=0)), loader)
    follower.newest()
    assert hashing.wait(60)
    closing = threading.Thread(target=follower.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
