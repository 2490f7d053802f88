"""How thoroughly an index is searched where its codes can, and where they cannot, reach the wanted recall."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")

from megatron_grit.config.database.schema import RetroDbConfig  # noqa: E402
from megatron_grit.data.chunks.project import Project  # noqa: E402
from megatron_grit.errors import DataError  # noqa: E402
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search  # noqa: E402
from megatron_grit.retrieval.index.recall import (  # noqa: E402
    RECALL_AT,
    SearchSettings,
    choose_nprobe,
    choose_search,
    read_search,  # noqa: E402
    recall_of,
    without_own,
)
from megatron_grit.retrieval.index.search import ShardedIndex  # noqa: E402
from megatron_grit.retrieval.stages.index_add import add_to_index  # noqa: E402
from megatron_grit.retrieval.work import Worker  # noqa: E402
from tests.unit.retrieval.databases import (  # noqa: E402
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)


def curve(ceiling: float, half: float, tried: list[int] | None = None) -> Callable[[int], np.ndarray]:
    """Recall that is half the ceiling at ``half`` lists, of 2,000 queries that differ."""
    spread = np.random.default_rng(0).uniform(-0.05, 0.05, 2000)

    def recalls(nprobe: int) -> np.ndarray:
        if tried is not None:
            tried.append(nprobe)
        return ceiling * nprobe / (nprobe + half) + (spread - spread.mean()) * (nprobe < 10**9)

    return recalls


@pytest.mark.parametrize("num_lists", [64, 1024, 2**22])
def test_out_of_reach_the_search_is_nearly_the_best_and_not_the_longest(num_lists: int) -> None:
    tried: list[int] = []
    recalls = curve(0.84, 2.0, tried)
    nprobe, most = choose_nprobe(recalls, 0.95, num_lists)
    assert most is not None
    assert max(tried) <= min(num_lists, 1024), "all lists of a large index were visited"
    assert len(tried) == len(set(tried)), "a search was made twice"
    best = recalls(num_lists).mean()
    assert best - 0.02 <= recalls(nprobe).mean() <= best
    assert recalls(nprobe // 2).mean() < most[1] - 0.01


@pytest.mark.parametrize("half", [0.5, 3.0, 40.0, 3000.0])
def test_what_can_be_reached_is_reached(half: float) -> None:
    """However slowly recall begins to grow: the rule must not give up."""
    for wanted in (0.5, 0.9, 0.95):
        recalls = curve(0.99, half)
        nprobe, most = choose_nprobe(recalls, wanted, 2**22)
        assert most is None
        assert recalls(nprobe).mean() >= wanted > recalls(nprobe - 1).mean() - 0.003


def test_a_hair_above_the_wanted_recall_is_no_reason_for_less() -> None:
    """Within a standard error of the wanted recall, which is not reached surely: still not below it."""
    rng = np.random.default_rng(1)
    noise = rng.uniform(-0.3, 0.3, 200)

    def recalls(nprobe: int) -> np.ndarray:
        return 0.952 - 0.4 / nprobe**2 + noise - noise.mean()

    nprobe, most = choose_nprobe(recalls, 0.95, 64)
    assert most is None and recalls(nprobe).mean() >= 0.95 > recalls(nprobe // 2).mean()


def test_codes_too_coarse_for_the_wanted_recall(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    random = np.random.default_rng(0)
    centres = random.standard_normal((200, 16))
    vectors = (centres[random.integers(0, 200, 20_000)] + 0.6 * random.standard_normal((20_000, 16))).astype(np.float32)
    made = VectorIndex.train("IVF128,PQ8x6", "l2", vectors[:8000])
    made.add_codes(made.encode(vectors), np.arange(len(vectors)))
    index = ShardedIndex([made])
    ids = random.choice(len(vectors), 800, replace=False)
    exact = without_own(exact_search(vectors[ids], vectors, RECALL_AT + 1, "l2")[1], ids, RECALL_AT)
    settings = choose_search(index, RetroDbConfig(recall=0.95), vectors[ids], ids, exact)

    def recall(nprobe: int) -> float:
        index.set_search(nprobe, None)
        return float(recall_of(without_own(index.search(vectors[ids], RECALL_AT + 1)[1], ids, RECALL_AT), exact).mean())

    most, chosen = recall(128), recall(settings.nprobe or 0)
    print(
        f"recall at most {most:.4f}, with the chosen nprobe {settings.nprobe} {chosen:.4f}, said {settings.recall:.4f}"
    )
    assert settings.nprobe is not None and settings.nprobe < 64
    assert most - 0.02 <= chosen < 0.95
    assert settings.recall_low <= chosen <= settings.recall_high
    assert settings.most_recall == pytest.approx(most, abs=0.03)
    assert "recall 0.95 is out of reach" in caplog.text and f"nprobe is {settings.nprobe}" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '"x"', '{"nprobe": 1}', "nprobe", "recall", "recall_low", "num_queries"]
)
def test_damaged_settings_are_one_line(tmp_path: Path, content: str) -> None:
    path, whole = (
        tmp_path / "search.json",
        dataclasses.asdict(
            SearchSettings(
                nprobe=4, ef_search=None, recall=1, recall_low=0.9, recall_high=1.0, recall_at=10, num_queries=7
            )
        ),
    )
    path.write_text(json.dumps(whole))
    assert read_search(path).nprobe == 4
    path.write_text(json.dumps(whole | {content: "much"}) if content in whole else content)
    with pytest.raises(DataError, match=r"search.json: cannot be read .*; delete it and run --tasks index-add"):
        read_search(path)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("database")
    prefix = write_documents(folder / "corpus", make_texts(10), tokenizer_of(folder))
    return build(make_project(folder / "db", [prefix], folder, index="PCA8,IVF2,Flat"), WordEmbedder(), query=False)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"nprobe": 1}', None])
def test_a_damaged_search_is_measured_again(database: Project, content: str | None) -> None:
    (path,) = database.folder.glob("index/**/search.json")
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_text(content)
    add_to_index(another(database), Worker(), WordEmbedder())
    assert path.read_bytes() == whole


def test_an_index_that_learns_without_lists_is_trained(tmp_path: Path) -> None:
    """ntrain was 0 for it."""
    prefix = write_documents(tmp_path / "corpus", make_texts(10), tokenizer_of(tmp_path))
    project = build(make_project(tmp_path / "db", [prefix], tmp_path, index="PCA8,Flat"), WordEmbedder(), query=False)
    (path,) = project.folder.glob("index/**/search.json")
    assert read_search(path).recall > 0.3
