"""Generation with a cache against reading everything again for each token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.inference.generate import choose_tokens, continuation_row, generate_tokens
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.launch import parallel_job
from tests.rows import VOCAB, tiny_config

PROMPTS = [[5, 17, 3, 9, 22, 41, 8], [60], [11, 12, 13]]
NEVER = -1


@pytest.fixture(scope="module", params=[{}, {"sliding_window": 3}, {"experts": 4}], ids=["dense", "window", "moe"])
def model(request: pytest.FixtureRequest) -> Iterator[GritDecoder]:
    with parallel_job(ParallelConfig(device="cpu"), seed=3) as context:
        yield build_model(tiny_config(**request.param), VOCAB, context).eval()


def reread(model: GritDecoder, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation of one prompt, the whole text read again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(continuation_row([tokens], [0]), Output.LOGITS)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def test_cache_equals_reading_again(model: GritDecoder) -> None:
    outputs = generate_tokens(model, PROMPTS, max_new_tokens=12, stop_ids=(NEVER,))
    assert outputs == [reread(model, prompt, 12) for prompt in PROMPTS]


def test_a_sequence_that_stops_leaves_the_others_alone(model: GritDecoder) -> None:
    free = generate_tokens(model, PROMPTS, max_new_tokens=12, stop_ids=(NEVER,))
    stop = free[1][2]
    stopped = generate_tokens(model, PROMPTS, max_new_tokens=12, stop_ids=(stop,))
    for ours, whole in zip(stopped, free, strict=True):
        assert ours == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[1]) < 12


def test_the_cache_is_used(model: GritDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = GritDecoder.forward

    def noting(self: GritDecoder, row, *rest):  # type: ignore[no-untyped-def]
        lengths.append(row.tokens_1T.shape[1])
        return forward(self, row, *rest)

    monkeypatch.setattr(GritDecoder, "forward", noting)
    generate_tokens(model, PROMPTS, max_new_tokens=4, stop_ids=(NEVER,))
    assert lengths == [11, 3, 3, 3]


def test_sampling() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose_tokens(logits, 1.0, 1.0, generator)[0] for _ in range(2000)])
    frequencies = torch.bincount(draws, minlength=4) / 2000
    torch.testing.assert_close(frequencies, logits.exp()[0], rtol=0, atol=0.05)
    nucleus = {choose_tokens(logits, 1.0, 0.7, generator)[0] for _ in range(500)}
    assert nucleus == {0, 1}
    assert choose_tokens(logits, 0.0, 1.0, generator) == [0]
