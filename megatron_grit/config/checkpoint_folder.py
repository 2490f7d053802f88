"""Which directories hold our checkpoints; told without torch."""

from __future__ import annotations

from pathlib import Path


def holds_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a checkpoint of ours, or the output directory of a run."""
    return (Path(path) / "state.json").is_file() or (Path(path) / "checkpoints").is_dir()
