"""A step that one rank of two finds not finite is left out by both, and the rank at fault is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RUINED = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2_overlap": {"overlap": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
}
FAULTS = ("loss", "gradient")


def train_through_faults(directory: str) -> dict[str, Any]:
    """For each layout and fault: what was recorded of the skipped step, and how far two runs are apart in the end."""
    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.parallel.launch import parallel_job
    from tests.rows import tiny_config

    results = {}
    for layout, parallel in LAYOUTS.items():
        for fault in FAULTS:
            config = tiny_config(num_layers=4 if "virtual_pipeline" in parallel else 2)
            config.parallel = ParallelConfig(device="cpu", **parallel)
            config.training.on_nan = "skip"
            config.output_dir = f"{directory}/{layout}_{fault}"
            with parallel_job(config.parallel, seed=1) as context:
                results[f"{layout} {fault}"] = _compare(config, context, fault)
    return results


def _compare(config: Any, context: Any, fault: str) -> dict[str, Any]:
    import torch

    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.training.optimizer import build_optimizer, gather_weights, wrap_chunks
    from megatron_grit.training.step import TrainStep
    from tests.rows import VOCAB, make_batch

    def batch(with_fault: bool) -> Any:
        made = make_batch(context.data_rank, context.data_size)
        for row in made.rows:
            row.tokens_1T[row.tokens_1T == RUINED] = RUINED + 1
        if with_fault and context.data_rank == context.data_size - 1:
            row = made.rows_of("generative")[1]
            row.tokens_1T[0, int(row.cu_seqlens[2])] = RUINED
        return made

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states * (math.nan if fault == "loss" else 1.0)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * math.nan

    def spoil(module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        tokens = kwargs["input_ids"][0]
        if config.parallel.sequence_parallel:
            tokens = tokens.chunk(context.tensor_size)[context.tensor_rank]
        return output.index_put((tokens == RUINED,), Spoil.apply(output[tokens == RUINED]))

    weights, metrics = [], {}
    for steps in ([False, True, False], [False, False]):
        chunks = build_chunks(config, VOCAB, context)
        generator = torch.Generator().manual_seed(2)
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
            if hasattr(chunk, "embedding"):
                chunk.embedding.register_forward_hook(spoil, with_kwargs=True)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        step = TrainStep(config, context, wrapped, build_optimizer(config, wrapped))
        for with_fault in steps:
            metrics = step(batch(with_fault))
        if config.parallel.overlap:
            gather_weights(wrapped)
        weights.append([parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()])
    apart = max(float((one - other).abs().max()) for one, other in zip(*weights, strict=True))
    return {"apart": apart, "last": metrics["skipped_steps"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("nonfinite")
    return directory, run_on_ranks(train_through_faults, 2, directory, str(directory))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ranks_leave_the_step_out(layout: str, fault: str, results: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = results
    for rank in ranks:
        assert rank[f"{layout} {fault}"] == {"apart": 0.0, "last": 0}
    (line,) = (directory / f"{layout}_{fault}" / "skipped.jsonl").read_text().splitlines()
    record = json.loads(line)
    if fault == "loss":
        (row,) = record["rows"]
        # The last stage knows of losses. Tensor parallel ranks know the same, context parallel ranks hold the record
        # (and here rank 1 all of it).
        at_fault = 0 if layout == "tp2" else 1
        name = "row103#2" if layout.startswith("dp") else "row101#2"
        assert row["rank"].startswith(f"rank {at_fault} (") and row["not_finite"] == [name] and row["row"] == 1
    else:
        # The embedding layer is on the first stage, and of tensor parallel ranks the first has the token's row.
        at_fault = 1 if layout.startswith(("dp", "cp")) else 0
        (culprit,) = record["gradients"]
        assert culprit["rank"].startswith(f"rank {at_fault} (")
        assert culprit["parameters"] == ["embedding.word_embeddings.weight"]
