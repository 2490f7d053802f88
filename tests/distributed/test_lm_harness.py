"""lm-eval asks a model on a mesh, and gets what one process answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import RunConfig
from tests.harness.ranks import run_on_ranks
from tests.unit.evaluation.lm.local_tasks import distance, responses, write_tasks

pytest.importorskip("lm_eval")

MESHES: dict[str, dict[str, int]] = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}, "cp2": {"context": 2}}
CONVERSING = ("tp2", "dp2")
"""Those that are asked in the chat template too."""


def evaluate(run: str, tasks: str) -> dict[str, Any]:
    """Answers on each mesh, on the first process."""
    from megatron_grit.config.options import HarnessModel
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    found = {}
    for name, mesh in MESHES.items():
        options = HarnessModel(checkpoint=run, device="cpu", batch_tokens=256, at_once=3, **mesh)
        lm = MegatronGritLM.leading(options)
        if lm.model.model.context.rank:
            lm.runner.follow()
            continue
        found[name] = responses(lm, Path(tasks))
        if name in CONVERSING:
            found[f"{name} chat"] = responses(lm, Path(tasks), chat=True)
        lm.runner.finish()
    return found


def test_answers_are_those_of_one_process(trained_run: RunConfig, tmp_path: Path) -> None:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    tasks = write_tasks(tmp_path / "tasks", count=6)
    alone = MegatronGritLM(str(trained_run.output_dir), device="cpu")
    plain, conversing = responses(alone, tasks), responses(alone, tasks, chat=True)
    assert distance(plain, conversing) > 1e-3  # of generated texts, and of what is scored behind a prompt
    first, second = run_on_ranks(evaluate, 2, tmp_path, str(trained_run.output_dir), str(tasks))
    assert not second and first.keys() == {*MESHES, *(f"{name} chat" for name in CONVERSING)}
    for name, found in first.items():
        assert distance(found, conversing if name.endswith("chat") else plain) < 1e-5, name
