"""Measures against pytrec_eval, and BEIR's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.errors import DataError
from megatron_grit.evaluation.ranking import collection
from megatron_grit.evaluation.ranking.collection import Collection, UnfinishedRanking, read_beir
from megatron_grit.evaluation.ranking.measures import measure
from megatron_grit.evaluation.ranking.search import rank_by_embeddings, ranked
from megatron_grit.evaluation.tasks import retrieval
from megatron_grit.evaluation.tasks.task import Lengths
from tests.corpus import write_jsonl

_CUTOFFS = (1, 3, 10, 100)


def drawn(num_queries: int = 30, num_documents: int = 60) -> tuple[Collection, np.ndarray]:
    """Judgements of several grades, and scores of which many are equal."""
    random = np.random.default_rng(0)
    judgements: list[dict[int, int]] = []
    for _ in range(num_queries):
        judged = random.choice(num_documents, size=random.integers(1, 12), replace=False).tolist()
        judgements.append(dict(zip(judged, random.integers(0, 4, len(judged)).tolist(), strict=True)))
    judgements[3] = {5: 0}
    judgements[4][-1] = 2  # of a document that the collection lacks
    collection = Collection(
        query_ids=[f"q{i}" for i in range(num_queries)],
        queries=[str(i) for i in range(num_queries)],
        document_ids=[f"d{i}" for i in range(num_documents)],
        documents=[str(i) for i in range(num_documents)],
        judgements=judgements,
    )
    return collection, random.integers(0, 15, (num_queries, num_documents)).astype(np.float32)


def test_figures_are_those_of_pytrec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    collection, scores = drawn()
    ids = collection.document_ids
    qrels = {
        query: {ids[place] if place >= 0 else "missing": grade for place, grade in grades.items()}
        for query, grades in zip(collection.query_ids, collection.judgements, strict=True)
    }
    run = {
        query: dict(zip(ids, map(float, row), strict=True))
        for query, row in zip(collection.query_ids, scores, strict=True)
    }
    names = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
    cuts = ",".join(map(str, _CUTOFFS))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {*(f"{name}.{cuts}" for name in names.values()), "recip_rank"})
    expected = evaluator.evaluate(run)
    everything = [np.arange(len(ids))] * len(scores)
    found = measure(ranked(collection, everything, list(scores)).documents, collection.judgements, _CUTOFFS)
    for ours, theirs in names.items():
        for k in _CUTOFFS:
            wanted = [expected[query][f"{theirs}_{k}"] for query in collection.query_ids]
            np.testing.assert_allclose(found[f"{ours}_at_{k}"], wanted, atol=1e-6, err_msg=f"{ours}@{k}")
    # No cutoff below the number of documents: 100 of 60.
    wanted = [expected[query]["recip_rank"] for query in collection.query_ids]
    np.testing.assert_allclose(found["mrr_at_100"], wanted, atol=1e-6)
    other_order = [order[::-1] for order in ranked(collection, everything, list(-scores)).documents]  # control
    assert np.abs(measure(other_order, collection.judgements, _CUTOFFS)["map_at_10"] - found["map_at_10"]).max() > 0.01


class Known:
    """Texts are numbers, of which each is nearest to itself."""

    def encode(self, texts: list[str], instruction: str | None, **how: object) -> np.ndarray:
        assert instruction == {"query": "find", "passage": ""}[str(how["side"])]
        angles = np.array([float(text) for text in texts]) / 100
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_search_by_windows_finds_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    collection, _ = drawn()
    collection = Collection(**{**vars(collection), "query_instruction": "find"})
    whole = rank_by_embeddings(Known(), collection, Lengths(), 9)
    monkeypatch.setattr("megatron_grit.evaluation.ranking.search._WINDOW", 7)
    monkeypatch.setattr("megatron_grit.evaluation.ranking.search._CELLS", 70)
    parts = rank_by_embeddings(Known(), collection, Lengths(), 9)
    for query, (one, other) in enumerate(zip(whole.documents, parts.documents, strict=True)):
        assert one.tolist() == other.tolist() and one[0] == query and len(one) == 9


def test_a_killed_search_resumes_after_the_last_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_grit.evaluation.ranking.search._WINDOW", 7)
    collection, _ = drawn()
    path = tmp_path / ".scores.json.partial"

    def ranking(killed_at: int | None = None, model: str = "one") -> tuple[Any, list[int]]:
        sizes: list[int] = []

        class Counting(Known):
            def encode(self, texts: list[str], instruction: str | None, **how: object) -> np.ndarray:
                sizes.append(len(texts) if how["side"] == "passage" else 0)
                if len(sizes) == killed_at:
                    raise KeyboardInterrupt
                return super().encode(texts, instruction, **how)

        told = {**vars(collection), "query_instruction": "find"}
        unfinished = UnfinishedRanking(path=path, model=[model])
        try:
            return rank_by_embeddings(Counting(), Collection(**told | {"unfinished": unfinished}), Lengths(), 9), sizes
        except KeyboardInterrupt:
            return None, sizes

    whole, _ = ranking()
    path.unlink()
    _, before = ranking(killed_at=5)
    found, after = ranking()
    assert before == [0, 7, 7, 7, 7] and after == [0, 7, 7, 7, 7, 7, 4]  # the one that was killed, and those after it
    for one, other in zip(found.documents + found.scores, whole.documents + whole.scores, strict=True):
        assert one.tolist() == other.tolist()
    path.unlink()
    ranking(killed_at=5)
    path.write_bytes(path.read_bytes()[:-1])  # damaged
    assert sum(ranking()[1]) == 60
    path.unlink()
    ranking(killed_at=5)
    found, after = ranking(model="another")
    assert sum(after) == 60


def write_folder(folder: Path, judgements: str = "query-id\tcorpus-id\tscore\nq1\td2\t2\nq2\td1\t1\n") -> Path:
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": "d1", "title": "", "text": "1"}, {"_id": "d2", "text": "2"}, {"_id": "q2", "text": "9"}],
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": str(i)} for i in (1, 2, 3)])
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text(judgements)
    return folder


def test_a_folder_of_beir(tmp_path: Path) -> None:
    task = retrieval.read(write_folder(tmp_path))
    assert isinstance(task, Collection)
    assert (task.query_ids, task.documents) == (["q1", "q2"], ["1", "2", "9"])
    assert task.judgements == [{1: 2}, {0: 1}]
    task = Collection(**{**vars(task), "query_instruction": "find"})
    figures = retrieval.run(Known(), task, Lengths()).contents()
    # Each nearest to itself: the relevant one is second of three, and second of two, since q2 is the query itself.
    assert figures["ndcg_at_3"] == pytest.approx(1 / np.log2(3)) and figures["mrr_at_10"] == 0.5
    assert figures["num_queries"] == 2 and figures["map_at_1000"] == 0.5
    assert set(figures["intervals"]) >= {"ndcg_at_10", "map_at_100", "recall_at_100"}
    (tmp_path / "qrels" / "dev.tsv").write_text("q3 0 d1 1\nq3 0 gone 1\n")  # TREC's columns
    assert read_beir(tmp_path, "dev").judgements == [{0: 1, -2: 1}]


def test_judgements_that_are_repeated_or_of_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(collection.log, "info", told.append)
    lines = ["q1\td2 \t2", " q1\tgone\t1", "q1\td1\t1", "q1\tgone\t1", "q1\tlost\t1", "q2\td1\t1", "q1\td1\t1"]
    found = read_beir(write_folder(tmp_path, "\n".join(lines) + "\n"))
    assert found.judgements == [{1: 2, -2: 1, 0: 1, -4: 1}, {0: 1}]
    (line,) = told
    assert line.endswith("of 5 judged documents 2 are not in corpus.jsonl; they count as not found")
    recall = measure([np.array([1, 0])], found.judgements[:1])["recall_at_10"]
    assert recall.tolist() == [0.5]  # of four documents, however often each was judged
    read_beir(write_folder(tmp_path))
    assert len(told) == 1


def test_wrong_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no corpus.jsonl; a folder of BEIR's holds"):
        read_beir(tmp_path)
    write_folder(tmp_path)
    with pytest.raises(DataError, match=r"has no qrels/dev.tsv; its splits are test"):
        read_beir(tmp_path, "dev")
    for judgements, message in [
        ("a\tb\tc\nq1\td2\tx\n", r"test.tsv:2: must be a query, a document"),
        ("a\tb\tc\nq9\td2\t1\n", r"test.tsv:2: query q9 is not in queries.jsonl"),
        ("a\tb\tc\nq1\tgone\t1\n", "none of its 1 documents"),
        ("a\tb\tc\n", "holds no judgement"),
        ("q1\td2\t1\nq1\td1\t1\nq1\td2\t0\n", r"tsv:3: document d2 is judged 0 for query q1, and 1 in a line before"),
        ("q1\tgone\t1\nq1\tgone\t0\n", r"tsv:2: document gone is judged 0"),
        ("q1\td2\t1.0\nq2\td1\t1\n", r"test.tsv:1: must be a query, a document and a whole number"),
        ("q1\td2\thigh\nq2\td1\t1\n", r"test.tsv:1: must be a query, a document and a whole number"),
        ("q8\td2\t1.0\nq2\td1\t1\n", r"test.tsv:1: must be a query, a document and a whole number"),
        ("q1\td2\nq2\td1\t1\n", r"test.tsv:1: must be a query, a document and a whole number"),
    ]:
        with pytest.raises(DataError, match=message):
            read_beir(write_folder(tmp_path, judgements))
    write_folder(tmp_path)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d1", "text": "again"}) + "\n")
    with pytest.raises(DataError, match=r"corpus.jsonl:4: _id d1 is there twice"):
        read_beir(tmp_path)
