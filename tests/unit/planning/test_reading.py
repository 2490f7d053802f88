"""Operations of what reads neighbors, against those that torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.planning.memory import Workload, _StageMemory, estimate_memory
from megatron_grit.planning.operations import Machine, count_flops, encoding_flops, expected_step_time, reading_flops
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


def test_stages_wait_for_the_one_that_encodes() -> None:
    config, machine = tiny_config(), Machine(peak_tflops=1, efficiency=1)
    config.parallel.pipeline, config.model.retro = 4, RetroConfig(num_neighbors=2, layers=[1, 3])
    workload = Workload(kinds=(sequences(4096, rows=8, labels=0),))

    def time() -> float:
        found = expected_step_time(config, 4, VOCAB, workload, machine)
        return found.compute + found.bubble

    encoder = 3 * 4096 * encoding_flops(config)
    of_all = count_flops(config, 4, VOCAB, workload).total
    slowest = (of_all - encoder) / 4 + encoder
    assert time() == pytest.approx(slowest / 1e12 * (1 + 3 / 8))
    config.training.recompute = "full"
    of_all, encoder = of_all / 3 * 4, encoder / 3 * 4
    assert time() == pytest.approx(((of_all - encoder) / 4 + encoder) / 1e12 * (1 + 3 / 8))


KEPT: dict[str, dict[str, Any]] = {
    "chunk": {},
    "none": {"encoder_conditioning": "none"},
    "learned gate, dropout": {"gate": None, "encoder_hidden_dropout": 0.1, "hidden_dropout": 0.1},
    "gelu, no rope": {"activation": "gelu", "normalization": "layernorm", "position_embedding": "none"},
    "bf16": {"num_query_groups": None},
    "selective": {"encoder_rope": False},
    "full": {},
}


@pytest.mark.parametrize("case", KEPT)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    """Every tensor that a forward pass saves because the row reads neighbors, weights left out, against the count."""
    import torch

    from megatron_grit.data.indexed.roles import RowKind
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job
    from tests.neighbors import with_neighbors
    from tests.rows import make_row

    shape = dict(KEPT[case])
    of_retro = {name: shape.pop(name) for name in list(shape) if name in RetroConfig.__dataclass_fields__}
    retro, tokens = RetroConfig(num_neighbors=2, chunk_length=32, layers=[0, 2], **of_retro), 512
    config = tiny_config(num_layers=3, retro=retro, **shape)
    config.training.precision = "bf16" if case == "bf16" else "fp32"
    config.training.recompute = case if case in ("selective", "full") else "none"  # type: ignore[assignment]
    row = with_neighbors(make_row(RowKind.GENERATIVE, [tokens], tokens), retro.chunk_length, 2, full=True)
    with parallel_job(config.parallel, 0) as context:
        model = build_model(config, VOCAB, context).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def kept_with(neighbors: Any) -> int:
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                states = model(replace(row, neighbors=neighbors), Output.HIDDEN)
            assert states.requires_grad
            return sum(kept.values())

        read = kept_with(row.neighbors) - kept_with(None)

    def counted(embeds: bool) -> int:
        workload = sequences(tokens, row_tokens=tokens, segment_tokens=tokens, embeds=embeds)
        return _StageMemory(config, 1, VOCAB, Workload(kinds=(workload,)), "cpu", 0)._activations(workload)

    assert counted(False) - counted(True) == pytest.approx(read, rel=0.05)


def test_memory_of_what_reads_is_where_it_is() -> None:
    config, rows = tiny_config(), sequences(4096, rows=8, row_tokens=512, segment_tokens=512)
    config.parallel.pipeline = 4

    def activations() -> list[int]:
        workload = Workload(kinds=(rows,))
        return [estimate_memory(config, 4, VOCAB, workload, stage=stage).kinds["activations"] for stage in range(4)]

    alone = activations()
    config.model.retro = RetroConfig(num_neighbors=2, layers=[1, 3])
    first, encodes, between, reads = (now - before for now, before in zip(activations(), alone, strict=True))
    assert encodes / 3 > reads > 0  # of one row; three are in flight where the encoder is
    states = 4 * 512 * config.model.hidden_size * 4
    assert first > 4 * states and 2 * states < between / 2 < 3 * states, (first, between)
