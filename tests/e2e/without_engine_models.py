"""Trains, resumes, exports, imports and serves where megatron-core's GPTModel and HybridModel cannot be imported.

For test_without_engine_models.py, in a process of its own: ``python -m tests.e2e.without_engine_models DIRECTORY``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

GPT, HYBRID = "megatron.core.models.gpt", "megatron.core.models.hybrid"
# megatron.core itself takes names from here, at its import (inference/contexts/dynamic_context.py:33 of 0.19.2).
STAND_INS = (HYBRID, f"{HYBRID}.hybrid_layer_allocation")


class Blocked:
    """Finds neither module nor anything in them. Of what the engine imports itself it gives an empty stand-in, whose
    names are of no use to anybody."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=name == HYBRID)  # type: ignore[arg-type]
        if f"{name}.".startswith((f"{GPT}.", f"{HYBRID}.")):
            raise ModuleNotFoundError(f"No module named {name!r}: it is blocked", name=name)
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = nothing


def nothing(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return object()


def main(directory: Path) -> None:
    """All of it, on the tests' corpus; raises where something fails."""
    from starlette.testclient import TestClient

    from megatron_grit.cli import convert
    from megatron_grit.inference.model import GritModel
    from megatron_grit.serving import server
    from megatron_grit.training.trainer import train
    from tests.corpus import tiny_run

    config = tiny_run(directory, experts=4)
    config.model.num_layers, config.model.moe_dense_layers, config.model.qk_norm = 2, [0], True
    metrics, before = Path(config.output_dir) / "metrics.jsonl", ""
    for steps in (1, 2):
        config.training.steps = steps
        train(config)
        written = metrics.read_text()
        # The second call resumes: the first step's line is still there, time included.
        assert written.startswith(before) and len(written.splitlines()) == steps, written
        before = written
    exported, imported = directory / "exported", directory / "imported"
    for source, target in ((config.output_dir, exported), (exported, imported)):
        assert convert.main(["--from", str(source), "--to", str(target)]) == 0, source

    service = server.Service(GritModel.load(imported, device="cpu"), "tiny", max_length=64, max_new_tokens=4)
    with TestClient(server.create_app(service)) as client:
        message = {"role": "user", "content": "what does the parser do?"}
        for path, body in (("embeddings", {"input": "a text"}), ("chat/completions", {"messages": [message]})):
            response = client.post(f"/v1/{path}", json=body)
            assert response.status_code == 200, response.text


def is_blocked(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "it is blocked" in str(error)
    return False


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    for name in (GPT, f"{GPT}.gpt_layer_specs", f"{HYBRID}.hybrid_model", f"{HYBRID}.hybrid_block"):
        assert is_blocked(name), name
    main(Path(sys.argv[1]))
