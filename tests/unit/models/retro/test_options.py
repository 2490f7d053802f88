"""Options of a decoder's shape where it reads neighbors: in its layers and in the encoder, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.parallel.context import ParallelContext
from tests.distributed.grid_run import parts_of
from tests.distributed.plain_model import draw_weights, reference_step
from tests.neighbors import with_neighbors
from tests.rows import VOCAB, make_row, tiny_config

OPTIONS: dict[str, dict[str, Any]] = {
    "gpt": {
        "normalization": "layernorm",
        "activation": "gelu_tanh",
        "position_embedding": "learned_absolute",
        "add_bias_linear": True,
        "tie_embeddings": True,
        "num_query_groups": None,
    },
    "retro_8b": {
        "normalization": "layernorm",
        "layernorm_zero_centered_gamma": True,
        "rotary_percent": 0.5,
        "num_query_groups": None,
    },
    "zero-centered RMSNorm": {"layernorm_zero_centered_gamma": True, "qk_norm": True, "activation": "gelu"},
    "biases of queries": {"add_qkv_bias": True, "position_embedding": "none"},
    "biases of outputs": {"add_attention_output_bias": True, "rotary_interleaved": True},
    "biases of feed-forward layers": {"add_mlp_bias": True, "attention_scale": 1.0, "tie_embeddings": True},
    "window": {"sliding_window": 3, "kv_channels": 8},
}


@pytest.mark.parametrize("conditioning", ["chunk", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_plain_torch(context: ParallelContext, name: str, conditioning: Any) -> None:
    retro = RetroConfig(num_neighbors=2, chunk_length=6, layers=[0, 1], gate=0.5, encoder_conditioning=conditioning)
    config = tiny_config(num_layers=2, retro=retro, **OPTIONS[name])
    row = with_neighbors(make_row(RowKind.GENERATIVE, [20, 9], 32), retro.chunk_length, missing=0.2)
    weights = draw_weights(config, VOCAB, seed=1)
    reference = reference_step(config, weights, [row], 0, 0)
    model = build_model(config, VOCAB, context)
    tensors = {f"weight {key}": weight for key, weight in weights.items()}
    tensors |= {f"gradient {key}": gradient for key, gradient in reference.gradients.items()}
    with torch.no_grad():
        for part in parts_of([model], context):
            part.fill(tensors)
    assert row.loss_mask_1T is not None
    loss = model(row, Output.TOKEN_LOSSES).sum() / row.loss_mask_1T.sum()
    assert float(loss.detach()) == pytest.approx(reference.metrics["loss_gen"], rel=1e-6)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    found = [part.compare(tensors) for part in parts_of([model], context)]
    assert {each["name"] for each in found} == weights.keys()
    for each in found:
        assert each["error"] ** 0.5 <= 1e-5 * max(each["norm"] ** 0.5, 1e-3), each


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_zero_centered_norms_start_as_the_others_do(context: ParallelContext, normalization: str) -> None:
    row, retro = make_row(RowKind.GENERATIVE, [9], 12), RetroConfig(num_neighbors=1, chunk_length=4, layers=[0])
    row = with_neighbors(row, retro.chunk_length, 1)
    config = tiny_config(num_layers=1, normalization=normalization, retro=retro)
    plain = build_model(config, VOCAB, context)
    config.model.layernorm_zero_centered_gamma = True
    centered = build_model(config, VOCAB, context)
    norms = {name: value for name, value in centered.state_dict().items() if name.endswith("norm.weight")}
    assert len(norms) == 9 and not any(value.any() for value in norms.values())
    centered.load_state_dict(plain.state_dict() | norms)
    assert torch.equal(*(model(row, Output.TOKEN_LOSSES) for model in (plain, centered)))
