"""The benchmark in miniature, for its output and not for its speed; it compares answers with a cache and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rag_cache
from megatron_grit.inference.document_cache.document_cache import DocumentCache

SMALL = ["--num-layers=2", "--hidden-size=64", "--vocab-size=64", "--lengths", "40", "20", "--new=3", "--rounds=1"]


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rag_cache.json"
    status = rag_cache.main([*SMALL, "--questions=2", "--json", str(output)])
    numbers = json.loads(output.read_text())
    met = numbers["saved_share"] >= 0.65 and numbers["first_token_ratio"] >= 10
    assert status == (0 if met else 1) and numbers["first_token_ratio"] > 0
    longest = numbers["lengths"]["40"]
    assert numbers["saved_share"] == longest["saved_share"]
    assert longest["saved_share"] == pytest.approx(1 - longest["whole_memory_ms"] / longest["whole_without_ms"])
    # Two layers, keys and values, one head of 64 channels, fp32.
    assert longest["cache_mib"] == 2 * 2 * 40 * 64 * 4 / 2**20
    assert numbers["fewer_bits"]["int4"]["size_over_fp32"] < numbers["fewer_bits"]["int8"]["size_over_fp32"] < 0.6
    assert "first_token_ratio" in capsys.readouterr().out


def test_another_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layer = DocumentCache.layer

    def turned(cache: DocumentCache, number: int, target: int, *given):  # type: ignore[no-untyped-def]
        return layer(cache, number, target + 5, *given)

    monkeypatch.setattr(DocumentCache, "layer", turned)
    assert rag_cache.main(SMALL) == 2
    assert "the answer of side memory is another one" in capsys.readouterr().err
