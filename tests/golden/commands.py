"""Runs the commands that users type, from any checkout, and reads what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODIFIED = 1_790_000_000
"""Modification time of all inputs, in seconds since 1970."""


class Commands:
    """Commands of one checkout, run in one work folder; paths given to them are relative to it.

    Args:
        tree: root of the checkout.
        folder: where the commands run.
        python: the interpreter; tests have one that forks, which holds this checkout's modules.
    """

    def __init__(self, tree: Path, folder: Path, python: str = sys.executable) -> None:
        self.tree, self.folder, self.python = tree.resolve(), folder.resolve(), python
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {
            "PYTHONPATH": str(self.tree),
            "PYTHON": python,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        }

    def tool(self, name: str, *options: str) -> str:
        """Standard output of ``tools/NAME``."""
        return self.run(self.python, str(self.tree / "tools" / name), *options)

    def verb(self, name: str, *options: str) -> str:
        """Standard output of ``megatron-grit NAME``."""
        return self.run(self.python, "-m", "megatron_grit.cli.main", name, *options)

    def launcher(self, name: str, *options: str, **environment: str) -> str:
        """Standard output of ``examples/NAME``."""
        return self.run("bash", str(self.tree / "examples" / name), *options, **environment)

    def run(self, *command: str, **environment: str) -> str:
        """Standard output of a command.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=3600
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
        return self.plain(done.stdout)

    def plain(self, text: str) -> str:
        """Text without the paths of this machine and without versions."""
        text = re.sub(r"^\| versions \|.*$", "| versions |", text, flags=re.MULTILINE)
        # An environment may lie in the checkout.
        text = text.replace(self.python, "PYTHON").replace(sys.executable, "PYTHON")
        return text.replace(str(self.folder), "FOLDER").replace(str(self.tree), "TREE")

    def settle(self) -> None:
        """Give all files one modification time: a database remembers those of its inputs."""
        for path in self.folder.rglob("*"):
            os.utime(path, (MODIFIED, MODIFIED))

    def digests(self, *patterns: str) -> dict[str, str]:
        """SHA-256 of every file that a pattern matches, or that lies in a folder that one matches. In text files the
        paths of the work folder and of the checkout are replaced by names first."""
        found = {}
        for path in self._files(patterns):
            content = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".txt"):
                content = self.plain(content.decode()).encode()
            found[path.relative_to(self.folder).as_posix()] = hashlib.sha256(content).hexdigest()
        if not found:
            raise RuntimeError(f"there is no file {' or '.join(patterns)} in {self.folder}")
        return dict(sorted(found.items()))

    def _files(self, patterns: tuple[str, ...]) -> Iterator[Path]:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                inside = path.rglob("*") if path.is_dir() else [path]
                yield from (file for file in inside if file.is_file() and file.name != ".lock")


def checkpoint_tensors(folder: Path) -> dict[str, str]:
    """Name, type, shape and a digest of each tensor of a torch_dist folder."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        if hasattr(entry, "size"):
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load(state, storage_reader=reader, no_dist=True)
    found = {name: describe(tensor) for name, tensor in state.items()}
    return dict(sorted((found | {name: "bytes" for name in entries if name not in found}).items()))


def safetensors_tensors(path: Path) -> dict[str, str]:
    """The same of a safetensors file."""
    from safetensors.torch import load_file

    return {name: describe(tensor) for name, tensor in sorted(load_file(path).items())}


def describe(tensor: Any) -> str:
    """``float32 [2, 3] DIGEST``."""
    import torch

    content = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl without what the clock or the machine decides."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not _of_the_machine(key)} for line in lines]


def _of_the_machine(key: str) -> bool:
    return any(word in key for word in ("second", "time", "memory"))


def array_digest(path: Path) -> str:
    """Type, shape and digest of a .npy file."""
    array = np.load(path)
    return f"{array.dtype} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
