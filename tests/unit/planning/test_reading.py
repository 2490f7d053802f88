"""Operations of what reads neighbors, against those that torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.planning.memory import Workload
from megatron_grit.planning.operations import Machine, encoding_flops, expected_step_time, reading_flops
from tests.rows import VOCAB, tiny_config
from tests.unit.planning.test_memory import sequences


@pytest.mark.parametrize("shape", [{}, {"activation": "gelu", "num_query_groups": None, "kv_channels": 8}])
@pytest.mark.parametrize("conditioning", ["chunk", "none"])
def test_operations_are_those_that_torch_counts(conditioning: Any, shape: dict[str, Any]) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_grit.data.indexed.roles import RowKind
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job
    from tests.neighbors import with_neighbors
    from tests.rows import make_row

    tokens, retro = 48, RetroConfig(num_neighbors=3, chunk_length=8, layers=[0, 2], encoder_conditioning=conditioning)
    config = tiny_config(num_layers=3, retro=retro, **shape)
    row = with_neighbors(make_row(RowKind.GENERATIVE, [tokens], tokens), retro.chunk_length, 3, full=True)
    with parallel_job(config.parallel, 0) as context:
        model = build_model(config, VOCAB, context)

        def count(neighbors: Any) -> int:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(replace(row, neighbors=neighbors), Output.HIDDEN)
            return counter.get_total_flops()

        counted = count(row.neighbors) - count(None)
    assert tokens * (encoding_flops(config) + reading_flops(config)) == counted


def test_neighbors_are_sent_between_stages() -> None:
    config, workload = tiny_config(), Workload(kinds=(sequences(4096, rows=8),))
    config.parallel.pipeline = 4

    def sent() -> float:
        return expected_step_time(config, 4, VOCAB, workload, Machine()).pipeline

    alone = sent()
    config.model.retro = RetroConfig(num_neighbors=2, layers=[1, 3])  # two of 128 tokens for a chunk of 64
    assert sent() == pytest.approx(5 * alone)
