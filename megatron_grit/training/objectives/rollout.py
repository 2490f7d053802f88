"""Policy gradients on completions that were sampled and rewarded."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.rollout import section
from megatron_grit.data.kinds.rollout import ADVANTAGE, BEHAVIOR
from megatron_grit.data.rows.batch import PackedRow, to_device
from megatron_grit.losses.rollout import PolicyLoss, policy_loss, token_weights
from megatron_grit.models.decoder import Output
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.collectives import sum_over_group
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.objectives.base import Objective


class RolloutObjective(Objective):
    """Each row's share of the clipped objective; the shares of the global batch's rows add up to it."""

    kind = "rollout"
    output = Output.TOKEN_LOSSES

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.options = section(config)
        self.loss = PolicyLoss(
            ratio=self.options.ratio, clip_low=self.options.clip_low, clip_high=self.options.clip_high
        )

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class."""
        assert row.loss_mask_1T is not None
        counts, context, values = self.counts, self.context, row.label_values
        segments_T, sizes_T, share = self._segments(index, row)
        labels_T = row.loss_mask_1T[0] > 0
        weights_T = token_weights(
            labels_T,
            self.options.aggregation,
            num_tokens=counts.num_labels,
            num_completions=counts.num_samples,
            sizes_T=sizes_T,
            completion_tokens=self.options.completion_tokens,
        )
        held = RowShare.of_row(row, context)
        mask_T = labels_T if held is None else labels_T & _is_held(labels_T, held)
        found = policy_loss(
            -output,
            values[BEHAVIOR],
            values[ADVANTAGE],
            weights_T,
            mask_T,
            self.loss,
            num_tokens=counts.num_labels,
            segments_T=segments_T,
            sum_of_ranks=None if held is None else partial(sum_over_group, group=context.context_group),
        )
        # Where ratios of completions are joined over context parallel ranks, each has the loss of the whole row.
        joined = context.context_size if self.options.ratio == "sequence" else 1
        share /= context.context_size
        metrics = {
            self.loss_name: found.loss.detach() / joined,
            "reward_rollout": output.new_tensor(share * counts.reward_mean),
            "reward_std_rollout": output.new_tensor(share * counts.reward_std),
            "ratio_rollout": found.ratio,
            "clipped_rollout": found.clipped,
            "kl_rollout": found.kl,
            "entropy_rollout": found.entropy,
        }
        return found.loss * self.weight, metrics

    def _segments(self, index: int, row: PackedRow) -> tuple[Tensor, Tensor, float]:
        """Segment of each token, int64 [T]; sampled tokens of its completion, float32 [T], 1 on padding; and the row's
        share of the completions of the global batch."""
        slots_S = self.rows(self.batch)[index].slots_S  # on the host
        assert row.segment_lengths is not None and slots_S is not None
        sizes = np.ones(len(row.segment_lengths), dtype=np.float32)  # padding comes last
        sizes[: len(slots_S)] = self.counts.sizes_S[slots_S.numpy()]
        numbers = np.repeat(np.arange(len(sizes)), row.segment_lengths)
        segments_T, sizes_T = (torch.from_numpy(each) for each in (numbers, sizes[numbers]))
        device = self.context.device
        return to_device(segments_T, device), to_device(sizes_T, device), len(slots_S) / self.counts.num_samples


def _is_held(labels_T: Tensor, share: RowShare) -> Tensor:
    """Tokens that this context parallel rank holds: bool [T]."""
    return torch.zeros_like(labels_T).index_fill(0, share.index_L, True)


OBJECTIVE = RolloutObjective
