"""Counted from a configuration, and counted in the model that is built from it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.models.adapters import count_trainable
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.planning.adapters import count_adapters, count_trained
from megatron_grit.planning.parameters import count_parameters
from tests.rows import VOCAB, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ungated": {"activation": "gelu", "tie_embeddings": True},
    "mixture": {"num_experts": 4, "moe_shared_ffn_hidden_size": 96, "moe_ffn_hidden_size": 32, "moe_dense_layers": [0]},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
@pytest.mark.parametrize("trainable", [[], ["embeddings"]])
def test_counts_are_those_of_the_model(model: str, kind: str, trainable: list[str]) -> None:
    config = tiny_config(**MODELS[model])
    config.adapter.kind, config.adapter.rank, config.embedding.projection_dim = kind, 3, 8  # type: ignore[assignment]
    config.adapter.targets = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
    config.training.trainable = trainable
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        trained, total = count_trainable([build_model(config, VOCAB, context)])
    base = count_parameters(config, VOCAB)
    assert base.rank + sum(count_adapters(config, 0)) == total
    assert sum(count_trained(config, base, VOCAB, 0)) == trained


def test_tensor_parallel_ranks_split_one_matrix_of_each_pair() -> None:
    config = tiny_config(num_layers=1)
    config.adapter.kind, config.adapter.rank, config.adapter.targets = "lora", 2, ["q_proj", "down_proj"]
    whole = count_adapters(config, 0)[0]
    assert whole == 2 * (64 + 64) + 2 * (128 + 64)
    config.parallel.tensor = 2
    assert count_adapters(config, 0)[0] == 2 * (64 + 32) + 2 * (64 + 64)
