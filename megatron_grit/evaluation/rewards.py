"""Evaluates a reward model on pairs of answers: how often the preferred one has the higher reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import RewardEvaluation
from megatron_grit.data.text.lines import filled_lines
from megatron_grit.data.text.preferences import parse_preference
from megatron_grit.data.text.records import Record
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import bootstrap_mean
from megatron_grit.evaluation.tasks.task import Figures
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.logs import get_logger, say_loading

if TYPE_CHECKING:
    from megatron_grit.inference.rollouts.reward_model import RewardModel

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A line of a file of pairs."""

    name: str
    """File and line."""
    chosen: Record
    rejected: Record


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of answers.

    Raises:
        DataError: there is none, or a line is none; names file and line.
    """
    pairs = []
    for line in filled_lines(path):
        try:
            record = parse_preference(line.content)
        except DataError as error:
            raise line.error(str(error)) from None
        if record.chosen is None or record.rejected is None:
            raise line.error('has a single answer, and rewards are compared; give "chosen" and "rejected"')
        pairs.append(Pair(name=f"{line.path}:{line.number}", chosen=record.chosen, rejected=record.rejected))
    if not pairs:
        raise DataError("holds no pair of answers", path=path)
    return pairs


def _tokens(model: RewardModel, pair: Pair, side: Literal["chosen", "rejected"]) -> list[int]:
    try:
        return model.tokens(getattr(pair, side))
    except DataError as error:
        raise DataError(f'{pair.name}: "{side}" {error}') from None


def evaluate_rewards(options: RewardEvaluation) -> dict[str, Any]:
    """Evaluate, and write the figures where they are asked for.

    Returns:
        ``accuracy``, the share of the pairs whose preferred answer has the higher reward (a tie is none),
        ``margin``, the mean difference of the two, the mean rewards ``chosen`` and ``rejected``, ``num_pairs``, and
        ``num_equal``, how many of them are two times the same tokens, which are ties and are warned of; under
        ``intervals`` 95 % bootstrap intervals over pairs.

    Raises:
        GritError: pairs that cannot be read or do not fit the model, or a checkpoint of no reward model.
    """
    if options.output is not None:
        check_output(options.output, [options.data])
    pairs = read_pairs(options.data)
    path = resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.inference.rollouts.reward_model import RewardModel
    from megatron_grit.training.checkpoint import read_state

    model = RewardModel.load(path, device=options.device)
    log.info(f"rewards of the answers of {len(pairs):,} pairs")
    equal = np.array([_tokens(model, pair, "chosen") == _tokens(model, pair, "rejected") for pair in pairs])
    if num_equal := int(equal.sum()):
        log.warning(
            f"{options.data}: the answers of {num_equal:,} of {len(pairs):,} pairs are the same tokens; each is a tie, "
            "which accuracy counts as wrong. Leave them out"
        )
    both = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rewards = model.score(both, batch_tokens=options.batch_tokens).astype(np.float64).reshape(-1, 2)
    rewards[equal, 1] = rewards[equal, 0]  # two places of a batch may give other last bits
    margins = rewards[:, 0] - rewards[:, 1]
    intervals = {
        "accuracy": bootstrap_mean(margins > 0),
        "margin": bootstrap_mean(margins),
        "chosen": bootstrap_mean(rewards[:, 0]),
        "rejected": bootstrap_mean(rewards[:, 1]),
    }
    others = {
        "checkpoint": options.checkpoint,
        "step": read_state(path)["step"],
        "data": options.data,
        "num_pairs": len(pairs),
        "num_equal": num_equal,
        "chance_accuracy": 0.5,
    }
    figures = Figures(intervals=intervals, others=others).contents()
    if options.output is not None:
        write_json(options.output, figures)
    return figures
