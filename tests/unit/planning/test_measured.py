"""Passes that a loss of preferences makes forward alone, against the operations that torch counts in them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_grit.config.kinds import measured_passes, option
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import TextLengths
from megatron_grit.planning.memory import Workload, estimate_memory
from megatron_grit.planning.operations import Machine, count_flops, expected_step_time
from tests.rows import VOCAB, tiny_config

LENGTH, RECORDS = 24, 4
CASES = [("dpo", "adapters_off", 1), ("kto", "cache", 1), ("kto", "adapters_off", 3)]


def preferences(loss: str, reference: str, data: str = "x") -> RunConfig:
    config = tiny_config(num_layers=1)
    config.training.objective, config.data.tokens_per_row = "preference", 2 * LENGTH  # type: ignore[assignment]
    config.adapter.kind = "lora"
    knobs = option(config, "preference")
    knobs.data, knobs.batch_size, knobs.loss, knobs.reference = [data], RECORDS, loss, reference
    return config


@pytest.mark.parametrize(("loss", "reference", "passes"), CASES)
def test_a_step_makes_the_passes_that_are_planned(loss: str, reference: str, passes: int, tmp_path: Path) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_grit.data.indexed.roles import Role, RowKind
    from megatron_grit.data.indexed.writer import IndexedWriter
    from megatron_grit.models.decoder import Output, build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.objectives.base import trained_objectives
    from megatron_grit.training.teacher.model import forward_rows, frozen
    from tests.distributed.kind_step import loader_at

    with IndexedWriter(tmp_path / "pairs", RowKind.PREFERENCE, VOCAB) as writer:
        for number in range(RECORDS):
            lead, answer = [(Role.USER, [number] * (LENGTH // 2))], [number] * (LENGTH // 2)
            writer.add([*lead, (Role.CHOSEN, answer), *lead, (Role.REJECTED, answer)])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    config = preferences(loss, reference, str(tmp_path / "pairs"))
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        batch = loader_at(config, context).batch(0)
        (objective,) = trained_objectives(config, context)
        objective._chunks = chunks  # type: ignore[attr-defined]  # as start, which computes a cache, leaves it
        rows = objective.rows(batch)

        def measured(some: list[Any], output: Output, states: Any) -> list[torch.Tensor]:
            with frozen(chunks, with_adapters=False):  # which plans do not count
                return forward_rows(chunks, context, some, output, batch.row_length, "measured")

        def counted(work: Any) -> int:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                work()
            return int(counter.get_total_flops())

        def cached(some: list[Any], *others: Any) -> None:
            for row in some:
                row.reference_S = torch.zeros(len(row.record_ids), dtype=torch.float64)

        once = counted(lambda: measured(rows, objective.output, {}))
        told = mock.patch.object(type(objective), "_attach_reference", lambda self, *given: cached(*given))
        with told if reference == "cache" else nullcontext():
            found = counted(lambda: objective.prepare(batch, rows, measured))
    assert found == passes * once > 0
    assert measured_passes(config, "preference") == passes


@pytest.mark.parametrize(("loss", "reference", "passes"), CASES)
def test_plans_count_them(loss: str, reference: str, passes: int) -> None:
    def planned(loss: str, reference: str) -> tuple[RunConfig, Workload]:
        config = preferences(loss, reference)
        config.parallel.tensor = 2
        return config, Workload.of_config(config, 1, TextLengths())

    plain, with_passes = planned("dpo", "cache"), planned(loss, reference)
    before, after = (count_flops(config, 2, VOCAB, rows) for config, rows in (plain, with_passes))
    assert after.passes["preference"] == pytest.approx(before.passes["preference"] * (3 + passes) / 3)
    assert after.model == pytest.approx(before.model * (3 + passes) / 3, rel=1e-3)  # they are not for memory's sake
    times = [expected_step_time(config, 2, VOCAB, rows, Machine()).tensor for config, rows in (plain, with_passes)]
    assert times[1] == pytest.approx(times[0] * (2 + passes) / 2)
    held = [estimate_memory(config, 2, VOCAB, rows, "cpu").kinds["rows"] for config, rows in (plain, with_passes)]
    assert held[1] == (2 if loss == "kto" else 1) * held[0]
