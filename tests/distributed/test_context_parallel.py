"""What the grid does not vary, over two context parallel ranks: pooling methods, a window, kinds of token loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

CASES: dict[str, dict[str, Any]] = {
    "mean": {"embedding.pooling": "mean"},
    "weightedmean": {"embedding.pooling": "weightedmean"},
    "cls": {"embedding.pooling": "cls"},
    "lasttoken": {"embedding.pooling": "lasttoken"},
    "causal embedding": {"embedding.causal": True},
    "window": {"model.sliding_window": 6},
    "mixed": {"loss.loss_gen_type": "mixed"},
    "sequence": {"loss.loss_gen_type": "sequence"},
    "recompute": {"training.recompute": "full"},
    "no rope": {"model.position_embedding": "learned_absolute"},
}


def loss_and_gradient(case: str, size: int) -> tuple[float, list[float]]:
    """The loss of a step and one number for the gradient of each parameter, its product with fixed weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
    config.parallel.context = size
    for key, value in CASES[case].items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    with parallel_job(config.parallel, seed=1) as context:
        model = build_model(config, VOCAB, context)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        wrapped = DistributedDataParallel(model.config, ddp, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        metrics = TrainStep(config, context, wrapped, None).accumulate_gradients(make_batch(rows=2))
        generator = torch.Generator().manual_seed(3)
        weighed = [
            float((p.main_grad * torch.randn(p.shape, generator=generator)).sum() / p.main_grad.norm())
            for p in model.parameters()
        ]
        return metrics["loss"], weighed


def all_cases(size: int) -> dict[str, Any]:
    return {case: loss_and_gradient(case, size) for case in CASES}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    one, two = (run_on_ranks(all_cases, size, tmp_path_factory.mktemp("ranks"), size)[0] for size in (1, 2))
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(results: tuple[dict[str, Any], dict[str, Any]], case: str) -> None:
    (loss, gradient), (loss_of_two, gradient_of_two) = (result[case] for result in results)
    assert loss_of_two == pytest.approx(loss, rel=1e-6)
    assert gradient_of_two == pytest.approx(gradient, rel=1e-4, abs=1e-5)


def test_cases_differ(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Each knob does something, so that the test above compares what it says."""
    losses = {case: loss for case, (loss, _) in results[0].items()}
    assert losses.pop("recompute") == pytest.approx(losses["mean"], rel=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)
