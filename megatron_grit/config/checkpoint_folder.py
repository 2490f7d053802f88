"""Which directories hold our checkpoints; told without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import CheckpointError

REPLACED = ".replaced"
"""End of the name of a checkpoint that another one is put in the place of."""
BEST = "best.json"
"""What of an output directory names the best checkpoint, which commands take as OUTPUT_DIR/best."""
_NAME = re.compile(r"step_\d{8,}")


def holds_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a checkpoint of ours, or the output directory of a run."""
    path = Path(path)
    return (path / "state.json").is_file() or (path / "checkpoints").is_dir() or _named_best(path) is not None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found: dict[str, Path] = {}
    for path in sorted((Path(output_dir) / "checkpoints").glob("step_*")):
        # One that was being replaced when the run was killed stands under its other name: the later of the two.
        name = path.name.removesuffix(REPLACED)
        if _NAME.fullmatch(name) and (path / "state.json").is_file():
            found.setdefault(name, path)
    return [found[name] for name in sorted(found)]


def best_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of a run that ``evaluation.best`` keeps; None: there is none.

    Raises:
        CheckpointError: its record cannot be read.
    """
    file = Path(output_dir) / BEST
    if not file.is_file():
        return None
    try:
        path = file.parent / str(json.loads(file.read_bytes())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error!r}); remove it") from None
    return path if (path / "state.json").is_file() else None


def _named_best(path: Path) -> Path | None:
    """What OUTPUT_DIR/best stands for."""
    return best_checkpoint(path.parent) if path.name == Path(BEST).stem and not path.exists() else None


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory, the newest one of a run's output directory, or its best one, OUTPUT_DIR/best.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    if (best := _named_best(path)) is not None:
        return best
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected state.json or checkpoints/step_*/state.json")
    return found[-1]


def started_from(config: RunConfig) -> list[Path]:
    """Directories of the checkpoint that a run resumes, and of the one that it was started from."""
    places = list_checkpoints(config.output_dir)[-1:] if config.checkpoint.resume else []
    if config.checkpoint.load is not None:
        # One of Megatron-LM has another form; one that is not there is told of when it is loaded.
        load = Path(config.checkpoint.load)
        places += list_checkpoints(load)[-1:] or [_named_best(load) or load]
    return places
