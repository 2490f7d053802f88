"""Next-token loss on held-out text, with an interval over its records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_grit.errors import DataError, NumericsError
from megatron_grit.evaluation.bootstrap import Interval, bootstrap_ratio
from megatron_grit.evaluation.tasks.task import Figures, Lengths


class TokenLossModel(Protocol):
    """The part of :class:`megatron_grit.inference.model.GritModel` that is used here."""

    def token_losses(self, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        """For each record of an indexed file the sum of its token losses in nats, and its number of supervised tokens.

        Returns:
            float [n] and integer [n].
        """


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """Mean next-token loss over the supervised tokens of all records."""

    loss: Interval
    """Nats per token; the interval is over records."""
    num_records: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss.value)


def summarize_losses(
    loss_sums: np.ndarray, num_tokens: np.ndarray, *, num_resamples: int = 2000, seed: int = 0
) -> LossReport:
    """Mean loss per token. Tokens of a record are not independent, so the bootstrap draws records.

    Args:
        loss_sums: [n] sum of each record's token losses.
        num_tokens: [n] supervised tokens of each record; records without any are left out.

    Raises:
        NumericsError: a loss that is not finite.
        ValueError: no supervised token.
    """
    supervised = np.asarray(num_tokens) > 0
    sums, counts = np.asarray(loss_sums)[supervised], np.asarray(num_tokens)[supervised]
    if not np.isfinite(sums).all():
        record = int(np.flatnonzero(supervised)[np.flatnonzero(~np.isfinite(sums))[0]])
        raise NumericsError(f"the next-token loss of record {record} is not finite; was the training run stable?")
    interval = bootstrap_ratio(sums, counts, num_resamples=num_resamples, seed=seed)
    return LossReport(loss=interval, num_records=int(supervised.sum()), num_tokens=int(counts.sum()))


def evaluate_perplexity(model: TokenLossModel, prefix: str) -> LossReport:
    """Mean next-token loss of ``model`` over the generative indexed file ``prefix``.

    Raises:
        DataError: no indexed file there, or nothing in it is supervised.
    """
    return report_losses(*model.token_losses(prefix), prefix)


def report_losses(loss_sums: np.ndarray, num_tokens: np.ndarray, prefix: str) -> LossReport:
    """As :func:`summarize_losses`, of the records of a file.

    Raises:
        DataError: nothing in it is supervised.
    """
    if not np.asarray(num_tokens).any():
        raise DataError("no supervised token in this file", path=prefix)
    return summarize_losses(loss_sums, num_tokens)


def read(prefix: str) -> str:
    """The prefix of a generative indexed file; :meth:`GritModel.token_losses` checks the file, for it knows the
    tokenizer."""
    return prefix


def run(model: TokenLossModel, prefix: str, lengths: Lengths) -> Figures:
    """Mean next-token loss of a model, and its perplexity."""
    return loss_figures(evaluate_perplexity(model, prefix), "lm_loss", {})


def loss_figures(report: LossReport, name: str, others: Mapping[str, Any]) -> Figures:
    """A report as figures.

    Args:
        report: the report.
        name: of the loss.
        others: what else is told.
    """
    counts = {"perplexity": report.perplexity, "num_records": report.num_records, "num_tokens": report.num_tokens}
    return Figures(intervals={name: report.loss}, others={**others, **counts})
