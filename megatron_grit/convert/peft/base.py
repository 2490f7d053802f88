"""The base of a run with adapters: where it is, and what kind of directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_grit.convert.hf_in.pretrained import pretrained_folder
from megatron_grit.errors import CheckpointError
from megatron_grit.store.hub import is_hub_name
from megatron_grit.training.checkpoint import read_state


@dataclass(frozen=True)
class BaseLocation:
    """Where a base is."""

    path: Path
    is_huggingface: bool
    """A Hugging Face model; otherwise a checkpoint, or a run's output directory."""


def locate_base(checkpoint: Path, moved_to: str | Path | None = None) -> BaseLocation:
    """Find the base of the adapters of a checkpoint.

    Args:
        checkpoint: of a run with adapters.
        moved_to: where the base is now. None: where the run read it.

    Raises:
        CheckpointError: it is not there.
    """
    saved = read_state(checkpoint)["base"]
    source = str(saved["source"] if moved_to is None else moved_to)
    is_huggingface = (Path(source) / "config.json").is_file() or is_hub_name(source)
    if moved_to is None:
        is_huggingface = saved["kind"] == "pretrained"
    if is_huggingface:
        return BaseLocation(pretrained_folder(source), True)
    if not Path(source).is_dir():
        raise CheckpointError(
            f"{checkpoint}: holds adapters, and their base {source} is not there; say where it is now with --base, or "
            "with base in Python"
        )
    return BaseLocation(Path(source), False)
