"""The loss of reward models against the code path of TRL's RewardTrainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_grit.losses.reward import bradley_terry


def trl_loss(rewards: Tensor, margin: float, centering: float | None) -> Tensor:
    """``RewardTrainer.compute_loss`` on an object that has what it reads; preferred answers first, [2 P, 1]."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    gather = {"gather": lambda values: values, "gather_for_metrics": lambda values: values}
    own = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(**gather),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2, 2), "margin": torch.full((len(rewards) // 2,), margin)}
    if not margin:
        del inputs["margin"]
    loss: Tensor = trainer.compute_loss(own, lambda **_: SimpleNamespace(logits=rewards), inputs)
    return loss


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("centering", [0.0, 0.01, 0.5])
def test_loss_and_gradient_equal_trl(margin: float, centering: float) -> None:
    generator = torch.Generator().manual_seed(2)
    rewards = (3 * torch.randn(14, 1, generator=generator)).requires_grad_()
    theirs = trl_loss(rewards, margin, centering or None)
    (their_gradient,) = torch.autograd.grad(theirs, rewards)
    chosen, rejected = rewards[:, 0].chunk(2)
    ours = bradley_terry(chosen, rejected, margin=margin, centering=centering).mean()
    (our_gradient,) = torch.autograd.grad(ours, rewards)
    assert abs(ours.item() - theirs.item()) < 1e-5
    assert float((our_gradient - their_gradient).abs().max()) < 1e-6
    plain = bradley_terry(chosen, rejected).mean()
    assert (abs(float(plain - theirs)) > 1e-2) == bool(margin or centering)


def test_far_apart_rewards_stay_finite() -> None:
    chosen, rejected = torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4])
    assert bradley_terry(chosen, rejected).tolist() == [2e4, 0.0]
