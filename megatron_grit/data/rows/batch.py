"""What a training step receives: packed rows, and the counts that its losses are divided by.

Shape suffix legend: T = tokens of a row, S = segments of a row (one document, query or passage each), L = labels of
a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_grit.data.order.permutation import mix
from megatron_grit.data.rows.neighbors import Neighbors


class TeacherTarget(Protocol):
    """What a teacher says of the tokens of a row."""

    def take(self, index_L: Tensor) -> TeacherTarget:
        """Of the tokens that a context parallel rank holds."""

    def divergence(self, logits_LV: Tensor, losses_L: Tensor, index_L: Tensor | None) -> Tensor:
        """What is added to the loss of each token, before its weight: fp32 [L].

        Args:
            logits_LV: the model's, of this tensor parallel rank's part of the vocabulary.
            losses_L: negative log-likelihood of each label.
            index_L: places of the tokens among those that the context parallel rank holds. None: all of them.
        """


@dataclass(kw_only=True)
class PackedRow:
    """One micro-batch: several segments, one after another, then padding.

    Padding is the last segment of ``cu_seqlens``, so that it attends to itself and nothing else.
    """

    kind: str = ""
    """Name of the kind that trains on the row; empty where none does, as in inference."""
    embeds: bool
    """Whether the model embeds the row's segments, with the attention of embeddings, or predicts their next tokens."""
    tokens_1T: Tensor
    """int64 [1, T]."""
    positions_1T: Tensor
    """int64 [1, T]; restart at 0 in each segment."""
    cu_seqlens: Tensor
    """int32 [S + 1], or [S + 2] where the row ends in padding: 0, ends of the segments, T."""
    max_seqlen: int
    """At least the longest segment, padding included, and above every position."""
    padding_mask_1T: Tensor
    """bool [1, T]; True on padding."""
    record_ids: list[str] = field(default_factory=list)
    """Name of each segment's record, for messages: "prefix#index"."""
    segment_lengths: list[int] | None = None
    """Length of each segment, padding's included, known to the host; :meth:`to` fills it in. Kernels are launched by it
    without waiting for a GPU to hand ``cu_seqlens`` back."""

    # Rows that are predicted
    labels_1T: Tensor | None = None
    """int64 [1, T]; the token that position t predicts (the next one of its segment), 0 where none is."""
    loss_mask_1T: Tensor | None = None
    """float32 [1, T]; weight of the label, 0 where there is none."""
    label_index_L: Tensor | None = None
    """int64 [L]; the positions where it is not 0, found by :meth:`to` while the mask is still on the host."""

    label_values: dict[str, Tensor] = field(default_factory=dict)
    """float32 [T] each: what the row's kind knows of each label beside the token, by names of its own. Unlike the row's
    other tensors they are of all tokens on every context parallel rank."""

    teacher: TeacherTarget | None = None
    """What the row is compared with, for ``loss.teacher``. None: nothing."""
    teacher_ids_TK: Tensor | None = None
    """int32 [T, K]; from a cache of a teacher, its most probable tokens; -1 where it predicts nothing."""
    teacher_log_probs_TK1: Tensor | None = None
    """float32 [T, K + 1]; their log-probabilities, and that of all other tokens."""

    noise_keys: list[int] | None = None
    """Seed of the noise on each segment's embeddings, for training with ``training.neftune_alpha``. None: no noise."""

    neighbors: Neighbors | None = None
    """What the row's chunks read. None: nothing."""

    slots_S: Tensor | None = None
    """int64 [S]; place of each segment in the global list of those of its kind."""

    segment_ids_T: Tensor | None = None
    """int64 [T]; index in 0..S-1 of each token's segment, S on padding; of rows with a result for each segment."""

    # Rows of rated answers
    is_chosen_S: Tensor | None = None
    """bool [S]; True on preferred and desirable answers. The other answer of a pair is the next segment."""
    records_S3: Tensor | None = None
    """int64 [S, 3]; source and record that each segment is of, and which of the record's conversations it is."""
    reference_S: Tensor | None = None
    """float64 [S]; log-probability of each answer under the reference. None: there is none."""

    # Rows that are embedded
    pool_mask_T: Tensor | None = None
    """float32 [T]; 1 on the text of a query or passage, 0 on its instruction and on padding."""
    is_query_S: Tensor | None = None
    """bool [S]; True on queries, False on passages. None: not known."""
    marker_mask_T: Tensor | None = None
    """bool [T]; True on tokens that are no part of the text: brackets and side tokens. None: there are none."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((~self.padding_mask_1T).sum())

    def text_ids(self) -> Tensor:
        """A hash of the text of each segment of an embedded row, without instruction and markers: int64 [S]."""
        if self.segment_ids_T is None or self.pool_mask_T is None or self.slots_S is None:
            raise ValueError("only rows that are embedded have texts")
        pooled = self.pool_mask_T > 0
        if self.marker_mask_T is not None:
            pooled = pooled & ~self.marker_mask_T
        segments, tokens, positions = (
            self.segment_ids_T[pooled],
            self.tokens_1T[0, pooled],
            self.positions_1T[0, pooled],
        )
        count = len(self.slots_S)
        first_S = positions.new_full((count,), self.max_seqlen).scatter_reduce_(0, segments, positions, "amin")
        weights = torch.from_numpy(mix(np.arange(1, self.max_seqlen + 1, dtype=np.uint64)).view(np.int64))
        terms = (tokens + 1) * weights.to(tokens.device)[positions - first_S[segments]]
        return tokens.new_zeros(count).index_add_(0, segments, terms)

    def to(self, device: torch.device) -> PackedRow:
        """Copy with every tensor on ``device``, and with what the host has to know of it."""
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        moved["label_values"] = {name: to_device(values, device) for name, values in self.label_values.items()}
        if self.neighbors is not None:
            moved["neighbors"] = self.neighbors.to(device)
        if self.loss_mask_1T is not None and self.label_index_L is None:
            moved["label_index_L"] = to_device(self.loss_mask_1T[0].nonzero().squeeze(1), device)
        return replace(self, segment_lengths=self.segment_lengths or self.cu_seqlens.diff().tolist(), **moved)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``. A copy from the host to a GPU is queued behind the work that the GPU has, not waited
    for: that takes pinned memory, which torch keeps until the copy is done."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@dataclass(kw_only=True)
class BatchPart:
    """What one kind gives to a step."""

    rows: list[PackedRow]
    """The rows of this data parallel rank."""
    counts: Any
    """What the kind's losses are divided by, counted over the global batch: the dataclass of its file in data/kinds."""
    baseline: list[PackedRow] = field(default_factory=list)
    """Rows of this data parallel rank that the model looks at without training on them."""


@dataclass(kw_only=True)
class StepBatch:
    """One optimizer step's rows on one data parallel rank, and what is known of the whole step.

    Under pipeline parallelism all rows of a step have the same length on all ranks.
    """

    step: int
    parts: dict[str, BatchPart]
    """By name of the kind, in the order in which the step trains them."""
    row_length: int
    """Length of the longest row of the global batch."""
    num_tokens: int
    """Tokens of the global batch that are not padding."""
    num_padded_tokens: int
    """Tokens of the global batch, padding included."""

    @property
    def rows(self) -> list[PackedRow]:
        """The rows of every kind."""
        return [row for part in self.parts.values() for row in part.rows]

    def rows_of(self, kind: str) -> list[PackedRow]:
        """The rows of one kind; none where the step has none."""
        return self.parts[kind].rows if kind in self.parts else []

    def counts_of(self, kind: str) -> Any:
        """The counts of one kind, which the step has rows of."""
        return self.parts[kind].counts
