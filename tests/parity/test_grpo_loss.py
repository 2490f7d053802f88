"""The loss of rollouts against the code path of TRL's GRPOTrainer, on padded completions there and packed ones here.

Shape suffix legend: B = completions, T = tokens of one, padded; P = tokens of the packed row.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_grit.data.indexed.rollouts import group_advantages
from megatron_grit.losses.policy_gradient import PolicyLoss, kl_to_reference, policy_loss, token_weights

LENGTHS = [3, 9, 1, 6, 12, 5, 7, 2]
GROUP = 4
COMPLETION_TOKENS = 16
BASE: dict[str, Any] = {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "kl": 0.0}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "sequence", {}),
    "grpo, kl": ("grpo", "sequence", {"kl": 0.1}),
    "dapo, clip higher": ("dapo", "token", {"clip_high": 0.28}),
    "dapo, kl": ("dapo", "token", {"kl": 0.04}),
    "dr_grpo": ("dr_grpo", "constant", {}),
    "dr_grpo, kl": ("dr_grpo", "constant", {"kl": 0.1}),
    "gspo": ("grpo", "sequence", {"ratio": "sequence", "clip_low": 3e-2, "clip_high": 4e-2}),
    "gspo, kl": ("grpo", "sequence", {"ratio": "sequence", "clip_low": 3e-2, "clip_high": 4e-2, "kl": 0.1}),
}


class Case:
    """Log-probabilities of completions, under the policy, the one that sampled, and the reference: fp64 [B, T]."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = len(LENGTHS), max(LENGTHS)
        self.policy = torch.randn(shape, generator=generator) * 0.6 - 2
        self.behavior = self.policy + 0.3 * torch.randn(shape, generator=generator)
        self.reference = self.policy + 0.5 * torch.randn(shape, generator=generator)
        self.mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        self.rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.3, 0.1, 0.9, 0.2])
        self.groups = np.arange(len(LENGTHS)) // GROUP


def trl_advantages(case: Case, scale: str) -> Tensor:
    """As GRPOTrainer takes them (scale_rewards "group" and "none")."""
    rewards = torch.tensor(case.rewards).view(-1, GROUP)
    away = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        away = away / (rewards.std(1, keepdim=True) + 1e-4)
    return away.flatten()


def trl_loss(case: Case, loss_type: str, options: dict[str, Any], advantages: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Loss, its gradient, and metrics of ``GRPOTrainer._compute_loss`` on an object that has what it reads."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    policy = case.policy.clone().requires_grad_()
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, reduce=lambda values, **_: values, gather=lambda values: values
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(policy), None),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=options["kl"],
        current_gradient_accumulation_steps=1,
        epsilon_low=options["clip_low"],
        epsilon_high=options["clip_high"],
        importance_sampling_level=options["ratio"],
        loss_type=loss_type,
        max_completion_length=COMPLETION_TOKENS,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    shape = case.policy.shape
    inputs = {
        "prompt_ids": torch.zeros(shape[0], 1, dtype=torch.long),
        "prompt_mask": torch.ones(shape[0], 1),
        "completion_ids": torch.zeros(shape, dtype=torch.long),
        "completion_mask": case.mask.long(),
        "advantages": advantages,
        "old_per_token_logps": case.behavior,
        "ref_per_token_logps": case.reference,
        "num_items_in_batch": case.mask.sum(),
    }
    loss = grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), gradient, trainer._metrics["train"]


def packed(values: Tensor) -> Tensor:
    """[B, T] to [P]: a token of a prompt before each completion, and padding of whatever at the end."""
    junk = torch.full((1,), 1e4)
    return torch.cat([torch.cat((junk, row[:length])) for row, length in zip(values, LENGTHS, strict=True)] + [junk])


def own_loss(case: Case, aggregation: str, options: dict[str, Any], advantages: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The same of our functions on one packed row, its gradient in the shape of TRL's."""
    policy = case.policy.clone().requires_grad_()
    ones = torch.ones_like(policy)
    mask_P = packed(ones) == 1
    sizes_P = packed(ones * torch.tensor(LENGTHS)[:, None])
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS) + 1), torch.tensor([*(n + 1 for n in LENGTHS), 1]))
    weights_P = token_weights(
        mask_P,
        aggregation,
        num_tokens=sum(LENGTHS),
        num_completions=len(LENGTHS),
        sizes_T=sizes_P,
        completion_tokens=COMPLETION_TOKENS,
    )
    log_probs_P = packed(policy)
    found = policy_loss(
        log_probs_P,
        packed(case.behavior),
        packed(ones * advantages.float()[:, None]),
        weights_P,
        mask_P,
        PolicyLoss(ratio=options["ratio"], clip_low=options["clip_low"], clip_high=options["clip_high"]),
        num_tokens=sum(LENGTHS),
        segments_T=segments,
    )
    loss = found.loss
    if options["kl"]:
        kl_P = kl_to_reference(torch.where(mask_P, log_probs_P, 0.0), torch.where(mask_P, packed(case.reference), 0.0))
        loss = loss + options["kl"] * (weights_P * kl_P).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), gradient, found


@pytest.mark.parametrize("scale", ["std", "mean"])
def test_advantages(scale: Any) -> None:
    case = Case()
    ours = group_advantages(case.groups, case.rewards, scale)
    np.testing.assert_allclose(ours, trl_advantages(case, scale).numpy(), atol=1e-6)


def test_advantages_of_uneven_and_equal_groups() -> None:
    groups, rewards = np.array([7, 2, 7, 2, 9, 2, 5, 5]), np.array([1.0, 0.1, 0.0, 0.1, 3.0, 0.1, 0.7, 0.7])
    for scale in ("std", "mean"):
        ours = group_advantages(groups, rewards, scale)  # type: ignore[arg-type]
        assert ours[[1, 3, 4, 5, 6, 7]].tolist() == [0] * 6
        assert ours[0] == -ours[2] == pytest.approx(0.5 if scale == "mean" else 0.5**0.5, rel=1e-3)


@pytest.mark.parametrize("scale", ["std", "mean"])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_equal_trl(name: str, scale: str) -> None:
    case, (loss_type, aggregation, changed) = Case(), VARIANTS[name]
    options = BASE | changed
    advantages = trl_advantages(case, scale)
    theirs, their_gradient, metrics = trl_loss(case, loss_type, options, advantages)
    ours, our_gradient, found = own_loss(case, aggregation, options, advantages)
    assert abs(float(ours - theirs)) < 1e-5
    assert float((our_gradient - their_gradient).abs().max()) < 1e-5
    assert float(their_gradient.abs().max()) > 1e-3
    (clipped,) = metrics["clip_ratio/region_mean"]
    assert 0 < clipped < 1
    if options["ratio"] == "token":
        assert float(found.clipped) == pytest.approx(clipped, abs=1e-6)


def test_another_variant_is_another_loss() -> None:
    """What the comparison above can see."""
    case = Case()
    advantages = trl_advantages(case, "std")
    losses = []
    for _, aggregation, changed in VARIANTS.values():
        losses.append(float(own_loss(case, aggregation, BASE | changed, advantages)[0]))
    assert all(abs(a - b) > 1e-4 for place, a in enumerate(losses) for b in losses[:place])


def test_unknown_aggregation() -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="unknown aggregation"):
        token_weights(ones, "mean", num_tokens=2, num_completions=1, sizes_T=ones, completion_tokens=1)
