"""The next-token loss: what its sum over rows is, and on what it depends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_grit.losses.next_token import KINDS, next_token_loss


def sum_over_rows(rows: list[tuple[Tensor, Tensor]], kind: str, num_sequences: int) -> Tensor:
    num_loss_tokens = int(sum(mask.sum() for _, mask in rows))
    shares = [
        next_token_loss(
            losses,
            mask,
            kind,
            num_loss_tokens=num_loss_tokens,
            num_groups=len(rows) if kind == "mixed" else num_sequences,
        )
        for losses, mask in rows
    ]
    return torch.stack(shares).sum()


def sequences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 17, 5, 40, 9, 1, 26, 11]
    return [
        (
            torch.rand(n, generator=generator).double() * 9,
            (torch.rand(n, generator=generator) < 0.6).float().index_fill(0, torch.tensor([0]), 1.0),
        )
        for n in lengths
    ]


def join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([losses for losses, _ in parts]), torch.cat([mask for _, mask in parts])


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_independent_of_how_sequences_share_rows(kind: str) -> None:
    singles = sequences()
    losses, mask = join(singles)
    expected = (losses * mask).sum() / (mask.sum() if kind == "token" else len(singles))
    for rows in (singles, [join(singles[:2]), join(singles[2:])], [join(singles[::2]), join(singles[1::2])]):
        assert sum_over_rows(rows, kind, len(singles)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_mixed_is_the_mean_of_row_means() -> None:
    singles = sequences()
    rows = [join(singles[:2]), join(singles[2:])]
    means = [(losses * mask).sum() / mask.sum() for losses, mask in rows]
    assert sum_over_rows(rows, "mixed", len(singles)).item() == pytest.approx((sum(means) / 2).item(), rel=1e-6)


def test_gradient_accumulation_toy() -> None:
    """Micro-batches of 1 and 4 supervised tokens with losses 8 and 2 each: 3.2 a token; the mean of means says 5."""
    rows = [(torch.tensor([8.0]), torch.ones(1)), (torch.full((4,), 2.0), torch.ones(4))]
    assert sum_over_rows(rows, "token", 2).item() == pytest.approx(3.2)
    assert sum_over_rows(rows, "mixed", 2).item() == pytest.approx(5.0)
    assert sum_over_rows(rows, "sequence", 2).item() == pytest.approx(8.0)
    one_row = [join(rows)]
    assert sum_over_rows(one_row, "token", 2).item() == pytest.approx(3.2)
    assert sum_over_rows(one_row, "mixed", 2).item() == pytest.approx(3.2)


@pytest.mark.parametrize("kind", KINDS)
def test_unsupervised_positions_leave_no_trace(kind: str) -> None:
    counts = {"num_loss_tokens": 2, "num_groups": 1, "group_sizes_T": torch.tensor([0.0, 2.0, 2.0, 0.0])}
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0])
    losses = torch.tensor([torch.inf, 1.0, 3.0, torch.nan], requires_grad=True)
    loss = next_token_loss(losses, mask, kind, **counts)
    loss.backward()
    assert loss.item() == pytest.approx(4.0 if kind in ("sequence", "sum") else 2.0)
    assert losses.grad is not None
    assert torch.equal(losses.grad[mask == 0], torch.zeros(2)) and bool((losses.grad[mask == 1] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_row_without_supervision_is_zero(kind: str) -> None:
    losses = torch.ones(3, requires_grad=True)
    loss = next_token_loss(losses, torch.zeros(3), kind, num_loss_tokens=5, num_groups=2, group_sizes_T=torch.ones(3))
    loss.backward()
    assert loss.item() == 0.0 and losses.grad is not None and not losses.grad.any()


def test_shape_does_not_matter_and_bf16_is_summed_in_fp32() -> None:
    losses, mask = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16), torch.ones(1, 4096)
    loss = next_token_loss(losses, mask, "token", num_loss_tokens=4096, num_groups=1)
    assert loss.dtype is torch.float32 and loss.item() == 1.0078125


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="token, mixed, sequence"):
        next_token_loss(torch.ones(1), torch.ones(1), "mean", num_loss_tokens=1, num_groups=1)
