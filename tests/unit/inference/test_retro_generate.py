"""Cached generation with neighbors against a full forward pass for each token, planned as rows of training are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.errors import ConfigError
from megatron_grit.inference.generation import kv_cache
from megatron_grit.inference.generation.generate import continuation_row, generate_tokens
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.inference.generation.sampling import TokenSampler
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.reading import Passage, Reader, Window
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.neighbors import join_texts
from tests.rows import VOCAB, tiny_config

NEW = 14


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=3) as context:
        yield context


def build(context: ParallelContext, *, shape: dict[str, Any] | None = None, **retro: Any) -> GritDecoder:
    knobs = {"num_neighbors": 2, "chunk_length": 5, "layers": [1, 2]} | retro
    torch.manual_seed(3)
    config = tiny_config(num_layers=3, retro=RetroConfig(**knobs), **(shape or {}))
    return build_model(config, VOCAB, context).eval()


class DrawnNeighbors:
    """Neighbors that follow from a window's tokens, up to twice as long as a chunk; now and then there are none."""

    def __init__(self, num_neighbors: int, chunk_length: int, seed: int) -> None:
        self.k, self.length, self.seed = num_neighbors, 2 * chunk_length, seed

    def of(self, tokens: Sequence[int]) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, *tokens])
        count = random.integers(0, self.k + 1)
        return [random.integers(0, VOCAB, random.integers(1, self.length + 1)) for _ in range(count)]

    def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
        return [[Passage(text.tolist()) for text in self.of(window.tokens)] for window in windows]


def expected_stops(prompt: int, total: int, chunk: int, every: int) -> list[int]:
    inside = [
        stop for stop in range(1, prompt + 1) if (prompt - stop) % chunk == 0 and (stop >= chunk or stop == prompt)
    ]
    return inside + [stop for stop in range(prompt + 1, total + 1) if (stop - prompt) % every == 0]


def read_again(
    model: GritDecoder, tokens: list[int], prompt: int, every: int, source: DrawnNeighbors, shift: int = 0
) -> Tensor:
    """Logits of all tokens, [T, V], from one full pass over them; ``shift``: of where chunks end."""
    chunk = model.retro.chunk_length
    stops = [stop + shift for stop in expected_stops(prompt, len(tokens), chunk, every) if stop + shift <= len(tokens)]
    texts: list[list[np.ndarray | None]] = [[*source.of(tokens[max(0, stop - chunk) : stop])] for stop in stops]
    # What follows the last chunk is none, but goes on reading what that chunk read.
    bounds = [(max(0, stop - chunk), stop) for stop in stops] + [(0, len(tokens) + 1)]
    text_of, lengths, flat = join_texts([*texts, []])
    text_of = np.concatenate([text_of, np.full((1, text_of.shape[1]), -1)])[: len(bounds)]
    row = continuation_row([tokens], [0])
    row.neighbors = Neighbors(
        chunk_bounds_C2=np.array(bounds),
        segment_ends_C=np.full(len(bounds), len(tokens)),
        text_of_Ck=text_of,
        lengths_U=lengths,
        tokens_1N=torch.from_numpy(flat)[None],
    )
    with torch.no_grad():
        return model(row, Output.LOGITS)


def generated(
    model: GritDecoder, prompts: list[list[int]], every: int, source: Any, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> tuple[list[list[int]], list[Tensor]]:
    """What is generated, and the logits of each pass."""
    seen: list[Tensor] = []
    choose = TokenSampler.choose

    def noting(sampler: TokenSampler, logits_V: Tensor) -> int:
        seen.append(logits_V)
        return choose(sampler, logits_V)

    reader = Reader(source, model.retro.chunk_length, every, [len(prompt) for prompt in prompts])
    with monkeypatch.context() as patch:
        patch.setattr(TokenSampler, "choose", noting)
        options = SamplingOptions(max_new_tokens=NEW, **how)
        outputs = generate_tokens(model, prompts, options, stop_ids=(), max_positions=512, reader=reader)
    return [output.tokens for output in outputs], list(torch.stack(seen).split(len(prompts)))


def assert_equals_reading_again(
    model: GritDecoder, lengths: list[int], every: int, seed: int, monkeypatch: pytest.MonkeyPatch, shift: int = 0
) -> None:
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCAB, length).tolist() for length in lengths]
    source = DrawnNeighbors(model.retro.num_neighbors, model.retro.chunk_length, seed)
    outputs, seen = generated(model, prompts, every, source, monkeypatch)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        logits = read_again(model, [*prompt, *output[:-1]], len(prompt), every, source, shift)
        ours = torch.stack([logits_BV[number] for logits_BV in seen])
        torch.testing.assert_close(ours, logits[len(prompt) - 1 :], atol=2e-5, rtol=0)
        assert output == logits[len(prompt) - 1 :].argmax(-1).tolist()


