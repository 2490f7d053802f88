"""An index that is spread over several processes finds what one process finds in all of it, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from megatron_grit.data.chunks.project import Project  # noqa: E402
from megatron_grit.data.chunks.versions import read_version  # noqa: E402
from megatron_grit.errors import NumericsError  # noqa: E402
from megatron_grit.retrieval.database.versions import open_index  # noqa: E402
from megatron_grit.retrieval.index.search import Further, SpreadIndex  # noqa: E402
from megatron_grit.retrieval.stages.add import add_documents  # noqa: E402
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors  # noqa: E402
from megatron_grit.retrieval.stages.tombstone import remove_documents  # noqa: E402
from megatron_grit.retrieval.work import Worker, worker  # noqa: E402
from tests.harness.ranks import run_on_ranks  # noqa: E402
from tests.unit.retrieval.databases import (  # noqa: E402
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    validate,
    write_documents,
)

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SETTINGS = {"num_neighbors_query": 6, "num_neighbors_save": 5, "max_overlap": 0.2, "block_size": 30}
"""So few candidates that filters leave too few of most queries, which are then searched again."""


@pytest.fixture(scope="module", params=["Flat", "IVF4,PQ4x4"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three files of a database, one of what was added, and a removed document; texts that repeat give equal scores.
    Two indexed files are asked for, so that the index is searched in two rounds."""
    folder = tmp_path_factory.mktemp("grown")
    tokenizer, texts = tokenizer_of(folder), make_texts(14)
    prefix = write_documents(folder / "corpus", [*texts, *texts[:5]], tokenizer)
    settings: dict[str, Any] = {"index": request.param, "num_shards": 3, "duplicates": "keep", **SETTINGS}
    if request.param != "Flat":
        settings["nprobe"] = 3
    project = build(make_project(folder / "db", [prefix], folder, **settings), WordEmbedder(), query=False)
    other = write_documents(folder / "other", make_texts(6, seed=2), tokenizer)
    grown = another(project, data_paths=[prefix, other])
    add_documents(grown, Worker(), WordEmbedder())
    remove_documents(grown, Worker(), "corpus:3")
    return grown


def tables(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.glob("query/**/*"))
        if path.suffix in (".npy", ".hdf5")
    }


def copy_of(project: Project, folder: Path) -> Project:
    """A database whose neighbors are not searched yet."""
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("query"))
    return Project(folder, project.config)


def query(folder: str, config: Any, group_size: int) -> dict[str, Any]:
    """Search with the index spread, check the blocks, and say what this process held and did."""
    project = another(Project(Path(folder), config), index_placement="spread")
    with worker() as alone:
        this = dataclasses.replace(
            alone,
            group=alone.rank // group_size,
            num_groups=alone.world_size // group_size,
            leads=alone.rank % group_size == 0,
        )
        index = open_index(project, read_version(project.folder), this)
        assert isinstance(index, SpreadIndex)
        searches = []
        search = SpreadIndex.search

        def counted(self: SpreadIndex, vectors: np.ndarray, k: int, further: Further | None = None) -> Any:
            searches.append(k)
            return search(self, vectors, k, further)

        SpreadIndex.search = counted  # type: ignore[method-assign]
        query_neighbors(project, this, WordEmbedder())
        num_searches, deepest = len(searches), max(searches, default=0)
        compared = validate("query-neighbors", project, this, WordEmbedder(), 1.0)
        return {
            "vectors": [len(shard) for shard in index.shards],
            "all": len(index),
            "searches": num_searches,
            "deepest": deepest,
            "compared": compared,
        }


@pytest.mark.parametrize(("num_processes", "group_size"), [(2, 1), (3, 1), (4, 2)])
def test_spread_finds_what_one_process_finds(
    grown: Project, num_processes: int, group_size: int, tmp_path: Path
) -> None:
    mapped, spread = copy_of(grown, tmp_path / "mapped"), copy_of(grown, tmp_path / "spread")
    query_neighbors(mapped, Worker(), WordEmbedder())
    (tmp_path / "results").mkdir()
    found = run_on_ranks(query, num_processes, tmp_path / "results", str(spread.folder), spread.config, group_size)
    assert tables(mapped.folder) == tables(spread.folder)
    assert len([name for name in tables(spread.folder) if name.endswith("neighbors.npy")]) == 2

    lengths = sorted(len(shard) for shard in open_index(grown, read_version(grown.folder)).shards)
    assert sorted(length for process in found for length in process["vectors"]) == lengths, "a file is held twice"
    assert all(0 < sum(process["vectors"]) < process["all"] == sum(lengths) for process in found)
    assert len({process["searches"] for process in found}) > 1, "no process waited for another one"
    assert all(process["deepest"] > SETTINGS["num_neighbors_query"] for process in found)
    assert all(process["compared"] > 2 for process in found)


class FailingEmbedder(WordEmbedder):
    """Fails at its third block."""

    def embed(self, texts: Sequence[str], side: str = "passage") -> np.ndarray:
        if side == "query" and self.num_queries > 30:
            raise NumericsError("1 vectors are not finite")
        return super().embed(texts, side)


def fail_on_one(folder: str, config: Any) -> None:
    with worker() as this:
        embedder = FailingEmbedder() if this.rank == 1 else WordEmbedder()
        query_neighbors(another(Project(Path(folder), config), index_placement="spread"), this, embedder)


def test_a_process_that_fails_ends_those_that_search_with_it(grown: Project, tmp_path: Path) -> None:
    spread = copy_of(grown, tmp_path / "spread")
    with pytest.raises(AssertionError) as raised:
        run_on_ranks(fail_on_one, 2, tmp_path, str(spread.folder), spread.config)
    assert "JobError: rank 1 ended: NumericsError: 1 vectors are not finite" in str(raised.value)
