"""Size and SHA-256 of every file of a checkpoint: written with it, compared before anything of it is used.

The work is shared over ranks: each describes the files that it wrote, where and when it wrote them, and rank 0 puts the
parts together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_grit.errors import CheckpointError
from megatron_grit.parallel.collectives import any_rank
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.digest import describe_file
from megatron_grit.store.files import sync_folder, write_json

NAME = "manifest.json"


def write_part(folder: Path, paths: Iterable[Path], rank: int) -> None:
    """Flush a rank's files to disk and write what the manifest will say of them. Not collective; any thread."""
    entries = {str(path.relative_to(folder)): _describe(path) for path in paths}
    _part(folder, rank).write_text(json.dumps(entries))


def write_manifest(folder: Path, world_size: int) -> None:
    """Make the manifest of all ranks' parts and of whatever other files there are. One rank, when all have written."""
    entries: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        part = _part(folder, rank)
        entries |= json.loads(part.read_text())
        part.unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        name = str(path.relative_to(folder))
        if name not in entries:
            entries[name] = _describe(path)
    write_json(folder / NAME, {"files": dict(sorted(entries.items()))})
    for directory in {path.parent for path in files} | {folder}:
        sync_folder(directory)


def _part(folder: Path, rank: int) -> Path:
    return folder / f".{NAME}.{rank}"


def verify_manifest(folder: Path, context: ParallelContext, within: str = "") -> None:
    """Compare a checkpoint with its manifest. Collective over all ranks. One without a manifest passes.

    Args:
        folder: the checkpoint.
        context: this process's place in the mesh.
        within: only files below this folder of the checkpoint.

    Raises:
        CheckpointError: on every rank; on one that found it, with the file that is missing or damaged.
    """
    if not (folder / NAME).is_file():
        return
    problem = _first_problem(folder, within, context)
    if any_rank(problem is not None, context):
        raise problem or CheckpointError(f"{folder}: is damaged; another rank says which file")


def _first_problem(folder: Path, within: str, context: ParallelContext) -> CheckpointError | None:
    remedy = "use another checkpoint: remove this one to go on from the one before it"
    try:
        entries = json.loads((folder / NAME).read_text())["files"]
        chosen = [name for name in sorted(entries) if name.startswith(within)]
        for name in chosen[context.rank :: context.world_size]:
            path = folder / name
            if not path.is_file():
                return CheckpointError(f"{path}: is missing; {remedy}")
            found = _describe(path)
            if found["bytes"] != entries[name]["bytes"]:
                said = entries[name]["bytes"]
                return CheckpointError(f"{path}: has {found['bytes']} bytes, {said} were written; {remedy}")
            if found["sha256"] != entries[name]["sha256"]:
                return CheckpointError(f"{path}: is damaged, its SHA-256 is not that of what was written; {remedy}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return CheckpointError(f"{folder / NAME}: cannot be read ({error}); {remedy}")
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return describe_file(path)
