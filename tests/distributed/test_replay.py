"""The second pass of cached gradients draws the dropout of the first one, on every stage and chunk of every layout."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
}


def difference(layout: dict[str, Any], forget: bool) -> float | None:
    """Largest difference between the embeddings of both passes; None where this rank has none."""
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training import step
    from megatron_grit.training.objectives import embedding
    from megatron_grit.training.optimizer import wrap_chunks

    config = tiny_config()
    config.model.hidden_dropout = config.model.attention_dropout = 0.2
    config.training.grad_cache = "on"
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    first: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    prepare, row_loss = embedding.EmbeddingObjective.prepare, embedding.EmbeddingObjective.row_loss

    def note_first(self: Any, batch: Any, rows: Any, forward_all: Any) -> None:
        prepare(self, batch, rows, lambda *args: first.extend(forward_all(*args)) or first)

    def note_second(self: Any, index: int, row: Any, output: torch.Tensor) -> Any:
        second.append(output.detach().clone())
        return row_loss(self, index, row, output)

    with (
        parallel_job(config.parallel, seed=1) as context,
        mock.patch.multiple(embedding.EmbeddingObjective, prepare=note_first, row_loss=note_second),
        mock.patch.object(step, "replay", lambda _: contextlib.nullcontext()) if forget else contextlib.nullcontext(),
    ):
        wrapped = wrap_chunks(build_chunks(config, VOCAB, context))
        for chunk in wrapped:
            chunk.train()
        batch = make_batch(context.data_rank, context.data_size)
        step.TrainStep(config, context, wrapped, None).accumulate_gradients(batch)
    assert len(first) == len(second)
    return max((float((a - b).abs().max()) for a, b in zip(first, second, strict=True)), default=None)


def all_layouts() -> dict[str, Any]:
    return {name: [difference(layout, forget) for forget in (False, True)] for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(all_layouts, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_passes_are_equal(results: list[dict[str, Any]], name: str) -> None:
    """On the last stage, and not so where the random state is not put back."""
    last_stage = results[1:] if name.startswith("pp") else results
    for rank in last_stage:
        replayed, forgotten = rank[name]
        assert replayed < 1e-6
        assert forgotten > 1e-2
