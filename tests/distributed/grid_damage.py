"""What goes wrong without an exception, put in on purpose: each fix of a silent error taken out, one at a time."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from megatron_grit.config.schema import RunConfig
from tests.distributed.grid_run import Damage

Patch = AbstractContextManager[Any]


def batch_exchanges() -> Patch:
    """Both stages of an interleaved pipeline send to and receive from one neighbour: batched, tensors are mixed up."""
    from megatron_grit.models import decoder as gpt

    original = gpt.transformer_config

    def with_batches(config: RunConfig) -> Any:
        engine_config = original(config)
        engine_config.overlap_p2p_comm, engine_config.batch_p2p_comm = False, True
        return engine_config

    return mock.patch.object(gpt, "transformer_config", with_batches)


def lose_boundaries_of_middle_stages() -> Patch:
    """The tokens of a row attend across its segments on every stage but the first and the last."""
    from megatron_grit.models.attention import PackedSegments

    original = PackedSegments.of_row

    def of_row(*row: Any) -> PackedSegments:
        segments = original(*row)
        if 0 < torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
            segments.lengths = segments.key_lengths = [sum(segments.lengths)]
        return segments

    return mock.patch.object(PackedSegments, "of_row", of_row)


def fall_back_to_causal() -> Patch:
    """What the engine's own attention does where no mask is given."""
    from megatron_grit.models import decoder as gpt
    from megatron_grit.models.attention import AttentionMode

    return mock.patch.object(gpt, "attention_mode", lambda *_: AttentionMode.CAUSAL)


def scale_by_context_size() -> Patch:
    """A loss that is not a share of a sum: the engine multiplies it by the context parallel size."""
    from megatron_grit.training.step import TrainStep

    original = TrainStep._run_schedule

    def run_schedule(self: Any, forward_step: Any, *args: Any, **kwargs: Any) -> Any:
        def doubled(iterator: Any, model: Any) -> Any:
            output, loss_function = forward_step(iterator, model)

            def scaled(output: torch.Tensor) -> Any:
                loss, metrics = loss_function(output)
                return loss * self.context.context_size, metrics

            return output, scaled

        return original(self, doubled, *args, **kwargs)

    return mock.patch.object(TrainStep, "_run_schedule", run_schedule)


def take_another_slice() -> Patch:
    """Context parallel ranks hold consecutive tokens, and the keys are picked as if they did not."""
    from megatron_grit.models import row_share

    def consecutive(row_length: int, rank: int, size: int) -> torch.Tensor:
        return torch.arange(row_length).view(size, -1)[rank]

    places = row_share.gathered_places
    right_places = {size: places(64, size) for size in (2, 4)}
    return mock.patch.multiple(
        row_share, held_positions=consecutive, gathered_places=lambda _, size: right_places[size]
    )


def condition_on_other_chunks() -> Patch:
    """Chunks that neighbors are conditioned on are picked as if ranks held consecutive tokens."""
    from megatron_grit.models.retro import plan

    return mock.patch.object(plan, "gathered_places", lambda row_length, _: torch.arange(row_length))


def pool_the_slice() -> Patch:
    """Sums over a segment's tokens are not taken over the ranks that hold them."""
    from megatron_grit.models import pooling

    return mock.patch.object(pooling, "sum_over_group", lambda values, group: values)


def reduce_experts_with_the_rest() -> Patch:
    """Experts with a tensor parallel size of their own are reduced over the ranks of the dense layers."""
    from megatron_grit.models import decoder as gpt

    return mock.patch.object(gpt, "_reduce_experts_apart", lambda model: None)


def average_means_of_ranks() -> Patch:
    """The z-loss of a row is the mean of its ranks' means, whatever padding they have."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_grit.models import layer_specs

    return mock.patch.object(layer_specs, "PackedRouter", TopKRouter)


def count_replicas_in_the_norm() -> Patch:
    """Every rank's copy of a replicated parameter counts towards the gradient norm: the update is clipped more."""
    from megatron.core.optimizer import optimizer

    return mock.patch.object(optimizer.tensor_parallel, "param_is_not_tensor_parallel_duplicate", lambda *_, **__: True)


def forget_other_parts_of_the_vocabulary() -> Patch:
    """Probabilities that a teacher is compared by are those among a rank's own tokens."""
    from megatron_grit.training.teacher import targets

    original = targets.divergence_options

    def alone(*args: Any) -> Any:
        return dataclasses.replace(original(*args), group=None)

    return mock.patch.object(targets, "divergence_options", alone)


def keep_stale_weights() -> Patch:
    """Data parallel ranks do not get the part of the weights that another one has updated."""
    from megatron.core.distributed import param_and_grad_buffer

    bucket_group = param_and_grad_buffer._ParamAndGradBucketGroup
    return mock.patch.object(bucket_group, "start_param_sync", lambda *_, **__: None)


# Name of the case that is damaged, and how.
DAMAGED: dict[str, tuple[str, Damage]] = {
    "pp2_vpp2-batched": ("pp2_vpp2", batch_exchanges),
    "cp2-scaled": ("cp2", scale_by_context_size),
    "cp2-slice": ("cp2", take_another_slice),
    "cp2-pooling": ("cp2", pool_the_slice),
    "retro_cp2-chunks": ("retro_cp2", condition_on_other_chunks),
    "teacher_tp2-alone": ("teacher_tp2", forget_other_parts_of_the_vocabulary),
    "dp2-causal": ("dp2", fall_back_to_causal),
    "dp2-stale": ("dp2", keep_stale_weights),
    "tp2_sp-norm": ("tp2_sp", count_replicas_in_the_norm),
    "moe_cp2_etp2-z_loss": ("moe_cp2_etp2", average_means_of_ranks),
    "pp4-boundaries": ("pp4", lose_boundaries_of_middle_stages),
}
# These were silent errors of megatron-core 0.16 alone.
DAMAGED_IN_0_16: dict[str, tuple[str, Damage]] = {
    "moe_etp2-reduction": ("moe_etp2", reduce_experts_with_the_rest),
    "moe_tp2_sp_etp1-reduction": ("moe_tp2_sp_etp1", reduce_experts_with_the_rest),
}
