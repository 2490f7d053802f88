"""RetroModel of megatron-core 0.15.3 against ours with the same weights; see tests/golden/retro_core.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megatron_grit.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.golden.retro_core import CASES, HEADS, INNER, LAYERS, RECORDED, VOCAB, WIDTH, Case, draw
from tests.neighbors import join_texts


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


def build(case: Case, context: ParallelContext, parity: str = "core") -> GritDecoder:
    retro = RetroConfig(
        num_neighbors=case.num_neighbors,
        chunk_length=case.chunk_length,
        retrieved_chunks=case.retrieved_chunks,
        encoder_layers=case.encoder_layers,
        parity=parity,  # type: ignore[arg-type]
    )
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=None,
        ffn_hidden_size=INNER,
        normalization="rmsnorm" if case.modern else "layernorm",
        activation="swiglu" if case.modern else "gelu",
        position_embedding="rope" if case.modern else "learned_absolute",
        add_bias_linear=not case.modern,
        tie_embeddings=not case.modern,
        max_position_embeddings=64,
        vocab_multiple=1,
        retro=retro,
    )
    config = RunConfig(model=model)
    config.training.precision = "fp32"
    decoder = build_model(config, VOCAB, context).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return decoder


def row_of(case: Case) -> PackedRow:
    """The case's sequence, whose first chunk is the short one, with all its neighbors."""
    tokens, neighbors = case.tokens()
    bounds, ends = chunk_row(
        [0, case.length], [case.length % case.chunk_length or case.chunk_length], case.chunk_length
    )
    text_of, lengths, texts = join_texts([list(chunk) for chunk in neighbors])
    return PackedRow(
        embeds=False,
        tokens_1T=torch.from_numpy(tokens)[None],
        positions_1T=torch.arange(case.length)[None],
        cu_seqlens=torch.tensor([0, case.length], dtype=torch.int32),
        max_seqlen=case.length,
        padding_mask_1T=torch.zeros(1, case.length, dtype=torch.bool),
        neighbors=Neighbors(
            chunk_bounds_C2=bounds,
            segment_ends_C=ends,
            text_of_Ck=text_of,
            lengths_U=lengths,
            tokens_1N=torch.from_numpy(texts)[None],
        ),
    )


def logits(decoder: GritDecoder, case: Case) -> np.ndarray:
    with torch.no_grad():
        return decoder(row_of(case), Output.LOGITS).numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference_model(name: str, context: ParallelContext) -> None:
    expected = load_file(RECORDED)[name]
    ours = logits(build(CASES[name], context), CASES[name])
    assert np.abs(ours - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_without_the_switch_they_are_others(context: ParallelContext) -> None:
    case = CASES["modern_43_k3"]
    for change in ({"final_layernorm": None}, {}):
        decoder = build(case, context, "none")
        if change:  # the rest of the switch is about the encoder, and reaches the tokens that read
            decoder.decoder.final_layernorm = None
        difference = np.abs(logits(decoder, case) - load_file(RECORDED)["modern_43_k3"])
        before, after = difference[:2].max(), difference[2:].max()
        assert after > 1e-2 and (before < 1e-4) == bool(change)
