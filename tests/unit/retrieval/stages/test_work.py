"""Blocks that processes share: how far they are is said by one of them, in the log of a batch job as well."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store import progress
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from tests.unit.retrieval.workers import run_together


def test_a_log_says_how_far_all_processes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a terminal, from the first process alone, and for the blocks of all."""
    caplog.set_level(logging.INFO)
    seconds = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds["now"])
    folder = BlockFolder(tmp_path / "blocks", 80, 10, {"task": "test"})

    def task(worker: Worker) -> None:
        def compute(block: Block) -> Arrays:
            if worker.is_first:
                seconds["now"] += 31
            return {"data": np.zeros(len(block))}

        compute_blocks(folder, compute, worker, "codes")

    run_together(2, task)
    lines = [message.partition(" chunks")[0] for message in caplog.messages]
    assert lines == [f"codes: {done} of 80" for done in (20, 40, 60, 80)] + ["codes: 80"]
