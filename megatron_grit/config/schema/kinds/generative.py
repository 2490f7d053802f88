"""Texts and conversations. Their options are older than sections by kind and stand in other sections."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.indexed import TEXTS_MADE_BY
from megatron_grit.config.checks.packing import packing_problems
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LossCost, RowWorkload, TextLengths, predicted_rows

SECTION = None
DATA, WEIGHT, BATCH = "data.generative", "loss.loss_gen_factor", "training.generative_batch_size"
MADE_BY = TEXTS_MADE_BY
LOSS = "next_token"
METRICS = ("loss_gen",)
EMBEDS = False


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """What contradicts itself in the options of a run that trains it; arguments as for other kinds."""
    loss = config.loss
    if loss.microbatch_sequences > 1 and loss.loss_gen_type not in ("microbatch_mean", "sum"):
        yield Problem(
            "loss.microbatch_sequences",
            "loss.microbatch_sequences has an effect only with loss.loss_gen_type microbatch_mean or sum",
        )
    yield from packing_problems(config, multiple, batch=BATCH, rows="training.generative_rows", what="generative rows")


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step as a configuration leads to them; arguments as for other kinds."""
    size, full_rows = config.training.generative_batch_size, None
    if config.data.packing == "window":
        full_rows = config.training.generative_rows
    return predicted_rows(config, "generative", data_size, lengths, batch_size=size, full_rows=full_rows)


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """Nothing: logits and their losses belong to the rows' passes through the model."""
    return LossCost()
