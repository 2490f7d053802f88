"""Pooling, linear layers and sides at every layout: the gradient of each of their tensors is one process's.

What the layers after pooling see is the same on all context parallel ranks, what those before it see is not, and rows
of a data parallel rank may hold texts of one side only.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

CASES: dict[str, dict[str, Any]] = {
    "before": {"num_linear_layers": 2, "projection_dim": 12, "linear_activation": "tanh"},
    "after": {
        "num_linear_layers": 2,
        "projection_dim": 12,
        "linear_activation": "gelu",
        "linear_place": "after_pooling",
        "pooling": "weightedmean_sgpt",
    },
    "sides before": {"num_linear_layers": 1, "asymmetric": "heads", "pooling": "weightedmean"},
    "sides after": {"num_linear_layers": 2, "asymmetric": "heads", "linear_place": "after_pooling", "pooling": "max"},
    "learned": {"pooling": "learnedmean"},
    "learned and after": {"pooling": "learnedmean", "projection_dim": 12, "linear_place": "after_pooling"},
    "max": {"pooling": "max"},
    "weightedmean_sgpt": {"pooling": "weightedmean_sgpt", "causal": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
}
COMBINED: dict[str, dict[str, Any]] = {
    "tp2_sp_cp2": {"tensor": 2, "sequence_parallel": True, "context": 2},
    "pp2_cp2": {"pipeline": 2, "context": 2},
}
OF_COMBINED = ("after", "sides before", "learned and after")
SHARED = ("embedding_head.", "embedding_pooling.", "decoder.final_layernorm.")
"""Tensors that every rank of the last stage holds whole."""


def gradients(case: str, layout: dict[str, Any], directory: str, name: str) -> dict[str, float]:
    """Metrics of a unified step; the last stage writes its gradients. Positions of each learned weight are moved."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
    for key, value in CASES[case].items():
        setattr(config.embedding, key, value)
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    with parallel_job(config.parallel, seed=1) as context:
        model = build_model(config, VOCAB, context)
        weights = Path(directory) / f"{case} weights"
        if not weights.exists():
            generator = torch.Generator().manual_seed(9)
            for module in (model.embedding_head, model.embedding_pooling):
                for parameter in [] if module is None else module.parameters():
                    torch.nn.init.normal_(
                        parameter, mean=1.0 * (module is model.embedding_pooling), std=0.3, generator=generator
                    )
            save_weights(model, context, weights)
        load_weights(weights, model, context)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        wrapped = DistributedDataParallel(model.config, ddp, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        batch = make_batch(context.data_rank, context.data_size, rows=2)
        for row in batch.rows_of("embedding"):
            assert row.slots_S is not None and row.pool_mask_T is not None
            row.is_query_S = row.slots_S < batch.counts_of("embedding").num_queries
            row.pool_mask_T[row.cu_seqlens[:-2].long()] = 0.0  # a segment's first token is its instruction
        metrics = TrainStep(config, context, wrapped, None).accumulate_gradients(batch)
        if context.is_last_stage:
            held = {key: p.main_grad for key, p in model.named_parameters() if key.startswith(SHARED)}
            safetensors.torch.save_file(held, Path(directory) / f"{case} {name} {context.rank}.safetensors")
        return metrics


def all_gradients(
    directory: str, layouts: dict[str, dict[str, Any]], cases: tuple[str, ...] = tuple(CASES), damaged: bool = False
) -> dict[str, Any]:
    whole = mock.patch("megatron_grit.models.embedding_head._ScaleGradient.apply", lambda values, scale: values)
    with whole if damaged else nullcontext():
        return {
            name: {case: gradients(case, layout, directory, name) for case in cases} for name, layout in layouts.items()
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Gradients on disk, and metrics of each layout and case."""
    directory = tmp_path_factory.mktemp("gradients")
    metrics = {}
    for processes, layouts, cases in (
        (1, {"one": {}}, tuple(CASES)),
        (2, LAYOUTS, tuple(CASES)),
        (4, COMBINED, OF_COMBINED),
    ):
        ranks = tmp_path_factory.mktemp("ranks")
        metrics |= run_on_ranks(all_gradients, processes, ranks, str(directory), layouts, cases)[0]
    return directory, metrics


def errors(directory: Path, case: str, layout: str) -> dict[str, float]:
    """Relative error of each tensor's gradient on the rank that is furthest off."""
    expected = safetensors.torch.load_file(directory / f"{case} one 0.safetensors")
    found: dict[str, float] = dict.fromkeys(expected, 0.0)
    files = list(directory.glob(f"{case} {layout} ?.safetensors"))
    assert files
    for file in files:
        held = safetensors.torch.load_file(file)
        assert held.keys() == expected.keys()
        for key, gradient in expected.items():
            norm = float(gradient.norm())
            assert norm > 1e-6, f"{key} has no gradient to compare"
            found[key] = max(found[key], float((held[key] - gradient).norm()) / norm)
    return found


@pytest.mark.parametrize(
    ("layout", "case"),
    [*itertools.product(LAYOUTS, CASES), *itertools.product(COMBINED, OF_COMBINED)],
)
def test_gradients_are_those_of_one_process(results: tuple[Path, dict[str, Any]], layout: str, case: str) -> None:
    directory, metrics = results
    assert metrics[layout][case]["loss_emb"] == pytest.approx(metrics["one"][case]["loss_emb"], rel=1e-5)
    worst = errors(directory, case, layout)
    assert max(worst.values()) < 1e-5, worst


def test_cases_differ(results: tuple[Path, dict[str, Any]]) -> None:
    losses = {case: round(metrics["loss_emb"], 5) for case, metrics in results[1]["one"].items()}
    assert len(set(losses.values())) == len(CASES), losses


def test_a_whole_gradient_on_every_context_parallel_rank_is_noticed(
    results: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without their share of the gradient, the layers after pooling learn twice as fast over two ranks."""
    directory = results[0]
    layouts = {"damaged": {"context": 2}}
    ranks = tmp_path_factory.mktemp("ranks")
    run_on_ranks(all_gradients, 2, ranks, str(directory), layouts, ("before", "after"), True)
    assert errors(directory, "after", "damaged")["embedding_head.0.weight"] == pytest.approx(1.0, rel=1e-4)
    assert max(errors(directory, "before", "damaged").values()) < 1e-5
