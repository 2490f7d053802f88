"""A decoder that reads neighbors, started from one that does not: ours, Megatron-LM's layout or Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.convert.hf_in.pretrained import load_pretrained
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import CheckpointError
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.models.names import reads
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.checkpoint import load_weights, save_weights
from tests.neighbors import with_neighbors
from tests.rows import VOCAB, make_row, tiny_config
from tests.unit.convert.hf_in.test_reader import write_shards
from tests.unit.convert.test_param_map import random_hf


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


RETRO = RetroConfig(num_neighbors=2, chunk_length=6, layers=[1, 3], gate=None)
ROW = with_neighbors(make_row(RowKind.GENERATIVE, [20, 9], 32), 6)


def losses(model: GritDecoder) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ROW, Output.TOKEN_LOSSES)


def retro(config: RunConfig, **settings: object) -> RunConfig:
    return replace(config, model=replace(config.model, retro=replace(RETRO, **settings)))


@pytest.mark.parametrize("experts", [None, 4])
def test_it_starts_with_the_loss_of_a_decoder_of_ours(
    context: ParallelContext, tmp_path: Path, experts: int | None
) -> None:
    config = tiny_config(experts=experts, **({"moe_dense_layers": [0]} if experts else {}))
    alone = build_model(config, VOCAB, context)
    save_weights([alone], context, tmp_path)
    torch.manual_seed(9)
    fitted = build_model(retro(config), VOCAB, context)
    before = {name: parameter.clone() for name, parameter in fitted.named_parameters() if reads(name)}
    assert (losses(fitted) - losses(alone)).abs().max() > 0.1
    load_weights(tmp_path, [fitted], context)
    assert (losses(fitted) - losses(alone)).abs().max() < 1e-6
    state = alone.state_dict()
    assert before and all(reads(name) or parameter.equal(state[name]) for name, parameter in fitted.named_parameters())
    assert all(parameter.equal(before[name]) for name, parameter in fitted.named_parameters() if reads(name))
    # Where the gate is open, neighbors are read at once.
    opened = build_model(retro(config, gate=1.0), VOCAB, context)
    load_weights(tmp_path, [opened], context)
    assert (losses(opened) - losses(alone)).abs().max() > 1e-3


def test_only_what_reads_may_be_missing(context: ParallelContext, tmp_path: Path) -> None:
    save_weights([build_model(tiny_config(), VOCAB, context)], context, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit|is of another model"):
        load_weights(tmp_path, [build_model(retro(tiny_config(add_qkv_bias=True)), VOCAB, context)], context)
    # And a checkpoint that reads is loaded as a whole.
    save_weights([build_model(retro(tiny_config()), VOCAB, context)], context, tmp_path / "reads")
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "reads", [build_model(retro(tiny_config(), layers=[1, 2]), VOCAB, context)], context)


def test_it_starts_with_the_loss_of_a_hugging_face_model(context: ParallelContext, tmp_path: Path) -> None:
    from megatron_grit.convert.families import mistral

    settings = {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "max_position_embeddings": 64,
    }
    shape = mistral.model_config(settings)
    write_shards(tmp_path, random_hf(mistral.FAMILY, shape))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = RunConfig(model=replace(shape, pretrained=str(tmp_path)))
    config.training.precision = "fp32"
    models = [build_model(each, VOCAB, context) for each in (config, retro(config))]
    for each, model in zip((config, retro(config)), models, strict=True):
        load_pretrained(each, [model], context)
    assert (losses(models[1]) - losses(models[0])).abs().max() < 1e-6
