"""Size and SHA-256 of every file of a checkpoint: written with it, compared before anything of it is used.

The work is shared over ranks: each hashes some of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch.distributed as dist

from megatron_grit.errors import CheckpointError
from megatron_grit.files import write_json
from megatron_grit.parallel.collectives import any_rank
from megatron_grit.parallel.context import ParallelContext

NAME = "manifest.json"


def write_manifest(folder: Path, context: ParallelContext) -> None:
    """Flush a folder's files to disk and write its manifest. Collective over all ranks; all files are there."""
    files = _files_of(folder)
    mine = {str(path.relative_to(folder)): _describe(path) for path in files[context.rank :: context.world_size]}
    part = folder / f".{NAME}.{context.rank}"
    part.write_text(json.dumps(mine))
    dist.barrier()
    if context.rank == 0:
        parts = [folder / f".{NAME}.{rank}" for rank in range(context.world_size)]
        entries = {name: entry for path in parts for name, entry in json.loads(path.read_text()).items()}
        write_json(folder / NAME, {"files": dict(sorted(entries.items()))})
        for path in parts:
            path.unlink()
        for directory in {path.parent for path in files} | {folder}:
            _sync(directory)
    dist.barrier()


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


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(f".{NAME}"))


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
