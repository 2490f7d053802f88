"""The losses of preferences against the code paths of TRL's trainers, on bare objects that have what those read."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.losses.log_probs import segment_sums
from megatron_grit.losses.preference import Answers, PreferenceOptions, pair_losses, rated_losses

SIZES = torch.tensor([[4, 7, 1, 12, 3], [6, 2, 9, 12, 5]])
"""Tokens of preferred answers and of the others."""


class Case:
    """Token log-probabilities of answers, padded: float64 [2, pairs, tokens]."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        shape = (*SIZES.shape, int(SIZES.max()))
        self.mask = torch.arange(shape[2]) < SIZES[..., None]
        # Likely ones too, of which the odds ratio takes log(1 - p).
        scale = torch.tensor([0.02, 1.0, 0.5, 2.0, 0.1])[:, None]
        self.policy = -(torch.rand(shape, generator=generator).double() * scale + 1e-3) * self.mask
        self.reference = (self.policy + 0.2 * torch.randn(shape, generator=generator).double()) * self.mask
        self.policy.requires_grad_()

    def answers(self) -> tuple[Answers, Answers]:
        """As the objective makes them of a row of all answers, one after another."""
        found = []
        for side in range(2):
            ids = torch.arange(SIZES.shape[1])[:, None].expand(self.mask[side].shape).flatten()
            mask = self.mask[side].flatten().float()
            sums = [
                segment_sums(values.flatten(), mask, ids, SIZES.shape[1])
                for values in (self.policy[side], self.reference[side], torch.ones_like(self.mask[side]))
            ]
            found.append(Answers(log_probs_A=sums[0], reference_A=sums[1], num_tokens_A=sums[2]))
        return found[0], found[1]


def both(loss: Tensor, case: Case) -> tuple[float, Tensor]:
    """A loss and its gradient with respect to the tokens."""
    (gradient,) = torch.autograd.grad(loss, case.policy)
    return float(loss), gradient * case.mask


def same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    assert ours[1].abs().max() > 1e-3


def trl_dpo(case: Case, loss_type: str, beta: float) -> Tensor:
    """``DPOTrainer._compute_loss``."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    pad = torch.zeros(2 * SIZES.shape[1], 1, dtype=torch.float64)

    def model(**_: Any) -> Any:
        tokens = case.policy.flatten(0, 1)
        return SimpleNamespace(
            log_probs=tokens, entropy=tokens.detach(), mean_logits=tokens.detach(), is_top1=tokens > 0
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda values: values, gather=lambda values: values
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=0.0,
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.cat([pad.bool(), case.mask.flatten(0, 1)], 1).long()
    reference = case.reference.sum(-1)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    found: Tensor = dpo.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return found


@pytest.mark.parametrize(
    ("loss", "loss_type", "beta"), [("dpo", "sigmoid", 0.1), ("dpo_norm", "sigmoid_norm", 5.0), ("ipo", "ipo", 0.1)]
)
def test_pairs_with_a_reference(loss: str, loss_type: str, beta: float) -> None:
    case = Case()
    losses, _, _ = pair_losses(*case.answers(), PreferenceOptions(loss=loss, beta=beta))
    same(both(losses.mean(), case), both(trl_dpo(case, loss_type, beta), case))


def trl_cpo(case: Case, loss_type: str, options: PreferenceOptions, ratios: bool) -> Tensor:
    """``CPOTrainer.cpo_loss``."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        loss_type=loss_type,
        simpo_gamma=options.gamma_beta_ratio * options.beta,
    )
    sums = case.policy.sum(-1) - (case.reference.sum(-1) if ratios else 0)
    values = sums if ratios else sums / SIZES
    losses: Tensor = cpo.CPOTrainer.cpo_loss(trainer, values[0], values[1])[0]
    return losses.mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pairs_with_label_smoothing_and_without_a_reference(smoothing: float) -> None:
    for loss, loss_type, ratios in (("simpo", "simpo", False), ("dpo", "sigmoid", True)):
        case = Case()
        options = PreferenceOptions(loss=loss, beta=2.0, label_smoothing=smoothing, gamma_beta_ratio=0.25)
        losses, _, _ = pair_losses(*case.answers(), options)
        same(both(losses.mean(), case), both(trl_cpo(case, loss_type, options, ratios), case))


def test_the_odds_ratio() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    case = Case()
    losses, first, second = pair_losses(*case.answers(), PreferenceOptions(loss="orpo", beta=0.1))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.1)
    per_token = case.policy.sum(-1) / SIZES
    theirs, *rewards = orpo.ORPOTrainer.odds_ratio_loss(trainer, per_token[0], per_token[1])[:3]
    same(both(losses.mean(), case), both(-theirs.mean(), case))
    torch.testing.assert_close(torch.stack([first, second]), torch.stack(rewards).double(), atol=1e-6, rtol=1e-5)


def test_rated_answers() -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    case = Case()
    options = PreferenceOptions(loss="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    first, second = case.answers()
    every = Answers(
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in vars(first)}  # all of one row
    )
    label = torch.arange(2 * SIZES.shape[1]) < SIZES.shape[1]
    kl = 0.17
    losses, rewards = rated_losses(every, label, kl, options)

    def model(**_: Any) -> Any:
        tokens = case.policy.flatten(0, 1)
        return SimpleNamespace(
            log_probs=tokens, entropy=tokens.detach(), mean_logits=tokens.detach(), is_top1=tokens > 0
        )

    mask = torch.cat([torch.zeros(len(label), 1).bool(), case.mask.flatten(0, 1)], 1).long()
    metrics: dict[str, list[float]] = defaultdict(list)
    reference = case.reference.sum(-1).flatten()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda values: values, num_processes=1, gather=lambda values: values
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda *_: torch.full((len(label),), kl, dtype=torch.float64),
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": label,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros(len(label), dtype=torch.float64),
    }
    theirs = kto.KTOTrainer._compute_loss(trainer, model, inputs, False)
    same(both(losses.mean(), case), both(theirs, case))
    assert rewards == pytest.approx((0.3 * (case.policy.sum(-1).flatten() - reference)).detach(), abs=1e-9)


def test_a_sum_of_a_thousand_tokens_keeps_small_differences() -> None:
    """In fp32 it would not: the control."""
    values = torch.full((2000,), 5.0)
    values[1500] += 1e-5 * 4
    ids = torch.arange(2000) // 1000
    sums = segment_sums(values, torch.ones(2000), ids, 2)
    exact = float(values[1500].double() - 5)
    assert float(sums[1] - sums[0]) == pytest.approx(exact, rel=1e-6) and exact > 0
    in_fp32 = torch.zeros(2).index_add(0, ids, values)
    assert float(in_fp32[1] - in_fp32[0]) != pytest.approx(exact, rel=1e-2)


def test_infinite_losses_without_a_label_do_not_count() -> None:
    values = torch.tensor([math.inf, 2.0, 3.0, math.nan], requires_grad=True)
    sums = segment_sums(values, torch.tensor([0.0, 1.0, 0.5, 0.0]), torch.tensor([0, 0, 1, 2]), 2)
    assert sums.tolist() == [2.0, 1.5]
    sums.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0.0, 1.0, 0.5, 0.0]
