"""Which version of a database a run reads: the newest that all of its sources have neighbors in."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.version_follower import VersionFollower
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    WordEmbedder,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)

pytest.importorskip("faiss")

AHEAD = 2


def test_a_version_is_read_once_its_neighbors_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "a", make_texts(12), tokenizer)
    project = build(make_project(tmp_path / "db", [prefix], tmp_path), WordEmbedder())
    (project.folder / "config.json").write_text(json.dumps(asdict(project.config)))
    remove_documents(project, Worker(), "a:0")  # version 2, without neighbors
    config = RunConfig()
    config.data.retro_project, config.data.retro_version = str(project.folder), "newest"
    config.data.over_long, config.data.tokens_per_row, config.data.prefetch_steps = "split", 50, AHEAD
    config.training.objective, config.training.generative_batch_size = "generative", 4
    config.model.retro = RetroConfig(num_neighbors=2, layers=[0])
    config = resolve_retro_project(config, {})
    loader = GritDataLoader(config, tokenizer)
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
