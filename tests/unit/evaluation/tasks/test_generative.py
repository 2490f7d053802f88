from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_grit.errors import DataError, NumericsError
from megatron_grit.evaluation.tasks.generative import evaluate_perplexity, summarize_losses


class FixedLosses:
    def __init__(self, loss_sums: list[float], num_tokens: list[int]) -> None:
        self.answer = np.array(loss_sums), np.array(num_tokens)

    def token_losses(self, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        return self.answer


def test_loss_is_per_token_not_per_record() -> None:
    report = evaluate_perplexity(FixedLosses([2.0, 0.0, 30.0], [1, 0, 10]), "held_out")
    assert report.loss.value == 32 / 11
    assert (report.num_records, report.num_tokens) == (2, 11)
    assert report.perplexity == math.exp(32 / 11)
    assert 2 <= report.loss.low < report.loss.value < report.loss.high <= 3


def test_interval_is_over_records() -> None:
    """Twenty records of a hundred equal tokens carry twenty observations, not two thousand."""
    means = np.random.default_rng(0).normal(3, 0.5, size=20)
    interval = summarize_losses(means * 100, np.full(20, 100)).loss
    expected = 2 * 1.96 * means.std() / math.sqrt(20)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.15)


def test_nothing_supervised() -> None:
    with pytest.raises(DataError, match="held_out: no supervised token"):
        evaluate_perplexity(FixedLosses([0.0], [0]), "held_out")


def test_loss_that_is_not_finite_names_its_record() -> None:
    with pytest.raises(NumericsError, match="record 2"):
        summarize_losses(np.array([1.0, 0.0, np.inf]), np.array([1, 0, 4]))
