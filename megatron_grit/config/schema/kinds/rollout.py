"""Completions that were sampled and rewarded, for policy gradients: everything a run says about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.blend import expand_item
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LossCost, RowWorkload, TextLengths, predicted_rows
from megatron_grit.errors import MeshError


@dataclass(kw_only=True)
class RolloutConfig:
    """Policy gradients on completions that were sampled and rewarded: GRPO and its variants (docs/rl.md)."""

    data: list[str] = knob([], path=expand_item)
    """Sources of completions, indexed files of megatron-grit build-rollouts, in the notation of data.generative."""
    weight: float = knob(1.0, at_least=0)
    """Weight of the loss."""
    batch_size: int = knob(64, at_least=1)
    """Completions of a global batch. A file of N completions is used once in N / batch_size steps."""
    advantages: Literal["std", "mean"] = "std"
    """How a completion's reward is compared with those of its group, the completions of one prompt. std: less their
    mean, divided by their standard deviation (GRPO). mean: less their mean only (Dr. GRPO), since to divide weighs
    prompts up that are nearly always, or nearly never, solved."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped. token: each token's probability ratio of the model and the policy that sampled it (PPO, GRPO).
    sequence: the geometric mean of a completion's ratios (GSPO), which is much nearer to 1, so clip_low and clip_high
    have to be smaller: 3e-4 and 4e-4 as published."""
    clip_low: float = knob(0.2, at_least=0, at_most=1)
    """A ratio below 1 - clip_low does not lower a completion's probability any more."""
    clip_high: float = knob(0.2, at_least=0)
    """A ratio above 1 + clip_high does not raise it any more. Above clip_low, as 0.28 in DAPO, unlikely tokens have
    more room to rise."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """How losses of tokens become that of the step. token: their mean over the global batch (DAPO). sequence: the mean
    over completions of each one's mean (GRPO), in which a token of a long completion counts less. constant: their sum
    divided by completions times completion_tokens (Dr. GRPO), which no length biases."""
    completion_tokens: int = knob(1024, at_least=1)
    """For aggregation constant: tokens of the longest completion that may be sampled."""
    behavior: Literal["recorded", "start"] = "recorded"
    """Log-probabilities of the policy that sampled. recorded: those that build-rollouts found in its input; of sources
    without them as start. start: of the model as the run starts, which has to be the one that sampled; they are
    computed before the first step and kept in data.cache_dir, and differ from recorded ones by what the sampler
    computes otherwise."""
    kl_weight: float = knob(0.0, at_least=0)
    """Weight of the divergence from a reference, r - 1 - log r with r its ratio to the model on sampled tokens (GRPO).
    0: no reference."""
    reference: Literal["start", "adapters_off"] = "start"
    """With kl_weight: the model as the run starts, or of a run with adapters their base. Its log-probabilities are
    computed before the first step and kept, as those of behavior."""


SECTION = RolloutConfig
DATA, WEIGHT, BATCH = "rollout.data", "rollout.weight", "rollout.batch_size"
MADE_BY = "megatron-grit build-rollouts"
LOSS = "policy_gradient"
METRICS = (
    "loss_rollout",
    "reward_rollout",
    "reward_std_rollout",
    "ratio_rollout",
    "clipped_rollout",
    "kl_rollout",
    "entropy_rollout",
)
EMBEDS = False


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """What contradicts itself in the options of a run that trains it; arguments as for other kinds."""
    own, size = section(config), section(config).batch_size
    if size < multiple:
        yield Problem(BATCH, f"{BATCH} {size} is below the {multiple} rows of a step", MeshError)
    if own.aggregation != "constant" and own.completion_tokens != RolloutConfig.completion_tokens:
        yield Problem(
            "rollout.completion_tokens",
            "rollout.completion_tokens has an effect only with rollout.aggregation constant",
        )
    if own.reference != "start" and not own.kl_weight:
        yield Problem("rollout.reference", f"rollout.reference {own.reference} has no effect without rollout.kl_weight")
    if own.kl_weight and own.reference == "adapters_off" and config.adapter.kind == "none":
        yield Problem("rollout.reference", "rollout.reference adapters_off needs adapters; set adapter.kind, or start")
    if config.data.over_long == "split":
        yield Problem(
            "data.over_long",
            "data.over_long split would cut completions into pieces, and rewards are of whole ones; set it to drop or "
            "truncate",
        )


def extra_metrics(options: RolloutConfig) -> list[str]:
    """Names of metrics that only some runs have."""
    return ["kl_reference_rollout"] if options.kl_weight else []


def section(config: RunConfig) -> RolloutConfig:
    """The section of a run."""
    found = config.rollout  # type: ignore[attr-defined]  # config/kinds.py has added it
    assert isinstance(found, RolloutConfig)
    return found


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step as a configuration leads to them; arguments as for other kinds."""
    return predicted_rows(config, "rollout", data_size, lengths, batch_size=section(config).batch_size)


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """Ratios, their clipped copy and the shares of a row's tokens, in fp32."""
    return LossCost(memory=4 * 8 * rows.row_tokens, operations=20.0 * rows.tokens)
