"""Divergence from a teacher: losses and gradients against plain torch in fp64, and what the top K alone say of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_grit.losses import divergence
from megatron_grit.losses.divergence import Divergence, bucket_divergence, full_divergence, log_probabilities, log_total

TOKENS, VOCAB = 6, 40
OPTIONS = [
    Divergence(is_reverse=is_reverse, temperature=temperature)
    for is_reverse in (False, True)
    for temperature in (1.0, 2.5)
]


def drawn(seed: int) -> Tensor:
    return 3 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(logits: Tensor, teacher: Tensor, options: Divergence, buckets: Tensor | None = None) -> Tensor:
    """By torch's own softmax; ``buckets``: the bucket of each token, [L, V], whose probabilities are added up."""
    p, q = ((each / options.temperature).softmax(1) for each in (teacher, logits))
    if buckets is not None:
        size = int(buckets.max()) + 1
        p, q = (each.new_zeros(len(each), size).scatter_add(1, buckets, each) for each in (p, q))
    first, second = (q, p) if options.is_reverse else (p, q)
    return options.temperature**2 * (first * (first / second).log()).sum(1)


def top(teacher: Tensor, size: int, options: Divergence) -> tuple[Tensor, Tensor]:
    """What a cache holds of a teacher."""
    p = (teacher / options.temperature).softmax(1)
    ids = p.argsort(1, descending=True)[:, :size]
    rest = p.scatter(1, ids, 0.0).sum(1, keepdim=True)
    return ids, torch.cat((p.gather(1, ids), rest), 1).log()


def buckets_of(ids: Tensor) -> Tensor:
    numbers = torch.arange(ids.shape[1]).expand_as(ids)
    return torch.full((TOKENS, VOCAB), ids.shape[1]).scatter(1, ids, numbers)


def gradient_of(losses: Tensor, logits: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64)  # each token's own, as labels have
    return torch.autograd.grad((losses * weights).sum(), logits)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens_at_once", [1, 4, TOKENS])
def test_loss_and_gradient_are_plain_torchs(
    options: Divergence, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", tokens_at_once * VOCAB)
    logits, teacher = drawn(0).requires_grad_(), drawn(1)
    ids, log_probs = top(teacher, 5, options)
    for ours, reference in (
        (full_divergence(logits, teacher, options), plain(logits, teacher, options)),
        (bucket_divergence(logits, ids, log_probs, options), plain(logits, teacher, options, buckets_of(ids))),
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient_of(ours, logits), gradient_of(reference, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_top_tokens_miss_what_is_within_all_others(options: Divergence) -> None:
    """The stated error: the probability of all others times the divergence within them; nothing with all but one."""
    logits, teacher = drawn(2), drawn(3)
    whole = full_divergence(logits, teacher, options)
    before = torch.full_like(whole, -1.0)
    for size in (1, 4, 16, VOCAB - 1, VOCAB):
        ids, log_probs = top(teacher, size, options)
        found = bucket_divergence(logits, ids, log_probs, options)
        keep = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
        hidden = [logits.masked_fill(~keep, -torch.inf), teacher.masked_fill(~keep, -torch.inf)]
        mass = ((logits if options.is_reverse else teacher) / options.temperature).softmax(1)
        missed = (mass * keep).sum(1) * torch.nan_to_num(plain_within(*hidden, options), 0.0)
        torch.testing.assert_close(whole - found, missed, rtol=1e-9, atol=1e-12)
        assert (found >= before - 1e-12).all(), "more tokens say no less"
        before = found
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


def plain_within(logits: Tensor, teacher: Tensor, options: Divergence) -> Tensor:
    """As :func:`plain`, among the tokens whose logits are finite."""
    p, q = ((each / options.temperature).softmax(1) for each in (teacher, logits))
    first, second = (q, p) if options.is_reverse else (p, q)
    return options.temperature**2 * torch.where(first > 0, first * (first / second).log(), 0.0).sum(1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_divergence_from_itself(options: Divergence) -> None:
    """Exactly none in fp32, and no gradient, with rows that pad the vocabulary too."""
    logits = drawn(4).float()
    logits[:, -3:] = torch.finfo(torch.float32).min
    logits.requires_grad_()
    losses = full_divergence(logits, logits.detach().clone(), options)
    assert losses.dtype is torch.float32 and not losses.any()
    assert not gradient_of(losses, logits).any()
    ids, log_probs = top(logits.detach().double(), 4, options)
    found = bucket_divergence(logits.double(), ids, log_probs, options)
    assert found.abs().max() < 1e-12


def test_padding_of_the_vocabulary_counts_for_nothing() -> None:
    options = Divergence(temperature=0.5, is_reverse=True)
    logits, teacher = drawn(5).float(), drawn(6).float()
    padded = [
        torch.cat((each, each.new_full((TOKENS, 2), torch.finfo(each.dtype).min)), 1) for each in (logits, teacher)
    ]
    torch.testing.assert_close(full_divergence(*padded, options), full_divergence(logits, teacher, options))


def test_tokens_that_the_teacher_did_not_see_have_none() -> None:
    options = Divergence()
    logits = drawn(7).requires_grad_()
    ids, log_probs = top(drawn(8), 3, options)
    ids[2], log_probs[2] = -1, -torch.inf
    losses = bucket_divergence(logits, ids, log_probs, options)
    gradient = gradient_of(losses, logits)
    assert losses[2] == 0 and not gradient[2].any()
    assert (losses[[0, 1, 3, 4, 5]] > 0).all() and gradient.isfinite().all()


def test_probabilities_are_of_the_temperature() -> None:
    logits = drawn(9)
    found = log_probabilities(logits, Divergence(temperature=3.0))
    torch.testing.assert_close(found, (logits / 3).log_softmax(1), rtol=1e-12, atol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits = drawn(0)
    with pytest.raises(ValueError, match="differ in shape"):
        full_divergence(logits, logits[:, 1:], Divergence())
    ids, log_probs = top(logits, 3, Divergence())
    with pytest.raises(ValueError, match="do not fit"):
        bucket_divergence(logits, ids, log_probs[:, 1:], Divergence())


@pytest.mark.parametrize("is_reverse", [False, True])
def test_all_others_may_be_too_improbable_for_a_number(is_reverse: bool) -> None:
    """In fp32, of the model and of the teacher: as in fp64, where they are none too small."""
    options = Divergence(is_reverse=is_reverse, temperature=0.5)
    sure, unsure = torch.tensor([[60.0, 59.0, 0.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.5, 0.0, 2.0, -1.0]])
    ids = torch.tensor([[0, 1]])
    for student, teacher in ((sure, unsure), (unsure, sure)):
        exact = student.double().requires_grad_()
        log_p = (teacher.double() / 0.5).log_softmax(1)
        log_probs = torch.cat((log_p[:, :2], log_p[:, 2:].logsumexp(1, keepdim=True)), 1)
        expected = bucket_divergence(exact, ids, log_probs, options)
        ours = student.clone().requires_grad_()
        scattered = log_probabilities(teacher, options).scatter(1, ids, -torch.inf)
        own = torch.cat((log_probabilities(teacher, options)[:, :2], log_total(scattered, options)), 1)
        torch.testing.assert_close(own.double(), log_probs, rtol=1e-5, atol=1e-5)
        found = bucket_divergence(ours, ids, own, options)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(found.sum(), ours)
        (wanted,) = torch.autograd.grad(expected.sum(), exact)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)
