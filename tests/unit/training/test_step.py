"""One step: counts of reductions, weights of the losses, numbers that are not finite."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError, NumericsError
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.optimizer import build_optimizer, wrap_model
from megatron_grit.training.step import TrainStep, rows_in_turn
from tests.rows import VOCAB, make_batch, tiny_config


def gradients(config: RunConfig, context: ParallelContext, objective: str = "unified") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config.training.objective = objective  # type: ignore[assignment]
    model = build_model(config, VOCAB, context)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    wrapped = wrap_model(model)
    wrapped.train()
    TrainStep(config, context, wrapped, None).accumulate_gradients(make_batch(objective=objective))
    return {name: p.main_grad.clone() for name, p in wrapped.named_parameters()}


def test_unified_is_the_weighted_sum_of_both(context: ParallelContext) -> None:
    config = tiny_config()
    config.loss.loss_emb_factor, config.loss.loss_gen_factor = 0.7, 0.3
    unified = gradients(config, context)
    plain = tiny_config()
    embedding, generative = (gradients(plain, context, kind) for kind in ("embedding", "generative"))
    for name, gradient in unified.items():
        expected = 0.7 * embedding[name] + 0.3 * generative[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_one_gradient_reduction_a_step(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows of both kinds with cached gradients, and one synchronisation."""
    config = tiny_config()
    wrapped = wrap_model(build_model(config, VOCAB, context))
    calls = []
    original = wrapped.finish_grad_sync
    monkeypatch.setattr(
        wrapped, "finish_grad_sync", lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))
    )
    starts = []
    for group in wrapped.bucket_groups:
        start = group.start_grad_sync
        monkeypatch.setattr(group, "start_grad_sync", lambda *a, start=start, **k: (starts.append(1), start(*a, **k)))
    TrainStep(config, context, wrapped, build_optimizer(config, wrapped))(make_batch())
    assert len(calls) == 1
    assert len(starts) == len(wrapped.bucket_groups)


def test_balancing_loss_counts_both_streams_once(context: ParallelContext) -> None:
    """The router's gradient is linear in the coefficient, and rows of both kinds feel it."""
    routers = {}
    for coefficient in (0.0, 0.1, 0.2):
        for objective in ("embedding", "generative"):
            config = tiny_config(experts=4)
            config.model.moe_aux_loss_coeff = coefficient
            config.loss.loss_emb_factor = config.loss.loss_gen_factor = 0.0
            found = gradients(config, context, objective)
            routers[coefficient, objective] = found["module.decoder.layers.0.mlp.router.weight"]
    for objective in ("embedding", "generative"):
        assert routers[0.0, objective].abs().max() == 0
        assert routers[0.1, objective].abs().max() > 0
        torch.testing.assert_close(routers[0.2, objective], 2 * routers[0.1, objective], rtol=1e-4, atol=1e-9)


def test_grad_cache_off_needs_one_row(context: ParallelContext) -> None:
    config = tiny_config()
    config.training.grad_cache = "off"
    wrapped = wrap_model(build_model(config, VOCAB, context))
    with pytest.raises(ConfigError, match="fill 4 rows; raise data.tokens_per_row"):
        TrainStep(config, context, wrapped, None).accumulate_gradients(make_batch())


def test_a_loss_that_is_not_finite_names_the_records_and_changes_nothing(context: ParallelContext) -> None:
    config = tiny_config()
    model = build_model(config, VOCAB, context)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = torch.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = dataclasses.replace(make_batch(), step=17)
    with pytest.raises(NumericsError, match=r"step 18: loss_emb is nan.*loss_emb of row 0 on rank 0 .*row0#0"):
        TrainStep(config, context, wrapped, optimizer)(batch)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_rows_in_turn() -> None:
    """The fewest that the engine's interleaved schedule takes: no fewer than stages, also in what is left over."""
    for num_stages in (2, 3, 4, 8):
        for num_rows in range(num_stages, 40):
            chosen = rows_in_turn(num_rows, num_stages)
            possible = [n for n in range(num_stages, num_rows + 1) if not 0 < num_rows % n < num_stages]
            assert chosen == min(possible)
    assert rows_in_turn(5, 2) == 3


def test_fewer_rows_than_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 rows on a data parallel rank, fewer than the 4 stages"):
        rows_in_turn(3, 4)
