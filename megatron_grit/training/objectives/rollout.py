"""Policy gradients on completions that were sampled and rewarded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.rollout import extra_metrics, section
from megatron_grit.data.kinds.rollout import ADVANTAGE, BEHAVIOR, RolloutStream
from megatron_grit.data.rows.batch import PackedRow, StepBatch, to_device
from megatron_grit.errors import ConfigError
from megatron_grit.losses.policy_gradient import PolicyLoss, kl_to_reference, policy_loss, token_weights
from megatron_grit.models.decoder import Output
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.collectives import sum_over_group
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.base_weights import base_fingerprint, exact_fingerprint
from megatron_grit.training.objectives.base import Objective, RunStart
from megatron_grit.training.reference.tokens import TokenLogProbs

REFERENCE = "reference"
"""Name of the label values of the reference."""


class RolloutObjective(Objective):
    """Each row's share of the clipped objective; the shares of the global batch's rows add up to it."""

    kind = "rollout"
    output = Output.TOKEN_LOSSES

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.options = section(config)
        self.extra_metrics = extra_metrics(self.options)
        self._known: dict[str, TokenLogProbs] = {}
        self._from_start: set[int] = set()
        self.loss = PolicyLoss(
            ratio=self.options.ratio, clip_low=self.options.clip_low, clip_high=self.options.clip_high
        )

    def start(self, run: RunStart) -> dict[str, Any]:
        """Compute what is missing of the log-probabilities of the sampling policy and the reference."""
        stream = run.streams[self.kind]
        assert isinstance(stream, RolloutStream)
        wants_start = self.options.behavior == "start"
        every = enumerate(stream.rollouts)
        self._from_start = {number for number, known in every if wants_start or not known.has_behavior}
        wanted: dict[str, bool] = {}
        if self._from_start:
            wanted[BEHAVIOR] = True
        if self.options.kl_weight:
            wanted[REFERENCE] = self.options.reference == "start"
        saved = {} if run.saved is None else dict(run.saved)
        for name, with_adapters in wanted.items():
            if run.saved is None:
                saved[name] = self._fingerprint(run, with_adapters=with_adapters)
            elif name not in saved:
                raise ConfigError(
                    f"the run resumes from a checkpoint that was trained without log-probabilities of its {name}, "
                    "which rollout.behavior and kl_weight need now; give checkpoint.load that checkpoint, in another "
                    "output_dir"
                )
            known = TokenLogProbs(self.config, self.context, stream, saved[name], with_adapters=with_adapters)
            known.complete(run.chunks, run.pad_id, resumed=run.saved is not None)
            self._known[name] = known
        return saved

    def _fingerprint(self, run: RunStart, *, with_adapters: bool) -> str:
        """Of the weights that a run starts from, adapters included or left off. Collective."""
        if self.config.adapter.kind == "none":
            return exact_fingerprint(run.chunks, self.context)
        base = base_fingerprint(run.chunks, self.context)
        return base + exact_fingerprint(run.chunks, self.context) if with_adapters else base

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """Give each row what the models before say of its tokens."""
        super().prepare(batch, rows, forward_all)
        for name, known in self._known.items():
            for row, on_host in zip(rows, self.rows(batch), strict=True):
                chosen = self._from_start if name == BEHAVIOR else None
                row.label_values[name] = self._laid_out(name, known, on_host, chosen)

    def _laid_out(self, name: str, known: TokenLogProbs, row: PackedRow, sources: set[int] | None) -> Tensor:
        """Of each label, float32 [T] on the device; of other sources what the row has."""
        assert row.records_S3 is not None and row.loss_mask_1T is not None
        values_T = np.zeros(row.tokens_1T.shape[1], dtype=np.float32)
        if name in row.label_values:
            values_T[:] = row.label_values[name].numpy()
        bounds = row.cu_seqlens.tolist()
        for (source, record, start), begin, end in zip(row.records_S3.tolist(), bounds, bounds[1:], strict=False):
            if sources is None or source in sources:
                values_T[begin : end - 1] = known.of(source, record, start + 1, start + end - begin)
        return to_device(torch.from_numpy(values_T), self.context.device)

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
        loss = found.loss
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
        if self.options.kl_weight:
            own_T, reference_T = (torch.where(mask_T, each, 0.0) for each in (-output, values[REFERENCE]))
            kl_T = kl_to_reference(own_T, reference_T)
            share_of_kl = (weights_T * kl_T).sum()
            loss = loss + self.options.kl_weight * share_of_kl
            metrics[self.loss_name] = metrics[self.loss_name] + self.options.kl_weight * share_of_kl.detach()
            metrics["kl_reference_rollout"] = kl_T.detach().sum() / counts.num_labels
        return loss * self.weight, metrics

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
