"""Losses of preferences on rows of whole records, from the log-probabilities of their answers.

Shape suffix legend: S = segments of a row, a conversation each; in the row of pairs the preferred answer of each comes
first and the other one next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.preference import METRICS, PreferenceConfig, beta_of, needs_reference
from megatron_grit.data.kinds.preference import PreferenceStream
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.errors import ConfigError
from megatron_grit.losses.log_probs import segment_sums
from megatron_grit.losses.preference import Answers, PreferenceOptions, pair_losses, rated_losses
from megatron_grit.models.decoder import Output
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.base_weights import base_fingerprint, exact_fingerprint
from megatron_grit.training.objectives.base import Objective, RunStart
from megatron_grit.training.reference.forward import answer_log_probs, frozen_log_probs
from megatron_grit.training.reference.records import ReferenceLogProbs, refuse_missing


class PreferenceObjective(Objective):
    """Each row's share of the loss; the shares of the global batch's rows add up to it."""

    kind = "preference"
    output = Output.TOKEN_LOSSES

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.own: PreferenceConfig = config.preference  # type: ignore[attr-defined]
        self.options = PreferenceOptions(
            loss=self.own.loss,
            beta=beta_of(self.own),
            label_smoothing=self.own.label_smoothing,
            gamma_beta_ratio=self.own.gamma_beta_ratio,
            desirable_weight=self.own.desirable_weight,
            undesirable_weight=self.own.undesirable_weight,
        )
        sft_weight = self.own.sft_weight
        self.sft_weight = float(self.own.loss == "orpo") if sft_weight is None else sft_weight
        self.reference: ReferenceLogProbs | None = None
        self.kl = torch.zeros((), dtype=torch.float64, device=context.device)
        """Of kto: estimate of KL(model || reference) of the step, on the last stage."""
        if self.own.loss == "kto":
            self.extra_metrics = ["kl"]

    def start(self, run: RunStart) -> dict[str, Any]:
        """Compute what is missing of the reference's log-probabilities, where the run begins."""
        self._chunks = run.chunks
        if not needs_reference(self.own) or self.own.reference == "adapters_off":
            return {}
        stream = run.streams[self.kind]
        assert isinstance(stream, PreferenceStream)
        if run.saved is None:
            saved = {"weights": exact_fingerprint(run.chunks, self.context)}
            if self.config.adapter.kind != "none":
                saved["base"] = run.base or base_fingerprint(run.chunks, self.context)
        elif "weights" in run.saved:
            saved = dict(run.saved)
        else:
            raise ConfigError(
                f"the run resumes from a checkpoint that was trained without a reference, and preference.loss "
                f"{self.own.loss} needs the model of its start; give checkpoint.load that checkpoint, in another "
                "output_dir"
            )
        self.reference = ReferenceLogProbs(
            self.config, self.context, stream, ":".join(saved.values()), self.own.cache_dir
        )
        missing = self.reference.missing(*stream.visited(run.step, self.config.training.steps))
        if run.saved is not None:
            refuse_missing(missing, stream.sources.names, self.reference.folder, "preference.cache_dir")
        if len(missing):
            self.reference.compute(missing, run.chunks, run.pad_id)
        return saved

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """Give each row what the reference says of its answers; in kto, estimate the KL of the step."""
        super().prepare(batch, rows, forward_all)
        if needs_reference(self.own):
            self._attach_reference(rows, self.rows(batch), batch.row_length)
        if self.own.loss == "kto":
            on_host = batch.parts[self.kind].baseline
            baseline = [row.to(self.context.device) for row in on_host]
            self._attach_reference(baseline, on_host, batch.row_length)
            self._estimate_kl(baseline, forward_all(baseline, self.output, {}))

    def _attach_reference(self, rows: list[PackedRow], on_host: list[PackedRow], row_length: int) -> None:
        if self.reference is not None:
            for row, same in zip(rows, on_host, strict=True):
                row.reference_S = self.reference.of(same).to(self.context.device)
            return
        found = frozen_log_probs(self._chunks, self.context, rows, row_length, with_adapters=False)
        for row, reference_S in zip(rows, found, strict=False):
            row.reference_S = reference_S

    def _estimate_kl(self, rows: list[PackedRow], outputs: list[Tensor]) -> None:
        """The mean of log p - log p_reference over answers to other prompts, of the global batch, or 0 if that is less
        (arXiv 2402.01306, section 4.1)."""
        if not self.context.is_last_stage:
            return
        total = torch.zeros_like(self.kl)
        for row, output in zip(rows, outputs, strict=True):
            assert row.reference_S is not None
            total += (answer_log_probs(row, output, self.context) - row.reference_S).sum()
        torch.distributed.all_reduce(total, group=self.context.data_group)
        self.kl = (total / self.counts.num_segments).clamp(min=0)

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class. Context parallel ranks compute the same loss, each with the gradient of its tokens."""
        assert row.loss_mask_1T is not None and row.segment_ids_T is not None and row.is_chosen_S is not None
        mask_T, counts = row.loss_mask_1T[0], self.counts
        log_probs_S = answer_log_probs(row, output, self.context)
        answers = Answers(
            log_probs_A=log_probs_S,
            reference_A=torch.zeros_like(log_probs_S) if row.reference_S is None else row.reference_S,
            num_tokens_A=segment_sums(torch.ones_like(mask_T), mask_T, row.segment_ids_T, len(log_probs_S)),
        )
        chosen_S = row.is_chosen_S
        if self.own.loss == "kto":
            losses, rewards_S = rated_losses(answers, chosen_S, self.kl, self.options)
            right = (rewards_S > self.options.beta * self.kl) == chosen_S
            first, second = rewards_S[chosen_S], rewards_S[~chosen_S]
            loss, accuracy = losses.sum() / counts.num_segments, right.sum() / counts.num_segments
        else:
            pairs = answers.take(slice(0, None, 2)), answers.take(slice(1, None, 2))
            losses, first, second = pair_losses(*pairs, self.options)
            loss, accuracy = losses.sum() / counts.num_records, (first > second).sum() / counts.num_records
        if self.sft_weight:
            loss = loss - self.sft_weight * log_probs_S[chosen_S].sum() / max(counts.num_chosen_labels, 1)
        chosen, rejected = first.sum() / max(counts.num_chosen, 1), second.sum() / max(counts.num_rejected, 1)
        means = (
            loss,
            log_probs_S[chosen_S].sum() / max(counts.num_chosen, 1),
            log_probs_S[~chosen_S].sum() / max(counts.num_rejected, 1),
            chosen,
            rejected,
            chosen - rejected,
            accuracy,
        )
        # Metrics are summed over ranks, and every context parallel rank has the whole row's.
        share = 0.0 if self.context.context_rank else 1.0
        metrics = {name: value.detach() * share for name, value in zip(METRICS, means, strict=True)}
        if self.own.loss == "kto" and index == 0 and self.context.data_rank == 0:  # of the step, said once
            metrics["kl"] = self.kl * share
        return loss.float() * self.weight, metrics


OBJECTIVE = PreferenceObjective