@settings(max_examples=10)
@given(
    data=st.data(),
    seed=st.integers(0, 10_000),
    chunk=st.integers(1, 7),
    count=st.integers(1, 3),
    conditioning=st.sampled_from(["chunk", "none"]),
)
def test_cache_equals_a_full_pass(
    context: ParallelContext, data: st.DataObject, seed: int, chunk: int, count: int, conditioning: str
) -> None:
    every = data.draw(st.integers(1, chunk))
    lengths = data.draw(st.lists(st.integers(1, 3 * chunk), min_size=1, max_size=3))
    model = build(context, chunk_length=chunk, num_neighbors=count, encoder_conditioning=conditioning)
    with pytest.MonkeyPatch.context() as patch:
        assert_equals_reading_again(model, lengths, every, seed, patch)


@pytest.mark.parametrize("shift", [-1, 1, 5])
def test_chunks_that_end_elsewhere_are_seen(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """The control: a full pass with chunks that end one token, or a chunk, earlier or later."""
    model = build(context)
    assert_equals_reading_again(model, [13, 6], 5, 1, monkeypatch)
    with pytest.raises(AssertionError):
        assert_equals_reading_again(model, [13, 6], 5, 1, monkeypatch, shift)


@pytest.mark.parametrize(
    "shape",
    [
        {"add_bias_linear": True, "position_embedding": "learned_absolute", "normalization": "layernorm"},
        {"num_query_groups": 4, "sliding_window": 4, "activation": "gelu"},
        {"experts": 4},
    ],
    ids=["biases", "window", "experts"],
)
def test_decoders_of_all_kinds(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    model = build(context, shape=shape, gate=None)
    for name, parameter in model.named_parameters():
        if name.endswith((".gate", "bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.0)  # one that is closed, or of zeros, hides what is wrong
    assert_equals_reading_again(model, [13, 3], 2, 4, monkeypatch)


def test_what_is_not_conditioned_is_encoded_once(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(context, encoder_conditioning="none")
    texts = [[9, 8, 7], [6, 5, 4, 3], [2]]

    class Changing:
        def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
            return [
                [Passage(texts[number % 3]) for number in (len(window.tokens), window.tokens[-1])] for window in windows
            ]

    seen: list[int] = []
    model.decoder.layers[1].encoder.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    prompts = [[5, 17, 3, 9, 22, 41, 8], [60]]
    expected, _ = generated(model, prompts, 1, Changing(), monkeypatch)
    assert sum(seen) == sum(map(len, texts)) and len(seen) <= 3
    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "has_encoding", lambda *_: False)
        assert generated(model, prompts, 1, Changing(), monkeypatch)[0] == expected
    assert len(seen) > NEW
    with monkeypatch.context() as patch:  # the oldest go
        patch.setattr(kv_cache, "_ENCODINGS", 1)
        assert generated(model, prompts, 1, Changing(), monkeypatch)[0] == expected


def test_what_goes_on_reads_its_own(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a sequence of the batch ends, the others keep their neighbors."""
    model, source = build(context), DrawnNeighbors(2, 5, 9)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 12]
    free, _ = generated(model, prompts, 3, source, monkeypatch)
    reader = Reader(source, 5, 3, [len(prompt) for prompt in prompts])
    options = SamplingOptions(max_new_tokens=NEW)
    limited = generate_tokens(model, prompts, options, stop_ids=(), max_positions=16, reader=reader)
    assert [output.tokens for output in limited] == [free[0][:13], free[1][:9], free[2][:4]]
    # The last token is not read again, so it retrieves nothing.
    assert [[reading.token for reading in readings] for readings in reader.readings] == [
        [0, 3, 6, 9, 12],
        [0, 3, 6],
        [-5, 0, 3],
    ]


def test_a_closed_gate_and_missing_neighbors_are_the_decoder_alone(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, closed = build(context), build(context, gate=0.0)
    closed.load_state_dict(model.state_dict())
    prompts = [[5, 17, 3, 9, 22, 41, 8], [60]]
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", lambda *_: None)
        expected, alone = generated(model, prompts, 5, None, monkeypatch)
    for other, source in ((closed, DrawnNeighbors(2, 5, 1)), (model, DrawnNeighbors(0, 5, 1))):
        outputs, logits = generated(other, prompts, 5, source, monkeypatch)
        assert outputs == expected and all(map(torch.equal, logits, alone))
    read, _ = generated(model, prompts, 5, DrawnNeighbors(2, 5, 1), monkeypatch)
    assert read != expected


def test_a_model_that_is_sharded_does_not_generate() -> None:
    sharded: Any = SimpleNamespace(model_group=SimpleNamespace(size=4))
    with pytest.raises(ConfigError, match=r"sharded over 4 processes; .* megatron-grit generate --checkpoint PATH$"):
        GritModel.refuse_sharded(sharded, "generate")
