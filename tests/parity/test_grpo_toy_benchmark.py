"""The toy task of policy gradients, shorter: what is rewarded is sampled more often after a few rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import grpo_toy

pytestmark = pytest.mark.engine  # which the benchmark imports where it begins to learn


def test_rewards_rise(tmp_path: Path) -> None:
    """A third is right by chance. With the gradient the other way round it falls, and without one it stays."""
    grpo_toy.write_corpus(tmp_path)
    toy = grpo_toy.Toy(rounds=8, updates=1, base_steps=100, lr=2e-3, options=grpo_toy.VARIANTS["grpo"])
    rounds = grpo_toy.learn(tmp_path, toy)
    right = [each["right"] for each in rounds]
    assert 0.2 < right[0] < 0.4 and np.mean(right[-2:]) > right[0] + 0.15
    assert rounds[0]["reward_rollout"] == pytest.approx(right[0])
    assert rounds[0]["ratio_rollout"] == pytest.approx(1, abs=1e-5), "the model that is trained is the one that sampled"


def test_what_is_right() -> None:
    assert ("roman of seven", "VII") in grpo_toy.prompts() and len(set(grpo_toy.prompts())) == 24
    assert [grpo_toy.exact(text, "VII") for text in (" VII\n", "VI", "7", "")] == [1, 0, 0, 0]
