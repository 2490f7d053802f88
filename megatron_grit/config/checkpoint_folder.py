"""Which directories hold our checkpoints; told without torch."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import CheckpointError

REPLACED = ".replaced"
"""End of the name of a checkpoint that another one is put in the place of."""
_NAME = re.compile(r"step_\d{8,}")


def holds_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a checkpoint of ours, or the output directory of a run."""
    return (Path(path) / "state.json").is_file() or (Path(path) / "checkpoints").is_dir()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found: dict[str, Path] = {}
    for path in sorted((Path(output_dir) / "checkpoints").glob("step_*")):
        # One that was being replaced when the run was killed stands under its other name: the later of the two.
        name = path.name.removesuffix(REPLACED)
        if _NAME.fullmatch(name) and (path / "state.json").is_file():
            found.setdefault(name, path)
    return [found[name] for name in sorted(found)]


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory, or the newest one of a run's output directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected state.json or checkpoints/step_*/state.json")
    return found[-1]


def started_from(config: RunConfig) -> list[Path]:
    """Directories of the checkpoint that a run resumes, and of the one that it was started from."""
    places = list_checkpoints(config.output_dir)[-1:] if config.checkpoint.resume else []
    if config.checkpoint.load is not None:
        # One of Megatron-LM has another form; one that is not there is told of when it is loaded.
        places += list_checkpoints(config.checkpoint.load)[-1:] or [Path(config.checkpoint.load)]
    return places
