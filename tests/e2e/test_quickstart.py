"""The first command of the README: in miniature, stopped and started again, and in full."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.harness.quickstart import refused, run, start

SCRIPT = "quickstart.sh"
FIGURES = {"recall_at_1", "recall_at_10", "ndcg_at_10", "lm_loss"}
METRICS = {"step", "loss", "loss_emb", "loss_gen", "grad_norm", "lr", "tokens", "tokens_per_second", "padding_fraction"}


def check_files(output: Path, steps: int) -> dict:
    """What the issue names is there, and says what it should. Returns the report."""
    report = json.loads((output / "report.json").read_text())
    for side in ("before", "after"):
        assert set(report[side]) >= FIGURES
        assert all(math.isfinite(report[side][name]) for name in FIGURES)
        for name, (low, high) in report[side]["intervals"].items():
            assert low <= report[side][name] <= high
    assert report["world_size"] == 2
    assert report["chance_recall_at_10"] == 10 / report["num_passages"]
    stages = report["stage_seconds"]
    assert report["seconds"] == pytest.approx(sum(stages.values())) and "setup" not in stages
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    assert all(set(line) >= METRICS for line in metrics)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    markdown = (output / "report.md").read_text()
    assert "| recall@10 | 0.0" in markdown and "## Samples" in markdown
    embeddings = np.load(output / "queries.npy", allow_pickle=False)
    assert embeddings.shape == (2, 128) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert len((output / "generated.txt").read_text()) > len("> What does json.dumps(obj) do?\n")
    return report


def stop_and_start_again(repository: Path, output: Path, steps: int, **environment: str) -> dict:
    """Stop it while it trains, start it again, and look at what it leaves. Returns the report."""
    process = start(repository, SCRIPT, output, **environment)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 3000
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=600)
    assert not (output / "report.json").exists()
    untrained = (output / "before.json").stat().st_mtime_ns

    # By fresh interpreters: of training, measuring, encoding and generating this is the one that has them.
    fresh = {"PYTHON": sys.executable, "PYTHON_EXEC": sys.executable}
    printed = run(repository, SCRIPT, output, 3000, **environment, **fresh)
    assert "corpus: done before" in printed and "train: done before" not in printed
    assert "| recall@10 |" in printed
    assert (output / "before.json").stat().st_mtime_ns == untrained
    report = check_files(output, steps)
    trainings = [line for line in (output / "timings.tsv").read_text().splitlines() if line.startswith("train\t")]
    assert len(trainings) == 2, "the seconds of the run that was stopped are not counted"
    assert report["stage_seconds"]["train"] == pytest.approx(sum(float(line.split("\t")[1]) for line in trainings))
    return report


@pytest.mark.timeout(3600)
@pytest.mark.processes(2)
def test_in_miniature(request: pytest.FixtureRequest, repository: Path, tmp_path: Path) -> None:
    if any(item.name == "test_in_full" for item in request.session.items):
        pytest.skip("test_in_full sees the same and more")
    stop_and_start_again(repository, tmp_path / "out dir", steps=4, SCALE="tiny")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.processes(2)
def test_in_full(repository: Path, tmp_path: Path) -> None:
    """What the README claims is more than this; two fifths of its steps are enough to get here."""
    steps = yaml.safe_load((repository / "examples/configs/quickstart.yaml").read_text())["training"]["steps"] * 2 // 5
    report = stop_and_start_again(repository, tmp_path / "out dir", steps, QUICKSTART_STEPS=str(steps))
    before, after = report["before"], report["after"]
    assert after["recall_at_10"] >= 0.30
    assert after["intervals"]["recall_at_10"][0] > before["intervals"]["recall_at_10"][1]
    assert report["recall_at_10_intervals_overlap"] is False
    assert before["recall_at_10"] > report["chance_recall_at_10"]
    assert before["lm_loss"] - after["lm_loss"] >= 1.2


def test_dry_run(repository: Path, tmp_path: Path) -> None:
    printed = run(repository, SCRIPT, tmp_path / "out", 600, DRY_RUN="1")
    assert printed.startswith("# 2 processes = ")
    assert yaml.safe_load(printed)["model"]["num_experts"] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "environment", "message"),
    [
        ("out", {"QUICKSTART_STEPS": "many"}, "QUICKSTART_STEPS"),
        ("out", {"SCALE": "huge"}, "SCALE"),
        ("--help", {}, "usage"),
        ("file/out", {}, "cannot make"),
    ],
)
def test_wrong_use(repository: Path, tmp_path: Path, output: str, environment: dict[str, str], message: str) -> None:
    (tmp_path / "file").touch()
    assert message in refused(repository, SCRIPT, output, tmp_path, **environment)
