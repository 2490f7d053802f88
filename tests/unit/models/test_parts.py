"""The decoder's parts work without it, as another model takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.models.attention import AttentionMode, PackedSegments
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.models.layer_specs import block_spec, transformer_config
from megatron_grit.models.rope import RotaryAngles
from megatron_grit.models.vocabulary import OutputLayer, token_embedding
from megatron_grit.parallel.context import ParallelContext
from tests.rows import VOCAB, make_row, tiny_config

NUM_ROWS = 128


def seed() -> None:
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)


def outputs_of_parts(config: RunConfig, context: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
    engine_config, model, group = transformer_config(config), config.model, torch.distributed.group.WORLD
    assert group is not None
    embedding = token_embedding(model, engine_config, NUM_ROWS, group)
    block = TransformerBlock(engine_config, block_spec(config, engine_config, context.device))
    output_layer = OutputLayer(model, engine_config, VOCAB, NUM_ROWS, not model.tie_embeddings, group)
    weight = embedding.word_embeddings.weight if model.tie_embeddings else None
    row = make_row(RowKind.GENERATIVE, [12, 7], 24)
    hidden = block(
        hidden_states=embedding(input_ids=row.tokens_1T, position_ids=row.positions_1T),
        attention_mask=None,
        rotary_pos_emb=RotaryAngles(model, context.device)(row.positions_1T[0]),
        packed_seq_params=PackedSegments.of_row(row.cu_seqlens, row.max_seqlen, AttentionMode.CAUSAL),
    )
    return output_layer.token_losses(hidden, weight, row), output_layer.logits(hidden, weight)[:, :VOCAB]


@pytest.mark.parametrize("tied", [False, True])
def test_parts_compute_what_the_decoder_computes(context: ParallelContext, tied: bool) -> None:
    config = tiny_config(num_layers=2, tie_embeddings=tied)
    seed()
    losses, logits = outputs_of_parts(config, context)
    seed()
    model, row = build_model(config, VOCAB, context), make_row(RowKind.GENERATIVE, [12, 7], 24)
    assert losses.any() and torch.equal(losses, model(row, Output.TOKEN_LOSSES))
    assert torch.equal(logits, model(row, Output.LOGITS))


@pytest.mark.parametrize(
    "shape", [{}, {"rotary_interleaved": True, "rotary_percent": 0.5}, {"rotary_base": 1e6, "kv_channels": 24}], ids=str
)
def test_angles_are_those_of_the_engine_at_each_position(context: ParallelContext, shape: dict[str, Any]) -> None:
    model = tiny_config(**shape).model
    engine = RotaryEmbedding(
        kv_channels=model.kv_channels or 16,
        rotary_percent=model.rotary_percent,
        rotary_interleaved=model.rotary_interleaved,
        rotary_base=model.rotary_base,  # type: ignore[arg-type]
        use_cpu_initialization=True,
    )
    positions = torch.tensor([0, 1, 2, 0, 1, 300, 511])
    assert torch.equal(RotaryAngles(model, context.device)(positions), engine(512, packed_seq=True)[positions])
