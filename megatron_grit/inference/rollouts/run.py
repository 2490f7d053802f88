"""A file of prompts to a file of rewarded completions; a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.indexed.rollouts import equal_groups
from megatron_grit.data.rollouts.counts import CompletionCounts
from megatron_grit.data.rollouts.records import SAMPLING, PromptGroup, read_groups
from megatron_grit.data.text.lines import parse_json
from megatron_grit.inference.rollouts.endpoint import Endpoint
from megatron_grit.inference.rollouts.in_order import in_order
from megatron_grit.inference.rollouts.options import RewardOptions, RolloutOptions, RolloutSampling
from megatron_grit.inference.rollouts.rewards import Rewards
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import check_output, json_text
from megatron_grit.store.rows import LineFile


@dataclass(kw_only=True)
class RolloutSummary(CompletionCounts):
    """What was written."""

    num_cut: int
    """Completions that ended at the limit of tokens."""
    num_without_ids: int
    """Completions without ids of tokens or their log-probabilities."""

    def remarks(self) -> list[tuple[int, str]]:
        """As in the base class."""
        return [
            *super().remarks(),
            (self.num_cut, "completions were cut off at max_tokens"),
            (self.num_without_ids, "completions have no log-probabilities of tokens"),
        ]


def write_rollouts_file(options: RolloutOptions) -> RolloutSummary:
    """Sample if it has to be, reward and write.

    Raises:
        GritError: a file, a reward or an endpoint that cannot be used, or an output that is input or cannot be written.
    """
    source = options.prompts or options.completions
    assert source is not None
    check_output(options.output, [source])
    rewards = Rewards(options)  # before anything is read: a wrong name is found at once
    groups = list(read_groups(source, answered=options.completions is not None))
    endpoint = None if options.endpoint is None else Endpoint(options)

    def rewarded(first: int) -> Iterator[list[str]]:
        for group in _answered(groups[first:], options, endpoint, first):
            rewards.add(group)
            yield [json_text(group.to_json())]

    with LineFile(Path(options.output)) as file:
        identity, doing = _identity(options, groups, endpoint), "sampling" if endpoint else "rewarding"
        file.fill(identity, len(groups), rewarded, doing, "prompt")
        summary = _summary(file.lines())
        file.publish()
    return summary


def _answered(
    groups: list[PromptGroup], options: RolloutOptions, endpoint: Endpoint | None, first: int
) -> Iterable[PromptGroup]:
    if endpoint is None:
        return groups

    def work(numbered: tuple[int, PromptGroup]) -> PromptGroup:
        number, group = numbered
        return endpoint.sample(group, options, options.seed + number)

    return in_order(list(enumerate(groups, first)), work, options.concurrency)


def _identity(options: RolloutOptions, groups: list[PromptGroup], endpoint: Endpoint | None) -> list[Any]:
    """What the lines follow from: prompts, rewards, and how completions were drawn by which model."""
    given = digest_of_settings([group.to_json() for group in groups])
    how = {each.name: getattr(options, each.name) for each in fields(RewardOptions)}
    if endpoint is not None:
        how |= {each.name: getattr(options, each.name) for each in fields(RolloutSampling)}
        how["model"] = endpoint.model
    return [given, how]


def _summary(lines: Iterator[str]) -> RolloutSummary:
    numbers, rewards, num_cut, num_without, num_tempered = [], [], 0, 0, 0
    for number, line in enumerate(lines):
        value = parse_json(line.encode())
        is_tempered = any(value.get(name, 1) != 1 for name in SAMPLING)
        for completion in value["completions"]:
            numbers.append(number)
            rewards.append(completion["reward"])
            num_tempered += is_tempered
            num_cut += completion.get("finish_reason") == "length"
            num_without += "logprobs" not in completion
    groups, values = np.array(numbers), np.array(rewards)
    return RolloutSummary(
        num_prompts=len(np.unique(groups)),
        num_completions=len(values),
        reward_mean=float(values.mean()),
        reward_std=float(values.std()),
        num_equal_prompts=len(np.unique(groups[equal_groups(groups, values)])),
        num_tempered=num_tempered,
        num_cut=num_cut,
        num_without_ids=num_without,
    )
