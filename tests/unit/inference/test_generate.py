"""Generation with a cache against reading everything again for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.generate import choose_tokens, continuation_row, generate_tokens
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.launch import parallel_job
from tests.rows import VOCAB, tiny_config

PROMPTS = [[5, 17, 3, 9, 22, 41, 8], [60], [11, 12, 13]]
NEVER: tuple[int, ...] = ()
POSITIONS = 4096


@pytest.fixture(scope="module", params=[{}, {"sliding_window": 3}, {"experts": 4}], ids=["dense", "window", "moe"])
def model(request: pytest.FixtureRequest) -> Iterator[GritDecoder]:
    with parallel_job(ParallelConfig(device="cpu"), seed=3) as context:
        yield build_model(tiny_config(**request.param), VOCAB, context).eval()


def continued(model: GritDecoder, count: int, stop_ids: tuple[int, ...] = NEVER, positions: int = POSITIONS, **rest):  # type: ignore[no-untyped-def]
    options = SamplingOptions(max_new_tokens=count)
    return generate_tokens(model, PROMPTS, options, stop_ids=stop_ids, max_positions=positions, **rest)


def tokens_of(*given, **options) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return [output.tokens for output in continued(*given, **options)]


def reread(model: GritDecoder, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation of one prompt, the whole text read again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(continuation_row([tokens], [0]), Output.LOGITS)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def test_cache_equals_reading_again(model: GritDecoder) -> None:
    outputs = tokens_of(model, 12)
    assert outputs == [reread(model, prompt, 12) for prompt in PROMPTS]


def test_a_sequence_that_stops_leaves_the_others_alone(model: GritDecoder) -> None:
    free = tokens_of(model, 12)
    stop = free[1][2]
    stopped = tokens_of(model, 12, (stop,))
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
    tokens_of(model, 4)
    assert lengths == [11, 3, 3, 3]


def test_sampling() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose_tokens(logits, 1.0, 1.0, generator)[0] for _ in range(2000)])
    frequencies = torch.bincount(draws, minlength=4) / 2000
    torch.testing.assert_close(frequencies, logits.exp()[0], rtol=0, atol=0.05)
    nucleus = {choose_tokens(logits, 1.0, 0.7, generator)[0] for _ in range(500)}
    assert nucleus == {0, 1}
    likeliest = torch.tensor([choose_tokens(logits, 1.0, 1.0, generator, 2)[0] for _ in range(2000)])
    torch.testing.assert_close(likeliest.bincount() / 2000, torch.tensor([0.625, 0.375]), rtol=0, atol=0.05)
    # The nucleus is one of what is left: 0.625 of the two likeliest is more than 0.6.
    assert {choose_tokens(logits, 1.0, 0.6, generator, 2)[0] for _ in range(200)} == {0}
    assert choose_tokens(logits, 0.0, 1.0, generator) == [0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-9])
def test_a_small_temperature_is_nearly_greedy(temperature: float) -> None:
    """Logits divided by it would overflow: softmax(inf) is not a number."""
    generator = torch.Generator().manual_seed(0)
    assert choose_tokens(torch.tensor([[-5e4, 3e4, 3e4 - 1, 0.0]]), temperature, 1.0, generator) == [1]


@pytest.mark.parametrize("embedding", ["rope", "learned_absolute"])
def test_an_answer_ends_at_the_last_position(embedding: str) -> None:
    """A position table has no further row; RoPE would go on in angles that no text was trained at."""
    with parallel_job(ParallelConfig(device="cpu"), seed=3) as context:
        config = tiny_config(num_layers=1, max_position_embeddings=16, position_embedding=embedding)
        model = build_model(config, VOCAB, context).eval()
        outputs = continued(model, 10**9, positions=16)
        assert [len(output.tokens) for output in outputs] == [9, 15, 13]
        assert {output.finish_reason for output in outputs} == {"length"}
        free = tokens_of(model, 5, positions=16)
        assert [output.tokens[:5] for output in outputs] == free
        with pytest.raises(DataError, match="the prompt has 7 tokens, and the model takes 7; shorten it"):
            continued(model, 1, positions=7)


def test_what_is_called_before_a_pass_ends_it(model: GritDecoder) -> None:
    calls: list[int] = []

    def before_pass() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        continued(model, 12, before_pass=before_pass)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, not -1"),
        ({"temperature": math.nan}, "temperature must be at least 0, not nan"),
        ({"temperature": math.inf}, "temperature must be a finite number, not inf"),
        ({"temperature": "1"}, "temperature must be float, at least 0, not '1'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": -(10**20)}, "max_new_tokens must be at least 1, not -100000000000000000000"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens must be at least 1 and .* not an integer of 5001 digits"),
        ({"max_new_tokens": 1.0}, "max_new_tokens must be int, at least 1, not 1.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be int, at least 1, not true"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": np.float32(1.5)}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"seed": 2**63}, "seed must be at least 0 and at most 9223372036854775807"),
        ({"seed": None}, "seed must be int, at least 0, not null"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"stop": ["a"] * 5}, "stop must be at most 4 texts, not 5"),
        ({"stop": "a"}, "stop must be a list"),
        ({"stop": ["\ud800"]}, "stop holds half of a surrogate pair"),
        ({"stop": [""]}, "stop must not be empty"),
    ],
)
def test_sampling_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        SamplingOptions(**options)


def test_sampling_that_can_be() -> None:
    SamplingOptions(max_new_tokens=np.int64(3), temperature=2, top_p=1, seed=5, stop=("a", "b"))  # type: ignore[arg-type]
