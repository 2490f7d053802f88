"""The lists of an index, trained by several processes, are those that one process trains, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss")

from megatron_grit.data.chunks.project import Project  # noqa: E402
from megatron_grit.retrieval.index import kmeans, threads  # noqa: E402
from megatron_grit.retrieval.stages import index_train  # noqa: E402
from megatron_grit.retrieval.stages.db_build import build_chunks  # noqa: E402
from megatron_grit.retrieval.work import Worker, worker  # noqa: E402
from tests.harness.ranks import run_on_ranks  # noqa: E402
from tests.unit.retrieval.databases import (  # noqa: E402
    WordEmbedder,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train(folder: str, config: Any, rows_of_part: int) -> int:
    """Train as if lists were many. Returns how many vectors this process compared in an iteration."""
    nearest, compared = index_train.nearest_centres, []

    def counting(vectors: Any, *options: Any, **named: Any) -> Any:
        compared.append(len(vectors))
        return nearest(vectors, *options, **named)

    with pytest.MonkeyPatch.context() as patch, worker() as this:
        patch.setattr(index_train, "nearest_centres", counting)
        patch.setattr(index_train, "SHARED_LISTS", 8)
        for module in (threads, kmeans):
            patch.setattr(module, "ROWS_OF_PART", rows_of_part)
        index_train.train_index(Project(Path(folder), config), this, WordEmbedder())
    assert len(compared) == 10 and len(set(compared)) == 1
    return compared[0]


@pytest.mark.parametrize("index", ["OPQ4_8,IVF8_HNSW4,PQ4x4", "IVF40,Flat"])
def test_processes_train_what_one_trains(tmp_path: Path, index: str) -> None:
    """With shares of unlike sizes, and lists of which not every process has a vector."""
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "corpus", make_texts(40), tokenizer)
    project = make_project(tmp_path / "db", [prefix], tmp_path, index=index)
    build_chunks(project, Worker())
    count = train(str(project.folder), project.config, 32)
    (path,) = project.folder.glob("index/*/*/empty_*.faissindex")
    content = path.read_bytes()
    for num_processes in (2, 3):
        path.unlink()
        folder = tmp_path / f"ranks{num_processes}"
        folder.mkdir()
        shares = run_on_ranks(train, num_processes, folder, str(project.folder), project.config, 32)
        assert sum(shares) == count and len(set(shares)) > 1
        assert path.read_bytes() == content
