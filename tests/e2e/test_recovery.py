"""One of two processes fails, is killed, sleeps or freezes: the job ends within seconds and says who it was."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.parse import save_config
from tests.corpus import tiny_run
from tests.harness.command import environment, python

ROOT = Path(__file__).resolve().parents[2]
TOO_LATE = "forcefully exiting via"
"""What torchrun logs when a process has not ended 30 seconds after it was asked to: nobody waited for that. Seconds are
not looked at, for on a busy machine they say nothing."""
TIMEOUT_SECONDS = 3

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.processes(2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    tiny_run(directory)
    return directory


def run_with(fault: str, corpus: Path, directory: Path, *, max_restarts: int = 0, **parallel: Any) -> dict[str, Any]:
    """Two processes under torchrun, with restarts under ours; what they print and their status."""
    launcher_module = "megatron_grit.parallel.torchrun" if max_restarts else "torch.distributed.run"
    config = tiny_run(corpus)
    config.output_dir = str(directory / "run")
    config.checkpoint.save_interval = 1 if max_restarts else 0
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    save_config(config, directory / "run.yaml")
    launcher = [python(), "-m", launcher_module, "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(max_restarts), "--monitor-interval", "0.1"]
    program = [str(ROOT / "tests" / "e2e" / "faulty_train.py"), str(directory / "run.yaml")]
    marker = directory / "marker"
    result = subprocess.run(
        [*launcher, *program, fault, str(marker)],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return {"text": result.stderr, "status": result.returncode}


def test_an_exception_is_told_once_by_the_rank_that_had_it(corpus: Path, tmp_path: Path) -> None:
    result = run_with("raise", corpus, tmp_path)
    text = result["text"]
    assert result["status"] != 0 and TOO_LATE not in text, text
    assert text.count("[rank 1] Traceback") == 1 and text.count("[rank 1] ValueError: a fault of this rank's own") == 1
    # The launcher may end rank 0 before it speaks.
    spoken = [line for line in text.splitlines() if "[rank 0]" in line]
    assert all("[rank 0] ends: rank 1 ended: ValueError: a fault of this rank's own" in line for line in spoken), text
    assert len(spoken) <= 1 and "gloo" not in text, text
    root_cause = text[text.index("Root Cause") :]
    assert "rank      : 1" in root_cause and "ValueError: a fault of this rank's own" in root_cause


def test_a_killed_rank_is_named_and_the_launcher_goes_on_from_the_newest_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    """The run that lost a rank ends with the numbers and the weights of the one that did not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run_with("none", corpus, whole, max_restarts=3)["status"] == 0
    result = run_with("kill", corpus, killed, max_restarts=3)
    assert result["status"] == 0, result["text"]
    assert "[rank 0] ends: rank 1 was killed or crashed: process " in result["text"]
    assert "it was last known at generative forward and backward of step 3, row 1 of " in result["text"]
    assert result["text"].count("restart 1 of 3") == 1 and "restart 2" not in result["text"]
    assert "resumed from" in result["text"]
    assert metrics(killed) == metrics(whole)
    final = Path("run", "checkpoints", "step_00000006")
    shards = [path.relative_to(whole) for path in (whole / final).rglob("*.distcp")]  # of weights and of the optimizer
    assert len(shards) >= 4
    for path in shards:
        assert (whole / path).read_bytes() == (killed / path).read_bytes(), path


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("sleep", "rank 1: loading data of step 3, for "),
        ("freeze", "rank 1: generative forward and backward of step 3, row 1 of "),
    ],
)
def test_a_stuck_job_ends_and_tells_every_ranks_position(fault: str, place: str, corpus: Path, tmp_path: Path) -> None:
    result = run_with(fault, corpus, tmp_path, timeout_minutes=TIMEOUT_SECONDS / 60)
    text = result["text"]
    assert result["status"] != 0 and TOO_LATE not in text, text
    assert text.count("Where the ranks are") == 1, text
    assert place in text and "  rank 0: " in text, text
    assert ("rank 1 (process " in text and "does not answer" in text) == (fault == "freeze"), text
    stacks = text[text.index("Stacks of rank 0") :]
    assert "step.py" in stacks.partition("Stacks of rank 1")[0]
    if fault == "sleep":  # it sleeps in the thread that reads ahead
        assert "time.sleep(1000)" in stacks.partition("Stacks of rank 1")[2]


def metrics(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]
