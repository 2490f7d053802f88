from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.errors import DataError
from megatron_grit.evaluation.tasks.retrieval import encode_instructed, evaluate_retrieval, read


def embeddings_with_ranks(ranks: list[int], num_passages: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries whose passage i stands at ranks[i] (0-based), by construction."""
    passages = np.eye(num_passages)
    queries = np.zeros((len(ranks), num_passages))
    for i, rank in enumerate(ranks):
        order = [p for p in range(num_passages) if p != i]
        order.insert(rank, i)
        queries[i, order] = np.arange(num_passages, 0, -1)
    return queries, passages


def test_closed_form() -> None:
    ranks = [0, 1, 9, 10, 49]
    report = evaluate_retrieval(*embeddings_with_ranks(ranks, 50), range(5))
    assert report.recall_at_1.value == 1 / 5
    assert report.recall_at_10.value == 3 / 5
    assert report.ndcg_at_10.value == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 5)
    assert (report.chance_recall_at_1, report.chance_recall_at_10) == (1 / 50, 10 / 50)
    assert (report.num_queries, report.num_passages) == (5, 50)
    assert report.recall_at_10.low < 3 / 5 < report.recall_at_10.high


def test_several_relevant_passages_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_grit.evaluation.tasks.retrieval._QUERIES_PER_BLOCK", 7)
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(40, 8)), rng.normal(size=(60, 8))
    relevant = [rng.choice(60, size=rng.integers(1, 15), replace=False).tolist() for _ in range(40)]
    recalls, gains = [], []
    for query, answers in zip(queries, relevant, strict=True):
        order = sorted(range(60), key=lambda p: -float(query @ passages[p]))[:10]
        recalls.append(sum(p in answers for p in order) / len(answers))
        dcg = sum(1 / math.log2(place + 2) for place, p in enumerate(order) if p in answers)
        gains.append(dcg / sum(1 / math.log2(place + 2) for place in range(min(10, len(answers)))))
    report = evaluate_retrieval(queries, passages, relevant)
    assert report.recall_at_10.value == pytest.approx(np.mean(recalls))
    assert report.ndcg_at_10.value == pytest.approx(np.mean(gains))


def test_collapsed_embeddings_get_no_credit() -> None:
    report = evaluate_retrieval(np.ones((30, 4)), np.ones((30, 4)), range(30))
    assert report.recall_at_10.value == report.ndcg_at_10.value == 0


def test_random_embeddings_are_near_chance() -> None:
    rng = np.random.default_rng(0)
    report = evaluate_retrieval(rng.normal(size=(2000, 16)), rng.normal(size=(100, 16)), rng.integers(100, size=2000))
    assert report.recall_at_10.low < report.chance_recall_at_10 < report.recall_at_10.high


@pytest.mark.parametrize("relevant", [[0], [0, 5], [0, -1], [0, []], [0, [1, 1]]])
def test_wrong_relevance_is_refused(relevant: list) -> None:
    with pytest.raises(ValueError):
        evaluate_retrieval(np.eye(2, 5), np.eye(5), relevant)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    queries = np.eye(3)
    queries[1, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate_retrieval(queries, np.eye(3), range(3))


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "task.jsonl",
        {"query": ["find", "a"], "pos": [["", "x"], ["", "y"]], "neg": [["", "z"]]},
        {"query": "b", "pos": [["", "y"]]},
        {"query": ["find", "c"], "pos": ["y"]},
    )
    task = read(path)
    assert task.queries == [("find", "a"), (None, "b"), ("find", "c")]
    assert task.passages == [("", "x"), ("", "y"), ("", "z"), (None, "y")]  # with and without template are two
    assert task.relevant == [[0, 1], [1], [3]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "malformed JSON"),
        ({"text": "plain"}, "not an embedding record"),
        ({"query": "q", "pos": []}, "pos"),
        ({"query": ["i", " "], "pos": ["p"]}, "empty text"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: object, message: str) -> None:
    path = write_lines(tmp_path / "task.jsonl", {"query": "q", "pos": ["p"]}, bad)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:2:") and "\n" not in str(raised.value)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record"):
        read(write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="missing.jsonl"):
        read(tmp_path / "missing.jsonl")


def test_encode_instructed_keeps_the_order() -> None:
    calls = []

    def encode(texts: list[str], instruction: str | None) -> np.ndarray:
        calls.append((instruction, texts))
        return np.array([[float(text), len(instruction or "")] for text in texts])

    embeddings = encode_instructed([("ab", "1"), (None, "2"), ("ab", "3"), ("", "4")], encode)
    assert embeddings.tolist() == [[1, 2], [2, 0], [3, 2], [4, 0]]
    assert calls == [("ab", ["1", "3"]), (None, ["2"]), ("", ["4"])]
