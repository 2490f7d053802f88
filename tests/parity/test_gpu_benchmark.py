"""The GPU benchmark in miniature on the CPU; it fails by itself where its two sides disagree on a loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the other side of the benchmark is transformers")

from benchmarks import gpu_grit
from benchmarks.random_batch import random_batch
from megatron_grit.errors import ConfigError
from megatron_grit.planning.memory import estimate_memory
from megatron_grit.planning.operations import peak_tflops
from megatron_grit.training.estimate_report import workload_of

TINY = ["--device", "cpu", "--scale", "tiny", "--steps", "1", "--warmup", "1"]


@pytest.mark.slow
def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md")]
    monkeypatch.setattr(sys, "argv", ["gpu_grit", *TINY, "--peak-tflops", "2", *files])
    assert gpu_grit.main() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["objective"], row["side"]): row for row in report["rows"]}
    assert set(rows) == {(name, side) for name in gpu_grit.OBJECTIVES for side in ("megatron_grit", "transformers")}
    assert (report["queries"], report["passages"], report["sequences"], report["layers"]) == (8, 16, 1, 2)
    for (objective, _), row in rows.items():
        plain = rows[objective, "transformers"]
        assert row["mfu"] == pytest.approx(row["tflops"] / 2) and row["mfu"] > 0
        assert row["speed"] == pytest.approx(plain["seconds"] / row["seconds"])
        # One formula counts the same work for both, so utilisation differs as the time does.
        assert row["tflops"] / plain["tflops"] == pytest.approx(row["speed"])
        assert row["phases"]["optimizer"] < row["phases"]["total"]
    assert rows["unified", "megatron_grit"]["padding_fraction"] < rows["unified", "transformers"]["padding_fraction"]
    written = (tmp_path / "report.md").read_text()
    assert written in capsys.readouterr().out and written.count("\n| ") == 7


@pytest.mark.slow
def test_bf16_and_a_profile(tmp_path: Path) -> None:
    words = [*TINY, "--precision", "bf16", "--layers", "1", "--objectives", "generative", "--profile", str(tmp_path)]
    rows = gpu_grit.run(gpu_grit.parse(words))["rows"]
    assert [row["mfu"] for row in rows] == [None, None], "no card, no peak"
    for side in ("megatron_grit", "transformers"):
        assert "aten::mm" in (tmp_path / f"{side}_generative.txt").read_text()


def test_sides_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight is not the same on both sides."""
    original = gpu_grit.measure_ours

    def measure_ours(arguments: Any, config: Any, context: Any, weights: dict[str, Any], objective: str) -> Any:
        changed = weights | {"lm_head.weight": weights["lm_head.weight"] * 1.5}
        return original(arguments, config, context, changed, objective)

    monkeypatch.setattr(gpu_grit, "measure_ours", measure_ours)
    words = [*TINY, "--layers", "1", "--warmup", "0", "--objectives", "generative"]
    with pytest.raises(gpu_grit.GritError, match="generative: the first loss_gen is"):
        gpu_grit.run(gpu_grit.parse(words))


def test_layers_are_as_many_as_fit() -> None:
    arguments = gpu_grit.parse(["--batch", "16", "--precision", "bf16"])
    workload = workload_of(gpu_grit.run_config(arguments, 1), gpu_grit.make_batches(arguments)[0], 1)
    layers = {gib: gpu_grit.choose_layers(arguments, workload, gib * 2**30) for gib in (24, 80, 141, 400)}
    assert 0 < layers[24] < layers[80] < layers[141] < layers[400] == 32
    peaks = [
        estimate_memory(gpu_grit.run_config(arguments, count), 1, 32000, workload).peak
        for count in (layers[80], layers[80] + 1)
    ]
    assert peaks[0] <= 0.85 * 80 * 2**30 < peaks[1]
    with pytest.raises(ConfigError, match="one layer does not fit into 4 GiB"):
        gpu_grit.choose_layers(arguments, workload, 4 * 2**30)


def test_parts_of_a_batch_add_up() -> None:
    sizes = {"num_queries": 12, "num_sequences": 5, "longest": 90, "tokens_per_row": 128, "vocab_size": 50}
    batch = random_batch(3, **sizes)
    parts = [gpu_grit.part_of(batch, objective) for objective in ("embedding", "generative")]
    for count in ("num_tokens", "num_padded_tokens"):
        assert sum(getattr(part, count) for part in parts) == getattr(batch, count)
    assert [part.parts for part in parts] == [{kind: part} for kind, part in batch.parts.items()]
    labels = sum(int(row.loss_mask_1T.sum()) for row in batch.rows_of("generative") if row.loss_mask_1T is not None)
    assert batch.counts_of("generative").num_loss_tokens == labels > 0
    assert sorted(batch.counts_of("embedding").slots_by_rank[0].tolist()) == list(range(12 * 3))
    again = random_batch(3, **sizes)
    for ours, same in zip(batch.rows_of("embedding"), again.rows_of("embedding"), strict=True):
        assert (ours.tokens_1T == same.tokens_1T).all()
    assert len({row.record_ids[0] for row in batch.rows_of("embedding")}) == len(batch.rows_of("embedding"))


def test_peaks_by_name() -> None:
    names = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA GH200 480GB": 989}
    names |= {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA B200": 2250, "NVIDIA H200 NVL": 835}
    assert {name: peak_tflops(name) for name in names} == names
    assert peak_tflops("NVIDIA GeForce RTX 4090") is None
