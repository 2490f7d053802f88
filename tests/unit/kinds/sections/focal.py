"""Texts and conversations that are trained with the focal loss: everything a run says about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LossCost, RowWorkload, TextLengths, predicted_rows
from megatron_grit.errors import MeshError


@dataclass(kw_only=True)
class FocalConfig:
    """Texts and conversations trained with the focal loss."""

    data: list[str] = knob([])
    """Indexed files, as of data.generative."""
    weight: float = knob(1.0, at_least=0)
    """Weight of the loss."""
    batch_size: int = knob(8, at_least=1)
    """Sequences of a global batch."""
    gamma: float = knob(2.0, at_least=0)
    """How much less an easy token counts; 0: the next-token loss."""


SECTION = FocalConfig
DATA, WEIGHT, BATCH = "focal.data", "focal.weight", "focal.batch_size"
MADE_BY = "megatron-grit build-sft"
LOSS = "focal"
METRICS = ("loss_focal", "easy_focal")
EMBEDS = False


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """Too few sequences for the rows of a step."""
    size = config.focal.batch_size  # type: ignore[attr-defined]
    if size < multiple:
        yield Problem(BATCH, f"{BATCH} {size} is below the {multiple} rows of a step", MeshError)


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step."""
    size = config.focal.batch_size  # type: ignore[attr-defined]
    return predicted_rows(config, "focal", data_size, lengths, batch_size=size)


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """Probabilities and shares of a row's tokens."""
    return LossCost(memory=4 * 4 * rows.row_tokens, operations=5.0 * rows.tokens)
