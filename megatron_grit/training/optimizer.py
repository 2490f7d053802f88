"""The engine's data parallel wrapper, distributed optimizer and learning-rate schedule over a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_grit.config.schema import RunConfig
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel import positions


def wrap_model(model: GritDecoder) -> DistributedDataParallel:
    """The model with fp32 gradient buffers that are reduced once a step."""
    (wrapped,) = wrap_chunks([model])
    return wrapped


def wrap_chunks(chunks: Sequence[GritDecoder], overlap: bool = False) -> list[DistributedDataParallel]:
    """:func:`wrap_model` for each chunk of an interleaved pipeline stage.

    Args:
        chunks: they share one engine configuration.
        overlap: as ``parallel.overlap``. Weights are then whole only after :func:`gather_weights` or a forward pass.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    engine_config = chunks[0].config
    engine_config.finalize_model_grads_func = _reduce_gradients
    if overlap:
        # Without it every row would count towards "all gradients are there", which is told by the first step's count:
        # a step with more rows would be reduced before its last.
        engine_config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _reduce_gradients(*args: Any, **kwargs: Any) -> None:
    positions.at("gradient reduction")
    finalize_model_grads(*args, **kwargs)


def gather_weights(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Have every rank's updated weights on all of them, now and not at the next forward pass. Collective."""
    for chunk in wrapped:
        chunk.start_param_sync(force_sync=True)


def build_optimizer(config: RunConfig, model: DistributedDataParallel | Sequence[DistributedDataParallel]) -> Any:
    """AdamW with fp32 main weights, sharded over data parallel ranks. Biases and norms have no weight decay."""
    optimizer = config.optimizer
    bf16 = config.training.precision == "bf16"
    engine_config = EngineOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
        clip_grad=optimizer.clip_grad,
    )
    built = get_megatron_optimizer(engine_config, list(model) if isinstance(model, Sequence) else [model])
    # Where all dense parameters are frozen and experts are not, the engine chains an empty shell that cannot be saved.
    built.chained_optimizers = [part for part in built.chained_optimizers if not part.is_stub_optimizer]
    return built


def build_schedule(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Warm-up from 0, then linear, cosine or no decay to ``min_lr`` at the last step."""
    steps = max(config.training.steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=num_warmup_steps(config),
        lr_decay_steps=steps,
        lr_decay_style=config.optimizer.schedule,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def num_warmup_steps(config: RunConfig) -> int:
    """``warmup_steps``, or the share ``warmup_ratio`` rounded up; always less than the steps of the run."""
    steps = config.training.steps
    wanted = config.optimizer.warmup_steps
    if wanted is None:
        wanted = math.ceil(config.optimizer.warmup_ratio * steps)
    return max(0, min(wanted, steps - 1))


def set_learning_rate(schedule: OptimizerParamScheduler, step: int) -> float:
    """Set the rate of a step (0-based), whatever was done before; returns it."""
    schedule.num_steps = step
    schedule.step(increment=0)
    return float(max(group["lr"] for group in schedule.optimizer.param_groups))
