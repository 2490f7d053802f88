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
from megatron_grit.inference.generation.generate import Generation, continuation_row, generate_tokens
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.inference.generation.sampling import choose_token, penalised
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


def drawn(logits: list[float], count: int, **options: Any) -> torch.Tensor:
    sampled, generator = SamplingOptions(**({"temperature": 1.0} | options)), torch.Generator().manual_seed(0)
    return torch.tensor([choose_token(torch.tensor(logits), sampled, generator) for _ in range(count)])


def test_sampling() -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = probabilities.log().tolist()

    def frequencies(**options: Any) -> torch.Tensor:
        return drawn(logits, 2000, **options).bincount(minlength=4) / 2000

    torch.testing.assert_close(frequencies(), probabilities, rtol=0, atol=0.05)
    assert set(drawn(logits, 500, top_p=0.7).tolist()) == {1, 3}
    likeliest = torch.tensor([0.0, 0.625, 0.0, 0.375])
    torch.testing.assert_close(frequencies(top_k=2), likeliest, rtol=0, atol=0.05)
    # The nucleus is one of what is left: 0.625 of the two likeliest is more than 0.6.
    assert set(drawn(logits, 200, top_k=2, top_p=0.6).tolist()) == {1}
    assert set(drawn(logits, 3, temperature=0.0).tolist()) == {1}
    assert set(drawn(logits, 200, top_k=9).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-9])
def test_a_small_temperature_is_nearly_greedy(temperature: float) -> None:
    """Logits divided by it would overflow: softmax(inf) is not a number."""
    assert drawn([-5e4, 3e4, 3e4 - 1, 0.0], 1, temperature=temperature).tolist() == [1]


def test_the_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(50, generator=generator), torch.tensor([3, 8, 8, 20, 49])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(penalised(logits, seen.unique(), 1.7), expected, rtol=1e-6, atol=0)


def test_a_penalty_keeps_an_answer_from_repeating(model: GritDecoder) -> None:
    """So large a one that a token which is there already is never the most likely one."""
    options = SamplingOptions(max_new_tokens=24, repetition_penalty=1e6)
    outputs = generate_tokens(model, PROMPTS, options, stop_ids=NEVER, max_positions=POSITIONS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len({*prompt, *output.tokens}) == len(prompt) + 24
    repeated = tokens_of(model, 24)
    assert any(len({*prompt, *output}) < len(prompt) + 24 for prompt, output in zip(PROMPTS, repeated, strict=True))


def test_a_draw_does_not_depend_on_the_company(model: GritDecoder) -> None:
    options = SamplingOptions(max_new_tokens=12, temperature=1.5, seed=7)

    def sampled(*prompts: list[int]) -> list[list[int]]:
        outputs = generate_tokens(model, prompts, options, stop_ids=NEVER, max_positions=POSITIONS)
        return [output.tokens for output in outputs]

    alone = [sampled(prompt)[0] for prompt in PROMPTS]
    assert sampled(*PROMPTS) == alone
    assert sampled(*PROMPTS[::-1]) == alone[::-1]
    first, other, second, third = sampled(PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0])
    assert (first, other) == (alone[0], alone[1])
    assert len({tuple(answer) for answer in (first, second, third)}) == 3, "equal prompts draw by their numbers"
    assert sampled(*[PROMPTS[0]] * 3) == [first, second, third]


def test_sequences_come_and_go(model: GritDecoder) -> None:
    """One that is added later, while others run and are stopped, gets what it gets alone."""
    alone, options = tokens_of(model, 6), SamplingOptions(max_new_tokens=6)
    generation = Generation(model, stop_ids=NEVER, max_positions=POSITIONS)
    found: list[list[int]] = [[] for _ in PROMPTS]

    def step(count: int) -> None:
        for _ in range(count):
            for new in generation.step():
                found[new.sequence].append(new.token)

    assert generation.add(PROMPTS[0], options) == 0
    step(2)
    assert generation.add(PROMPTS[1], options) == 1
    step(2)
    generation.stop(0)
    assert generation.add(PROMPTS[2], options) == 2
    step(6)
    assert generation.active == []
    assert found == [alone[0][:4], *alone[1:]]


def test_keys_are_not_copied_when_a_sequence_grows() -> None:
    """Room is made once for what a sequence may hold, and no more; without a limit it is doubled."""
    cache, new = SequenceCache(1), torch.ones(10, 1, 2)
    known = cache.add(400)
    places = []
    for _ in range(40):
        keys = [cache.extend(1, segment, new, new)[0] for segment in range(2)]
        places.append([key.data_ptr() for key in keys])
    assert cache.active == [0, known] and [len(key) for key in keys] == [400, 400]
    assert len({known for _, known in places}) == 1
    assert 1 < len({free for free, _ in places}) < 6
    assert keys[1].untyped_storage().nbytes() == 2 * 400 * 2 * 4


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
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, not 0"),
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
