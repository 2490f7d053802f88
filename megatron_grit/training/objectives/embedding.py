"""Contrastive loss on embedding rows, over the global batch, under any layout.

Embeddings are gathered over data parallel ranks. Each replica of the last stage takes a share of the queries,
differentiates their part of the loss with respect to all embeddings, and the gradients are summed over replicas. A
row is then trained with the loss (embedding * its gradient).

Where a data parallel rank's texts fit in one row, this happens in the step's own schedule, between that row's forward
and backward pass. Otherwise gradients are cached (GradCache, arXiv 2101.06983): a first pass embeds every row without a
graph, the gradient is taken, and each row is embedded again in the schedule, from the random state of its first pass.

Shape suffix legend: N = texts of the global batch, L = texts of this rank, D = width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.errors import ConfigError
from megatron_grit.losses.contrastive import ContrastiveOptions, contrastive_loss_and_accuracy
from megatron_grit.models.decoder import Output
from megatron_grit.parallel.collectives import gather_in_order, sum_over_replicas
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.training.objectives.base import Objective


class EmbeddingObjective(Objective):
    """The contrastive loss: every rank's gradient is that of the global loss with respect to its own embeddings."""

    kind = "embedding"
    output = Output.EMBEDDINGS

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.cached_gradients: list[Tensor] = []
        """Of each row's embeddings: the gradient of the global loss. On the last stage, before any factor."""
        self.random_states: dict[tuple[int, int], RandomState] = {}
        self.metrics: dict[str, Tensor] = {}

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """First pass, where gradients are cached."""
        super().prepare(batch, rows, forward_all)
        self._text_ids = self._gather_text_ids() if self.config.loss.mask_equal_texts else None
        self.cached_gradients, self.random_states = [], {}
        if not self._caches_gradients(len(rows)):
            return
        outputs = forward_all(rows, self.output, self.random_states)
        if not self.context.is_last_stage:
            return
        gradient_LD = self._gradient(torch.cat(outputs))
        self.cached_gradients = list(gradient_LD.split([len(output) for output in outputs]))

    def _caches_gradients(self, num_rows: int) -> bool:
        wanted = self.config.training.grad_cache
        if wanted == "off" and num_rows > 1:
            raise ConfigError(
                f"training.grad_cache is off, but a rank's texts of step {self.batch.step} fill {num_rows} rows; "
                f"raise data.tokens_per_row above {self.config.data.tokens_per_row} or set grad_cache to auto"
            )
        return wanted == "on" or num_rows > 1

    def random_state(self, chunk: int, index: int) -> RandomState | None:
        """That of the row's first pass. None: there was none."""
        return self.random_states[chunk, index] if self.random_states else None

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The row's embeddings times the gradient of the global loss; its metrics come with the first row."""
        if not self.cached_gradients:
            self.cached_gradients = [self._gradient(output.detach())]
        surrogate = (output * self.cached_gradients[index]).sum()
        metrics = self.metrics if index == 0 else {}
        return surrogate * (self.weight * self._gradient_scale()), metrics

    def _gradient_scale(self) -> float:
        if self.config.loss.emb_grad_scale == "exact":
            return 1.0
        return 1.0 / (self.config.loss.grit_world_size or self.context.data_size)

    def _gradient(self, local_LD: Tensor) -> Tensor:
        """Gradient of the global loss with respect to this rank's embeddings. All replicas call this together."""
        counts, context, knobs = self.counts, self.context, self.config.loss
        texts_ND = self._gather(local_LD).requires_grad_()
        options = ContrastiveOptions(
            temperature=knobs.temperature,
            group_size=counts.group_size,
            symmetric=knobs.symmetric,
            negatives=knobs.negatives,
            num_blocks=knobs.num_blocks,
            same_side_negatives=knobs.same_side_negatives,
            false_negative_margin=knobs.false_negative_margin,
            matryoshka_dims=tuple(knobs.matryoshka_dims),
            gradient_sides=knobs.gradient_sides,
        )
        rank = context.data_rank * context.context_size + context.context_rank
        size = context.data_size * context.context_size
        anchors = slice(counts.num_queries * rank // size, counts.num_queries * (rank + 1) // size)
        queries, passages = texts_ND.split((counts.num_queries, len(texts_ND) - counts.num_queries))
        loss, accuracy = contrastive_loss_and_accuracy(queries, passages, options, self._text_ids, anchors)
        (gradient_ND,) = torch.autograd.grad(loss, texts_ND)
        # Shares of the global loss; metrics are summed over ranks.
        self.metrics = {self.loss_name: loss.detach(), "accuracy_emb": accuracy}
        return sum_over_replicas(gradient_ND, context)[counts.slots_by_rank[context.data_rank].to(gradient_ND.device)]

    def _gather(self, local_LD: Tensor) -> Tensor:
        """Texts of all data parallel ranks, in the order of the global list."""
        return gather_in_order(local_LD, self.counts.slots_by_rank, self.context.data_group)

    def _gather_text_ids(self) -> Tensor:
        # Of the rows on the host: hashing them on a GPU would wait for it several times a row.
        local_L = torch.cat([row.text_ids() for row in self.batch.rows_of(self.kind)])
        return self._gather(local_L[:, None].to(self.context.device))[:, 0]


OBJECTIVE = EmbeddingObjective
