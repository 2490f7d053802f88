"""Pairs of answers for a reward model, which gives each answer one number: everything a run says about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_grit.config.blend import expand_item
from megatron_grit.config.checks.packing import packing_problems
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.embedding_shape import scalar_problem
from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LossCost, RowWorkload, TextLengths, predicted_rows


@dataclass(kw_only=True)
class RewardConfig:
    """Training of a reward model on pairs of answers (docs/rewards.md)."""

    data: list[str] = knob([], path=expand_item)
    """Indexed files of megatron-grit build-preference, of pairs, in the notation of data.generative."""
    weight: float = knob(1.0, at_least=0)
    """Weight of the loss in the loss of a step."""
    batch_size: int = knob(64, at_least=1)
    """Pairs of a global batch."""
    rows: int | None = knob(None, at_least=1)
    """With data.packing window, rows of a global batch that are filled from the stream of pairs, in place of
    batch_size."""
    margin: float = knob(0.0, at_least=0)
    """By how much the reward of the preferred answer is to be above the other one's before a pair counts as told
    apart."""
    centering: float = knob(0.0, at_least=0)
    """Weight of the square of the sum of both rewards, which keeps rewards around zero; 0.01 is usual. Without it only
    their differences are trained."""
    over_long: Literal["stop", "drop"] = "stop"
    """Pairs whose conversations do not fit one row of data.tokens_per_row together, or of which one is above
    max_position_embeddings: end the run, or leave them out. None is cut: the reward is read at an answer's last token,
    which ends it."""


SECTION = RewardConfig
DATA, WEIGHT, BATCH = "reward.data", "reward.weight", "reward.batch_size"
MADE_BY = "megatron-grit build-preference"
LOSS = "reward"
METRICS = ("loss_reward", "accuracy_reward", "margin_reward", "chosen_reward", "rejected_reward")
EMBEDS = True
COMPARES_ROWS = False


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """What contradicts itself in the options of a run that trains it; arguments as for other kinds."""
    if (problem := scalar_problem(config.embedding)) is not None:
        yield Problem("embedding", f"a reward is one number for an answer, read at its last token: {problem}")
    if "embedding" in config.training.objective:
        yield Problem(
            "training.objective",
            "a reward model has one number in place of an embedding; train embedding and reward in runs of their own",
        )
    if config.model.retro.num_neighbors:
        yield Problem(
            "training.objective", "pairs of answers have no neighbors, and model.retro reads some; leave it out"
        )
    yield from packing_problems(config, multiple, batch=BATCH, rows="reward.rows", what="rows of pairs")


def section(config: RunConfig) -> RewardConfig:
    """The section of a run."""
    found = config.reward  # type: ignore[attr-defined]  # config/kinds.py has added it
    assert isinstance(found, RewardConfig)
    return found


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step as a configuration leads to them; arguments as for other kinds. A pair is taken for two
    sequences."""
    own = section(config)
    full_rows = own.rows if config.data.packing == "window" else None
    rows = predicted_rows(config, "reward", data_size, lengths, batch_size=2 * own.batch_size, full_rows=full_rows)
    return replace(rows, embeds=EMBEDS, labels=0, row_labels=0)


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """A few numbers for each segment."""
    return LossCost(memory=4 * 8 * rows.segments, operations=20.0 * rows.segments)
