"""Where Megatron-LM's older layout has its files; told without torch."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_grit.errors import CheckpointError

FILE = "model_optim_rng.pt"
_TRACKER = "latest_checkpointed_iteration.txt"


def find_legacy(path: str | Path) -> Path | None:
    """The directory of an iteration in that layout: ``path``, the one that its tracker file names, or the one that
    ``path``, the file or directory of a rank, is in. None: none of them."""
    path = Path(path)
    path = path.parent if path.name == FILE else path
    if (path / FILE).is_file() and path.name.startswith("mp_rank_"):
        path = path.parent
    if (path / _TRACKER).is_file():
        said = (path / _TRACKER).read_text().strip()
        path = path / (f"iter_{int(said):07d}" if said.isdecimal() else said)
    return path if next(path.glob(f"mp_rank_00*/{FILE}"), None) is not None else None


def rank_folders(path: Path) -> list[Path]:
    """The directories of the tensor parallel ranks of an iteration.

    Raises:
        CheckpointError: one is missing, or the model is split over pipeline stages.
    """
    folders = sorted(path.glob("mp_rank_*"))
    split = next((folder for folder in folders if not re.fullmatch(r"mp_rank_\d\d", folder.name)), None)
    if split is not None:
        raise CheckpointError(
            f"{split}: is of one of several pipeline stages; only tensor parallel ranks are joined here: convert the "
            "checkpoint with Megatron-LM's tools/checkpoint to one pipeline stage"
        )
    for rank, folder in enumerate(folders):
        if folder.name != f"mp_rank_{rank:02d}" or not (folder / FILE).is_file():
            raise CheckpointError(f"{path / f'mp_rank_{rank:02d}' / FILE}: is missing; copy the checkpoint again")
    return folders
