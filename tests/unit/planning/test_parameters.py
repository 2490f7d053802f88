"""The formulas of planning against the model itself, built without storage and shared out by the engine's marks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_grit.config.parse import parse_run_config
from megatron_grit.config.schema import AdapterConfig, ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.config.shape import stage_layers
from megatron_grit.convert.skeleton import build_without_storage
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.planning.parameters import count_adapters, count_parameters, count_trained
from tests.rows import VOCAB, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "biases": {"add_bias_linear": True, "normalization": "layernorm", "activation": "gelu"},
    "qkv bias": {"add_qkv_bias": True},
    "wide heads": {"kv_channels": 24, "num_query_groups": None},
    "positions": {"position_embedding": "learned_absolute", "tie_embeddings": True},
    "neox": {"add_bias_linear": True, "normalization": "layernorm", "parallel_residual": "two_norms"},
    "gptj": {"add_mlp_bias": True, "add_output_bias": True, "parallel_residual": "one_norm", "activation": "gelu_tanh"},
    "gpt_neo": {"add_attention_output_bias": True, "add_mlp_bias": True, "position_embedding": "learned_absolute"},
    "qwen3": {"qk_norm": True, "kv_channels": 24},
    "mixture": {"num_experts": 4},
    "retro": {"retro": RetroConfig(num_neighbors=2, layers=[1, 3], encoder_layers=3), "add_qkv_bias": True},
    "learned gates": {
        "retro": RetroConfig(num_neighbors=2, layers=[0, 2], gate=None, encoder_conditioning="none"),
        "num_experts": 4,
        "normalization": "layernorm",
    },
    "qwen2_moe": {
        "num_experts": 4,
        "add_qkv_bias": True,
        "moe_ffn_hidden_size": 32,
        "moe_shared_ffn_hidden_size": 48,
        "moe_shared_expert_gate": True,
        "moe_dense_layers": [1],
    },
}
TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "the embeddings alone": {"trainable": ["embeddings"]},
    "lora": {"kind": "lora", "trainable": ["embeddings"]},
    "dora": {"kind": "dora", "targets": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]},
}
MESHES: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"pipeline": 4},
    {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence_parallel": True},
]
EXPERT_MESHES: list[dict[str, Any]] = [
    {"expert": 2},
    {"expert": 2, "tensor": 2, "sequence_parallel": True},
    {"expert": 2, "tensor": 2, "expert_tensor": 1, "sequence_parallel": True},
    {"expert": 4, "pipeline": 2},
]


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model."""

    name: str
    numel: int
    is_split: bool
    """Over tensor parallel ranks."""
    is_trained: bool


def weights_of(config: RunConfig, vocab_size: int) -> list[Weight]:
    """All parameters of the model on one process, the vocabulary padded for the run's tensor parallel size."""
    multiple = config.model.vocab_multiple * config.parallel.tensor
    alone = replace(config, parallel=ParallelConfig(device="cpu"), model=replace(config.model, vocab_multiple=multiple))
    with parallel_job(alone.parallel, seed=1) as context:
        model = build_without_storage(alone, vocab_size, context)
    return [
        Weight(
            name,
            parameter.numel(),
            getattr(parameter, "tensor_model_parallel", False) and parameter.partition_dim >= 0,  # type: ignore
            parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    ]


def on_stage(weights: list[Weight], config: RunConfig, stage: int) -> Iterator[Weight]:
    """The weights of a pipeline stage."""
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    for weight in weights:
        layer = re.match(r"decoder\.layers\.(\d+)\.", weight.name)
        is_tied = weight.name == "embedding.word_embeddings.weight" and config.model.tie_embeddings
        if layer is not None:
            here = int(layer[1]) in stage_layers(config, stage)
        elif weight.name.startswith("embedding."):
            here = first or (last and is_tied)
        else:
            here = last
        if here:
            yield weight


def share(weights: Iterator[Weight], config: RunConfig) -> dict[str, int]:
    """Parameters of one rank of those that hold them, by what they are."""
    parallel = config.parallel
    counts = dict.fromkeys(("base", "base experts", "adapters", "adapters experts", "trained", "trained experts"), 0)
    totals: Counter[tuple[str, int]] = Counter()
    for weight in weights:
        experts = " experts" * (".local_experts." in weight.name)
        split = (parallel.expert_tensor or parallel.tensor) if experts else parallel.tensor
        ranks = (split if weight.is_split else 1) * (parallel.expert if experts else 1)
        totals[("adapters" if ".adapter." in weight.name else "base") + experts, ranks] += weight.numel
        totals["trained" + experts, ranks] += weight.is_trained * weight.numel
    for (kind, ranks), total in totals.items():
        assert total % ranks == 0
        counts[kind] += total // ranks
    return counts


def counted(config: RunConfig, vocab_size: int, stage: int) -> dict[str, int]:
    base = count_parameters(config, vocab_size, stage)
    adapters, trained = count_adapters(config, stage), count_trained(config, base, vocab_size, stage)
    return {
        "base": base.rank_dense,
        "base experts": base.rank_expert,
        "adapters": adapters[0],
        "adapters experts": adapters[1],
        "trained": trained[0],
        "trained experts": trained[1],
    }


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        *((model, "all") for model in MODELS),
        *(
            (model, trained)
            for model in ("biases", "positions", "qwen2_moe")
            for trained in TRAINED
            if trained != "all"
        ),
    ],
)
def test_every_rank_of_every_mesh_has_what_the_model_has(model: str, trained: str) -> None:
    config = tiny_config(**MODELS[model])
    config.embedding.projection_dim, config.embedding.pooling = 8, "learnedmean"
    settings = dict(TRAINED[trained])
    config.training.trainable = settings.pop("trainable", [])
    ranks = ["layers.1.mlp.up_proj=5", "experts.[0-9]+.down_proj=3", "q_proj=2"]
    config.adapter = AdapterConfig(rank=4, rank_pattern=ranks, **settings)
    built: dict[int, list[Weight]] = {}
    for mesh in MESHES + EXPERT_MESHES * (config.model.num_experts is not None):
        config.parallel = ParallelConfig(device="cpu", **mesh)
        tensor = config.parallel.tensor
        if tensor not in built:
            built[tensor] = weights_of(config, VOCAB)
        for stage in range(config.parallel.pipeline):
            expected = share(on_stage(built[tensor], config, stage), config)
            assert counted(config, VOCAB, stage) == expected, (mesh, stage)
    config.parallel = ParallelConfig(device="cpu")
    assert count_parameters(config, VOCAB).total == sum(w.numel for w in built[1] if ".adapter." not in w.name)


@pytest.mark.parametrize("preset", ["mistral_7b", "mixtral_8x7b"])
def test_presets_are_counted_as_they_are_built(preset: str) -> None:
    config = parse_run_config(["--model", preset])
    config.parallel.tensor, config.parallel.pipeline = 4, 8
    config.parallel.expert = 8 if config.model.num_experts else 1
    weights = weights_of(config, 32000)
    assert count_parameters(config, 32000).total == sum(weight.numel for weight in weights)
    for stage in range(8):
        assert counted(config, 32000, stage) == share(on_stage(weights, config, stage), config)
