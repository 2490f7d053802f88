"""Train as ``megatron-grit train`` does, with a fault on rank 1: ``faulty_train.py RUN_YAML FAULT MARKER``.

The fault happens once: the marker file says that it did, and holds the time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_grit.cli.main import guarded
from megatron_grit.config.parse import load_config

STEP = 3  # 1-based


def happen(fault: str, marker: Path) -> None:
    """The fault, unless it happened already."""
    if os.environ.get("RANK") != "1" or marker.exists():
        return
    marker.write_text(str(time.time()))
    if fault == "raise":
        raise ValueError("a fault of this rank's own")
    if fault == "sleep":
        time.sleep(1000)
    time.sleep(1.5)  # a position is published twice a second
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[fault])


def run(config_path: str, fault: str, marker: Path) -> None:
    """Patch the place of the fault, and train."""
    from megatron_grit.data.rows.loader import GritDataLoader
    from megatron_grit.training.objectives import generative
    from megatron_grit.training.trainer import train

    read, row_loss = GritDataLoader.batch, generative.GenerativeObjective.row_loss

    def faulty_read(self: Any, step: int) -> Any:
        if step == STEP - 1:
            happen(fault, marker)
        return read(self, step)

    def faulty_loss(self: Any, *args: Any) -> Any:
        if self.batch.step == STEP - 1:
            happen(fault, marker)
        return row_loss(self, *args)

    if fault == "sleep":
        GritDataLoader.batch = faulty_read  # type: ignore[method-assign]
    elif fault != "none":
        generative.GenerativeObjective.row_loss = faulty_loss  # type: ignore[method-assign]
    train(load_config(config_path))


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1], sys.argv[2], Path(sys.argv[3])), joins_job=True))
