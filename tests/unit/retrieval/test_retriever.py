"""A database as programs ask it: against a search of all chunks by numpy, under threads, while it grows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import load_project_config, save_project_config
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import read_version
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.lexical import fuse
from megatron_grit.retrieval.retriever import Retriever
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    CHUNK,
    WordEmbedder,
    build,
    database_of,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)

pytest.importorskip("faiss")
pytest.importorskip("bm25s")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return database_of(tmp_path, {name: make_texts(9, seed) for seed, name in enumerate("ab")}, query=False)


def test_it_finds_what_a_comparison_with_all_chunks_finds(project: Project) -> None:
    retriever, embedder = Retriever(project.folder, WordEmbedder()), WordEmbedder()
    db = retriever._opened.db
    texts, queries = db.texts(range(len(db))), ["a file is read", *db.texts([3, 17])]
    vectors = embedder.embed(texts)
    asked = embedder.embed(queries)
    distances = ((asked[:, None] - vectors[None]) ** 2).sum(-1)
    documents = db.rows[:, :2].tolist()
    for exclude in ((), [(0, int(db.rows[3, 1])), (1, 2)]):
        hits = retriever.search(queries, k=4, exclude=exclude)
        again = retriever.search(asked, k=4, exclude=exclude)
        assert np.array_equal(hits.ids, again.ids), "vectors are as good as texts"
        allowed = np.array([tuple(pair) not in exclude for pair in documents])
        for row in range(len(queries)):
            order = np.argsort(np.where(allowed, distances[row], np.inf), kind="stable")[:4]
            np.testing.assert_allclose(hits.scores[row], distances[row][order], rtol=1e-4, atol=1e-4)
            found = hits.ids[row].tolist()
            assert all(allowed[found])
            for number, source, text in zip(found, hits.sources[row], hits.texts[row], strict=True):
                where = [source.dataset, source.document, source.start, source.stop]
                assert where == db.rows[number, :4].tolist() and text == texts[number]
                assert source.prefix == project.config.data_paths[source.dataset]
            expected, mask = db.read_tokens(hits.ids[row])
            assert np.array_equal(hits.tokens[row], expected) and np.array_equal(hits.mask[row], mask)
    assert hits.tokens.shape == (3, 4, 2 * CHUNK) and retriever.metric == "l2"


def test_words_find_a_chunk_that_holds_them(project: Project) -> None:
    retriever = Retriever(project.folder, WordEmbedder())
    db = retriever._opened.db
    texts = db.texts(range(len(db)))
    rare = next(
        word
        for text in texts
        for word in text.split()
        if word.isalpha() and len(word) > 3 and sum(f" {word} " in f" {other} " for other in texts) == 1
    )
    holder = next(number for number, text in enumerate(texts) if f" {rare} " in f" {text} ")
    hits = retriever.search([rare, "qqqqq", rare.upper()], k=2, mode="lexical")
    assert hits.ids[0, 0] == holder and hits.ids[2, 0] == holder and (hits.ids[1] == -1).all()
    assert hits.texts[1] == [] and not hits.mask[1].any()
    document = (int(db.rows[holder, 0]), int(db.rows[holder, 1]))
    assert holder not in retriever.search(rare, mode="lexical", exclude=[document]).ids
    fused = retriever.search(rare, k=3, mode="hybrid")
    dense = retriever.search(rare, k=100).ids
    words = retriever.search(rare, k=100, mode="lexical").ids
    assert np.array_equal(fused.ids, fuse([dense, words], 3)[1]) and fused.ids[0, 0] == holder
    with pytest.raises(ConfigError, match="a hybrid search needs texts"):
        retriever.search(np.zeros((1, 16), np.float32), mode="hybrid")


def test_an_index_of_words_that_was_changed_is_refused(project: Project) -> None:
    Retriever(project.folder, WordEmbedder()).search("file", mode="lexical")
    (path,) = project.folder.glob("lexical/*/data*.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data.*\.npy: was changed"):
        Retriever(project.folder, WordEmbedder()).search("file", mode="lexical")


def test_ranks_are_fused_by_their_reciprocals() -> None:
    scores, ids = fuse([np.array([[7, 3, -1]]), np.array([[3, 9, 7]])], 4)
    assert ids.tolist() == [[3, 7, 9, -1]]
    np.testing.assert_allclose(scores, [[1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 0]], rtol=1e-6)


def test_threads_search_while_the_database_grows(project: Project) -> None:
    """A version that appears is used by the next search; what one search finds is of one version."""
    retriever, pinned = Retriever(project.folder, WordEmbedder()), Retriever(project.folder, WordEmbedder(), version=1)
    text = retriever._opened.db.texts([0])[0]
    dataset, document = retriever._opened.db.rows[0, :2].tolist()
    began, stop = threading.Barrier(5), threading.Event()

    def search() -> list[tuple[int, bool]]:
        seen = []
        began.wait()
        while not stop.is_set():
            hits = retriever.search(text, k=5)
            own = any((place.dataset, place.document) == (dataset, document) for place in hits.sources[0])
            seen.append((hits.version, own))
        seen.append((retriever.search(text, k=5).version, False))
        return seen

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(search) for _ in range(4)]
        began.wait()
        remove_documents(project, Worker(), f"{project.config.data_paths[dataset]}:{document}")
        stop.set()
        seen = [future.result() for future in futures]
    for versions in seen:
        assert all(own == (version == 1) for version, own in versions[:-1])
        assert versions[-1][0] == 2 == retriever.version
    hits = pinned.search(text, k=5)
    assert hits.version == 1 and hits.sources[0][0].document == document


def test_a_version_that_cannot_be_opened_leaves_the_one_before(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = Retriever(project.folder, WordEmbedder())
    (project.folder / "db" / "versions" / "0002.json").write_text("{")
    assert retriever.search("file").version == 1
    assert "version 2 is not searched, version 1 still is" in caplog.text
    with pytest.raises(DataError, match="cannot be read"):
        Retriever(project.folder, WordEmbedder())


def test_what_is_no_search_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another embedder"):
        Retriever(project.folder, WordEmbedder(dim=8))
    with pytest.raises(DataError, match="no project directory"):
        Retriever(tmp_path / "nothing", WordEmbedder())
    retriever = Retriever(project.folder, WordEmbedder())
    assert load_project_config(project.folder) is not None and read_version(project.folder).number == 1
    with pytest.raises(ConfigError, match="k must be at least 1 and at most 1000000, not 0"):
        retriever.search("file", k=0)
    with pytest.raises(ConfigError, match="mode must be one of dense, lexical, hybrid, not 'bm25'"):
        retriever.search("file", mode="bm25")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"queries are of shape \(2, 3\); the index takes \[Q, 16\]"):
        retriever.search(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"k": k}, "k must be") for k in (-1, 10**20, 2**30, np.nan, np.inf, 2.0, "3", "", None, True)),
        *(({"length": length}, "length must be") for length in (0, -1, 10**20, 2**30, np.nan, 2.0, "3", True)),
        *(({"mode": mode}, "mode must be one of") for mode in ("", None, 5, ["dense"])),
        *(
            ({"exclude": one}, "exclude must be pairs")
            for one in (5, None, "ab", [3], [(1,)], [(0, -1)], [(0, 10**20)])
        ),
        *(({"exclude": [(0, one)]}, "exclude must be pairs") for one in (np.nan, 1.0, "1", None)),
        *(({"queries": one}, "query must be a string or a list of strings") for one in (None, 5, {}, b"a")),
        *(({"queries": ["a", one]}, "query 1 must be a string") for one in (None, 5, ["a"], b"a")),
        ({"queries": "\ud800"}, "query 0 holds half of a surrogate pair"),
        *(({"queries": np.full((1, 16), one)}, "must be finite numbers") for one in (np.nan, np.inf, "a", None)),
    ],
)
def test_values_of_a_search_that_are_none(searched: Retriever, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        searched.search(**({"queries": "a file"} | options))
    assert "\n" not in str(caught.value)


def test_versions_that_are_none(searched: Retriever) -> None:
    for version in (0, -1, 10**20, np.nan, "1", 1.0, True):
        with pytest.raises(ConfigError, match="version must be (int or null, )?at least 1"):
            Retriever(searched._folder, WordEmbedder(), version=version)
    assert searched.search([]).ids.shape == (0, 10)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("searched")
    prefixes = [write_documents(folder / "a", make_texts(3, 0), tokenizer_of(folder))]
    project = make_project(folder / "db", prefixes, folder)
    save_project_config(project.config, project.folder)
    return Retriever(build(project, WordEmbedder(), query=False).folder, WordEmbedder())
