"""Completions that were sampled and rewarded: rows of the same make as those of next tokens, with what is known of each
completion beside its tokens.

Shape suffix legend: T = tokens of a row, S = segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.rollout import section
from megatron_grit.data.indexed.label_weights import ANSWERS, LabelWeights
from megatron_grit.data.indexed.rollouts import Rollouts
from megatron_grit.data.kinds import generative
from megatron_grit.data.order.sampler import stream_of
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.stream import PlannedRow
from megatron_grit.data.text.tokenizer import Tokenizer

LEAD_AND_TEXT = generative.LEAD_AND_TEXT
BEHAVIOR, ADVANTAGE = "behavior", "advantage"
"""Names of a row's label values: log-probability under the policy that sampled the token, and advantage of the
completion that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class RolloutCounts:
    """What the policy-gradient loss is divided by, and rewards, over the global batch."""

    num_labels: int
    """Sampled tokens."""
    sizes_S: np.ndarray = field(compare=False)
    """float32 [S]: sampled tokens of each completion."""
    reward_mean: float
    reward_std: float
    """Standard deviation."""

    @property
    def num_samples(self) -> int:
        """Completions."""
        return len(self.sizes_S)

    @property
    def num_segments(self) -> int:
        """Segments: a prompt with its completion each."""
        return len(self.sizes_S)


class RolloutStream(generative.GenerativeStream):
    """So many completions a step, in an order of their own. Labels are the sampled tokens, whatever the run's are.

    Raises:
        ConfigError, DataError: as in the base class, and for sources without rewards.
    """

    kind = "rollout"
    record_draws = stream_of("rollout")
    reads_texts = False

    def open_beside(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Open what is known of completions; no teacher's cache and no neighbors."""
        scale = section(config).advantages
        self.rollouts = [Rollouts(self.sources[number], scale) for number in range(len(self.sources))]

    @staticmethod
    def labels(config: RunConfig, tokenizer: Tokenizer) -> LabelWeights:
        """As in the base class: sampled tokens, whatever the run weighs the labels of texts by."""
        return ANSWERS

    @staticmethod
    def full_rows(config: RunConfig) -> int | None:
        """Rows are as full as the completions of a step make them."""
        return None

    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> RolloutCounts:  # type: ignore[override]
        """As in the base class."""
        sizes_S = np.zeros(sum(len(row.segments) for row in rows), dtype=np.float32)
        rewards_S = np.zeros(len(sizes_S))
        for row in rows:
            sizes_S[row.slots] = [segment.num_labels for segment in row.segments]
            rewards_S[row.slots] = [self.rollouts[one.source].rewards_R[one.record] for one in row.segments]
        return RolloutCounts(
            num_labels=int(sizes_S.sum(dtype=np.int64)),
            sizes_S=sizes_S,
            reward_mean=float(rewards_S.mean()),
            reward_std=float(rewards_S.std()),
        )

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        made = make_row(row, row_length, pad_id)
        behavior_T = np.zeros(row_length, dtype=np.float32)
        advantage_T = np.zeros(row_length, dtype=np.float32)
        end = 0
        for segment in row.segments:
            # Position t predicts token t + 1 of its own segment.
            begin, end = end, end + segment.length
            known = self.rollouts[segment.source]
            if known.has_behavior:
                behavior_T[begin : end - 1] = known.behavior(segment.record, segment.start + 1, segment.stop)
            advantage_T[begin:end] = known.advantages_R[segment.record]
        assert made.loss_mask_1T is not None
        behavior_T[made.loss_mask_1T[0].numpy() == 0] = 0.0
        places = [[segment.source, segment.record, segment.start] for segment in row.segments]
        made.records_S3 = torch.tensor(places, dtype=torch.int64).view(-1, 3)
        made.label_values = {BEHAVIOR: torch.from_numpy(behavior_T), ADVANTAGE: torch.from_numpy(advantage_T)}
        return made


def make_row(planned: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
    """A row of prompts with completions, without what is known beside the tokens; arguments as for other kinds."""
    return generative.make_row(planned, row_length, pad_id, ANSWERS, RolloutStream.kind)


STREAM = RolloutStream
