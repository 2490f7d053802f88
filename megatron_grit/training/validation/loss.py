"""Next-token loss and perplexity on texts that are not trained on, by source and by what could be copied.

The sum of the losses of all predicted tokens is divided once by their number, so neither packing nor the mesh weighs
in. A model that reads neighbors also gets its losses by how much of the text stands in what it has read
(:mod:`megatron_grit.data.rows.overlap`), since near copies in a database would flatter it.

Shape suffix legend: T = tokens of a row, L = tokens of a row that are predicted, S = sources, B = buckets of overlap,
G = groups: S x B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import reads_neighbors
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.held_out import HeldOutLoader
from megatron_grit.data.rows.overlap import read_overlap
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.models.decoder import Output
from megatron_grit.parallel import positions
from megatron_grit.parallel.collectives import from_last_stage, sum_over_replicas
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.audit.undisturbed import undisturbed
from megatron_grit.training.optimizer import gather_weights
from megatron_grit.training.step import run_schedule

EDGES = (0.125, 0.25, 0.5)
"""Upper ends of the buckets of overlap but the last, which ends at 1: shares of a chunk, those of RETRO's figure 6 and
one between."""
NEAR_COPY = 0.25
"""Chunks with more overlap are left out of the loss without near copies."""
_BUCKETS = ("none", *(f"to_{edge:g}" for edge in EDGES), "to_1")
"""Nothing is read; then by overlap."""


class Validation:
    """Measures a model on ``data.valid``. Training goes on as if it had not been measured.

    Args:
        config: the run, with ``data.valid``.
        tokenizer: of the texts.
        context: this process's place in the mesh.
        wrapped: the chunks of the model, as the optimizer knows them.
        change_row: puts another row with the same labels in the place of each, for example one that reads other
            neighbors. Without pipeline stages.

    Raises:
        ConfigError, DataError: as :class:`~megatron_grit.data.rows.loader.GritDataLoader`.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        context: ParallelContext,
        wrapped: Sequence[DistributedDataParallel],
        change_row: Callable[[PackedRow], PackedRow] | None = None,
    ) -> None:
        self._config, self._context, self._wrapped, self._change_row = config, context, wrapped, change_row
        self.loader = HeldOutLoader(
            config,
            tokenizer,
            context.data_rank,
            context.data_size,
            context.row_multiple,
            equal_rows=context.pipeline_size > 1,
            rows_multiple=context.pipeline_size if len(wrapped) > 1 else 1,
        )
        names = self.loader.stream.sources.names
        self._place_of = {name: place for place, name in enumerate(names)}
        shared = Counter(Path(name).name for name in names)
        self._names = [name if shared[Path(name).name] > 1 else Path(name).name for name in names]
        self._reads = reads_neighbors(config.model)

    def __call__(self) -> dict[str, float]:
        """Loss (nats a token), perplexity and number of predicted tokens, the same on all ranks; the names begin with
        ``valid_``. Collective over all ranks."""
        sums_2G = torch.zeros(2, len(self._names) * len(_BUCKETS), dtype=torch.float64, device=self._context.device)
        num_labels = 0
        if self._config.parallel.overlap:
            gather_weights(self._wrapped)
        with undisturbed(self._wrapped) as chunks, torch.no_grad():
            steps = self.loader.stream.num_steps
            for batch in self.loader.iterate(0, steps):
                positions.at("validation", batch.step, steps)
                (part,) = batch.parts.values()
                num_labels += part.counts.num_labels
                groups = [self._groups(row) for row in part.rows]
                for losses_L, groups_L in zip(self._forward(chunks, part.rows, batch.row_length), groups, strict=False):
                    groups_L = groups_L.to(losses_L.device)
                    sums_2G[0].index_add_(0, groups_L, losses_L.double())
                    if not self._context.context_rank:  # each context parallel rank has the losses of its own tokens
                        sums_2G[1] += torch.bincount(groups_L, minlength=sums_2G.shape[1])
        compat.take_balancing_loss()
        losses, counts = from_last_stage(sum_over_replicas(sums_2G, self._context), self._context).tolist()
        assert sum(counts) == num_labels, "a predicted token was counted twice or not at all"
        shape = (len(self._names), len(_BUCKETS))
        return self._figures(np.reshape(losses, shape), np.reshape(counts, shape))

    def _forward(self, chunks: Sequence[torch.nn.Module], rows: list[PackedRow], row_length: int) -> list[Tensor]:
        """Losses of the predicted tokens of each row, fp32 [L], on the last stage; nothing on others."""
        if self._change_row is not None:
            rows = [self._change_row(row) for row in rows]
            row_length = max(row.tokens_1T.shape[1] for row in rows)
        items = [row.to(self._context.device) for row in rows]

        def forward_step(iterator: Iterator[PackedRow], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            row = next(iterator)
            losses_T = model(row, Output.TOKEN_LOSSES)
            return losses_T, lambda losses_T: (losses_T.new_zeros(()), {"losses": losses_T[row.label_index_L]})

        reported = run_schedule(chunks, self._context, forward_step, items, row_length, forward_only=True)
        return [entry["losses"] for entry in reported]

    def _groups(self, row: PackedRow) -> Tensor:
        """int64 [L]: source x buckets + bucket of each token that is predicted."""
        assert row.loss_mask_1T is not None
        sizes = np.diff(row.cu_seqlens.numpy())
        sources = np.zeros(len(sizes), dtype=np.int64)  # padding comes last
        sources[: len(row.record_ids)] = [self._place_of[record.rpartition("#")[0]] for record in row.record_ids]
        groups_T = np.repeat(sources, sizes) * len(_BUCKETS)
        if self._reads:
            overlap_T = read_overlap(row, self._config.model.retro.chunk_length)
            groups_T += np.where(np.isnan(overlap_T), 0, 1 + np.searchsorted(EDGES, overlap_T))
        return torch.from_numpy(groups_T[row.loss_mask_1T[0].numpy() > 0])

    def _figures(self, losses_SB: np.ndarray, counts_SB: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}

        def add(which: str, losses: np.ndarray, counts: np.ndarray) -> None:
            if counts.sum():
                mean = float(losses.sum() / counts.sum())
                found[f"valid_loss{which}"] = mean
                found[f"valid_perplexity{which}"] = math.exp(mean) if mean < 700 else math.inf
                found[f"valid_tokens{which}"] = int(counts.sum())

        add("", losses_SB, counts_SB)
        for name, losses, counts in zip(self._names, losses_SB, counts_SB, strict=True):
            add(f"/{name}", losses, counts)
        if self._reads:
            kept = 2 + EDGES.index(NEAR_COPY)
            add("_without_copies", losses_SB[:, :kept], counts_SB[:, :kept])
            for place, bucket in enumerate(_BUCKETS):
                add(f"_overlap/{bucket}", losses_SB[:, place], counts_SB[:, place])
        return found


def describe(figures: dict[str, float]) -> str:
    """The figures in a line for the log."""

    def told(which: str) -> str:
        loss, perplexity = figures[f"valid_loss{which}"], figures[f"valid_perplexity{which}"]
        return f"loss {loss:.4f}, perplexity {perplexity:.2f} on {figures[f'valid_tokens{which}']:,} tokens"

    if "valid_loss_without_copies" not in figures:
        return f"validation: {told('')}"
    return f"validation: {told('_without_copies')} without near copies of what is read; with them: {told('')}"
