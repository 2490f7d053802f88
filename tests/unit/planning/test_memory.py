"""Estimates of parameters, memory and time, and the plan of meshes made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from megatron_grit.config.parse import parse_run_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import RowWorkload, TextLengths
from megatron_grit.losses.contrastive import CHUNK_ELEMENTS
from megatron_grit.models.gathered_keys import gathered_keys
from megatron_grit.planning.memory import Workload, estimate_memory
from megatron_grit.planning.operations import Machine, count_flops, expected_step_time
from megatron_grit.planning.parameters import count_parameters
from megatron_grit.planning.plan import make_plan, meshes, problems_of
from megatron_grit.planning.text import format_plan
from tests.rows import VOCAB, tiny_config

ROOT = Path(__file__).resolve().parents[3]


def pairs(num_queries: int, tokens: int = 0, rows: int = 1, **sizes: Any) -> RowWorkload:
    """Queries with two passages each."""
    settings = {
        "kind": "embedding",
        "embeds": True,
        "causal": False,
        "samples": num_queries,
        "segments": 3 * num_queries,
    }
    return RowWorkload(**(settings | {"tokens": tokens, "rows": rows} | sizes))


def sequences(tokens: int, rows: int = 1, **sizes: Any) -> RowWorkload:
    """Texts whose every token is a label."""
    settings = {"kind": "generative", "embeds": False, "tokens": tokens, "rows": rows, "labels": tokens}
    return RowWorkload(**(settings | sizes))


WORKLOAD = Workload(
    kinds=(
        pairs(32, 64 * 512, 64, segment_tokens=341, row_tokens=512),
        sequences(16 * 512, 16, segment_tokens=512, row_tokens=512, row_labels=512),
    )
)


def preset(name: str, *options: str) -> RunConfig:
    return parse_run_config(["--model", name, *options])


def plan_command(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_grit.cli.plan", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mistral_7b", 7_241_732_096, 7_241_732_096), ("mixtral_8x7b", 46_702_792_704, 12_879_925_248)],
)
def test_presets_have_the_published_parameters(name: str, total: int, active: int) -> None:
    parameters = count_parameters(preset(name), 32000)
    assert (parameters.total, parameters.active, parameters.rank) == (total, active, total)


def test_the_distributed_optimizer_is_sharded_and_the_rest_is_not() -> None:
    config = tiny_config()
    config.training.precision = "bf16"
    alone = estimate_memory(config, 1, VOCAB, WORKLOAD).kinds
    many = estimate_memory(config, 4, VOCAB, WORKLOAD).kinds
    rank = count_parameters(config, VOCAB).rank
    assert alone["weights"] == many["weights"] == 2 * rank
    assert alone["gradients"] == many["gradients"] == 4 * rank
    assert (alone["optimizer"], many["optimizer"]) == (12 * rank, 12 * (rank // 4))


def test_experts_are_sharded_over_fewer_ranks() -> None:
    config = tiny_config(experts=4)
    config.parallel.expert = 2
    parameters = count_parameters(config, VOCAB)
    optimizer = estimate_memory(config, 4, VOCAB, WORKLOAD).kinds["optimizer"]
    assert optimizer == 8 * (parameters.rank_dense // 4 + parameters.rank_expert // 2)


def test_recompute_keeps_less() -> None:
    kept = {}
    for mode in ("none", "selective", "full"):
        config = tiny_config(num_layers=8)
        config.training.recompute = mode  # type: ignore[assignment]
        kept[mode] = estimate_memory(config, 1, VOCAB, WORKLOAD, "cpu").peak
    assert kept["full"] < kept["selective"] < kept["none"]


def test_a_first_stage_keeps_a_row_for_each_stage_behind_it() -> None:
    config = tiny_config()
    config.parallel.pipeline = 4
    first, last = (estimate_memory(config, 4, VOCAB, WORKLOAD, stage=stage).kinds["activations"] for stage in (0, 3))
    assert 2 * last < first < 4 * last
    assert estimate_memory(config, 4, VOCAB, WORKLOAD).peak == max(
        estimate_memory(config, 4, VOCAB, WORKLOAD, stage=stage).peak for stage in range(4)
    )


def test_similarities_do_not_grow_with_the_square_of_the_batch() -> None:
    config = tiny_config()
    sizes = []
    for num_queries in (1 << 14, 1 << 16):
        workload = Workload(kinds=(pairs(num_queries, rows=64),))
        kinds = estimate_memory(config, 8, VOCAB, workload).kinds
        sizes.append(kinds["contrastive"] - 4 * CHUNK_ELEMENTS)
    assert sizes[1] == 4 * sizes[0]


def test_flops_of_mistral() -> None:
    """Forward 2 and backward 4 for each weight but the input embedding's; embedding twice with GradCache."""
    config = preset("mistral_7b")
    workload = Workload(kinds=(sequences(1000, segment_tokens=0),))
    flops = count_flops(config, 1, 32000, workload)
    weights = 7_241_732_096 - 32000 * 4096 - 65 * 4096
    assert flops.passes == {"generative": 6 * weights * 1000} and flops.losses == {}
    texts = Workload(kinds=(pairs(0, 1000, segment_tokens=0),))
    one_pass = count_flops(config, 1, 32000, texts).passes["embedding"]
    config.training.grad_cache = "on"
    assert count_flops(config, 1, 32000, texts).passes["embedding"] == one_pass * 4 / 3
    config.training.recompute = "full"
    assert count_flops(config, 1, 32000, texts).recompute == one_pass / 3


def test_attention_is_counted_by_what_a_token_sees() -> None:
    config = tiny_config(num_layers=1)

    def of(rows: RowWorkload) -> float:
        return sum(count_flops(config, 1, VOCAB, Workload(kinds=(rows,))).passes.values())

    def grows(rows: Callable[..., RowWorkload]) -> float:
        return of(rows(segment_tokens=100)) - of(rows(segment_tokens=0))

    long_less_short = grows(partial(pairs, 0, 1))
    assert long_less_short == 3 * 4 * 64 * 100
    causal = grows(partial(sequences, 1))
    assert causal == long_less_short / 2
    config.model.sliding_window = 10
    assert grows(partial(sequences, 1)) == causal / 5


def slowest_stage(config: RunConfig, machine: Machine) -> float:
    """Seconds of the last stage, which has its layers and the head."""
    flops, stages = count_flops(config, 16, 32000, WORKLOAD), config.parallel.pipeline
    ends = flops.head + flops.losses["contrastive"]
    return ((flops.total - ends) / stages + ends) / (16 / stages) / (machine.peak_tflops * 1e12 * machine.efficiency)


def test_step_time_has_a_bubble_and_pays_for_slow_links() -> None:
    config, machine = preset("mistral_7b"), Machine(peak_tflops=100, efficiency=0.5)
    alone = expected_step_time(config, 16, 32000, WORKLOAD, machine)
    flops = count_flops(config, 16, 32000, WORKLOAD).total
    assert alone.compute == pytest.approx(flops / 16 / 50e12)
    assert alone.bubble == alone.tensor == alone.context == alone.pipeline == alone.expert == 0 < alone.data
    config.parallel.pipeline = 4
    piped = expected_step_time(config, 16, 32000, WORKLOAD, machine)
    rows = (64 + 16) / 4
    slowest = slowest_stage(config, machine)
    assert piped.compute + piped.bubble == pytest.approx(slowest * (1 + 3 / rows)) and piped.pipeline > 0
    config.parallel.pipeline, config.parallel.virtual_pipeline = 8, 4
    fine = expected_step_time(config, 16, 32000, WORKLOAD, machine)
    slowest = slowest_stage(config, machine)
    assert fine.compute + fine.bubble == pytest.approx(slowest * (1 + 7 / (64 + 16) * 2 / 4))
    config.parallel.pipeline, config.parallel.virtual_pipeline, config.parallel.context = 1, None, 2
    two = expected_step_time(config, 16, 32000, WORKLOAD, machine).context
    config.parallel.context = 4
    assert expected_step_time(config, 16, 32000, WORKLOAD, machine).context == pytest.approx(3 * two) and two > 0
    config.parallel.context, config.parallel.tensor = 1, 8
    inside = expected_step_time(config, 16, 32000, WORKLOAD, machine)
    config.parallel.tensor = 16
    assert expected_step_time(config, 16, 32000, WORKLOAD, machine).tensor > 8 * inside.tensor > 0


def test_workload_of_a_configuration() -> None:
    config = tiny_config()
    config.data.tokens_per_row, config.data.train_group_size = 512, 2
    config.training.embedding_batch_size, config.training.generative_batch_size = 32, 10
    lengths = TextLengths(text_tokens=100, sequence_tokens=1000, supervised_share=0.25)
    texts, chats = Workload.of_config(config, 4, lengths).kinds
    assert (texts.segments, texts.tokens, texts.rows) == (96, 9600, 20)
    # A sequence is no longer than a row.
    assert (chats.tokens, chats.rows, chats.row_labels, chats.labels) == (5120, 12, 128, 1280)
    config.training.objective = "generative"
    assert [rows.kind for rows in Workload.of_config(config, 4, lengths).kinds] == ["generative"]


def test_a_plan_ranks_what_fits_and_says_why_not() -> None:
    config = preset("mistral_7b", "--training.recompute", "full", "--data.tokens_per_row", "4096")
    plan = make_plan(config, 16, 32000, memory_gib=40)
    assert plan.configured is not None and plan.configured.memory.peak > plan.memory_bytes
    assert plan.candidates and plan.too_large and plan.refused
    times = [estimate.step_time.total for estimate in plan.candidates]
    assert times == sorted(times)
    assert all(estimate.memory.peak <= plan.memory_bytes for estimate in plan.candidates)
    assert all(estimate.memory.peak > plan.memory_bytes for estimate in plan.too_large)
    every = len(plan.candidates) + len(plan.too_large) + len(plan.refused)
    assert every == len(list(meshes(config, 16)))
    text = format_plan(plan)
    assert "DOES NOT FIT" in text and "Impossible" in text and "build-db" not in text
    config.data.retro_project = "some/db"
    assert "megatron-grit build-db --project-dir some/db --dry-run" in format_plan(make_plan(config, 16, 32000))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--parallel.tensor", "3"], "no multiple of tensor 3"),
        (["--parallel.pipeline", "3"], "no multiple of"),
        (["--parallel.sequence_parallel", "true"], "needs parallel.tensor above 1"),
        (["--parallel.expert", "2"], "needs a mixture of experts"),
        (["--parallel.tensor", "16"], "does not divide model.num_query_groups 8"),
        (["--training.embedding_batch_size", "2"], "fewer than the 16 rows of a step"),
    ],
)
def test_an_impossible_mesh_is_refused_with_its_reason(options: list[str], reason: str) -> None:
    config = preset("mistral_7b", *options)
    plan = make_plan(config, 16, 32000)
    assert plan.configured is None and any(reason in problem for problem in plan.problems), plan.problems
    assert "The configuration is impossible" in format_plan(plan)


def test_a_mixture_is_planned_over_expert_sizes() -> None:
    config = preset("mixtral_8x7b", "--training.recompute", "full")
    plan = make_plan(config, 64, 32000, lengths=TextLengths(text_tokens=128))
    sizes = {estimate.parallel["expert"] for estimate in plan.candidates}
    assert sizes and sizes <= {1, 2, 4, 8}
    assert any("does not divide model.num_experts 8" in refusal.reason for refusal in plan.refused)


def test_inputs_need_not_be_there() -> None:
    assert problems_of(preset("mistral_7b"), 8) == []
    assert problems_of(preset("mistral_7b", "--model.retro.num_neighbors", "2"), 8) == []


def test_the_command() -> None:
    options = ["--model", "mistral_7b", "--world-size", "16", "--memory-gb", "80", "--parallel.tensor", "2"]
    done = plan_command(*options)
    assert done.returncode == 0, done.stderr
    for words in ("7,241,732,096", "tensor 2 x pipeline 1 x data 8", "Memory a rank", "grad cache", "Step time"):
        assert words in done.stdout
    plan = json.loads(plan_command(*options, "--json").stdout)
    assert plan["configured"]["parameters"]["total"] == 7_241_732_096
    assert plan["configured"]["memory"]["peak"] == max(plan["configured"]["memory"]["moments"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "mistral_7b", "--parallel.tensor", "3"], "is no multiple of tensor 3"),
        (["--model", "tiny_mistral"], "model.vocab_size is null and data.tokenizer is not set"),
        (["--model", "mistral_7b", "--efficiency", "0"], "--efficiency must be above 0"),
        (["--model", "mistral_7b", "--parallel.tensr", "2"], "did you mean --parallel.tensor"),
    ],
)
def test_the_command_refuses_in_one_line(options: list[str], message: str) -> None:
    done = plan_command(*options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_grit.cli.plan import main\n"
        "sys.exit(main(['--model', 'mistral_7b', '--world-size', '8']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


SEGMENT = 128
KEPT = {
    "dense": {},
    "mixture": {"experts": 4},
    "layer norm and gelu": {"normalization": "layernorm", "activation": "gelu", "num_query_groups": None},
    "no rope": {"position_embedding": "none"},
    "dropout": {"hidden_dropout": 0.1},
    "bf16": {},
    "neox": {"add_bias_linear": True, "normalization": "layernorm", "parallel_residual": "two_norms"},
    "gptj": {"add_mlp_bias": True, "add_output_bias": True, "parallel_residual": "one_norm", "activation": "gelu_tanh"},
    "qwen3": {"qk_norm": True, "kv_channels": 24},
    "qwen2_moe": {
        "experts": 4,
        "add_qkv_bias": True,
        "moe_ffn_hidden_size": 32,
        "moe_shared_ffn_hidden_size": 48,
        "moe_shared_expert_gate": True,
        "moe_dense_layers": [1],
    },
    "selective": {},
    "full": {},
    "context": {},
    "context, causal": {},
    "context, no rope": {"position_embedding": "none"},
}


@contextmanager
def one_of_two_context_ranks() -> Iterator[None]:
    """Collectives of two context parallel ranks answered by this process alone, with its own tensors."""
    import torch

    from megatron_grit.models import attention, pooling

    def gather(values: torch.Tensor, group: object) -> torch.Tensor:
        return torch.cat([values, values])

    with (
        mock.patch.object(attention, "gather_from_sequence_parallel_region", gather),
        mock.patch.object(pooling, "sum_over_group", lambda values, group: values),
    ):
        yield


@pytest.mark.parametrize("case", KEPT)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    """Every tensor that a forward pass saves, weights left out, against the count."""
    import torch

    from megatron_grit.data.indexed.roles import RowKind
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.planning.memory import _StageMemory
    from tests.rows import make_row

    config, tokens = tiny_config(**KEPT[case]), 512  # type: ignore[arg-type]
    config.training.precision = "bf16" if case == "bf16" else "fp32"
    config.training.recompute = case if case in ("selective", "full") else "none"  # type: ignore[assignment]
    config.embedding.causal = "causal" in case
    kept: dict[int, int] = {}
    size = 2 if case.startswith("context") else 1
    with parallel_job(config.parallel, 0) as context, one_of_two_context_ranks():
        model = build_model(config, VOCAB, replace(context, context_size=size)).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = model(make_row(RowKind.EMBEDDING, [SEGMENT] * (tokens // SEGMENT), tokens), Output.EMBEDDINGS)
    assert states.requires_grad
    config.parallel.context = size
    row = pairs(0, causal=config.embedding.causal, row_tokens=tokens, segment_tokens=SEGMENT)
    counted = _StageMemory(config, size, VOCAB, Workload(kinds=(row,)), "cpu", 0)._activations(row)
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segment", [8, 48, 192])
@pytest.mark.parametrize("size", [2, 4])
def test_gathered_keys_are_those_of_the_busiest_rank(size: int, segment: int, causal: bool) -> None:
    from megatron_grit.models.row_share import RowShare, held_positions

    tokens = 192
    keys = []
    for rank in range(size):
        share = RowShare(held_positions(tokens, rank, size), tokens, rank, size, cast(Any, None))
        keys.append(len(share.pieces([segment] * (tokens // segment), causal).key_index_K))
    assert gathered_keys(tokens, segment, size, causal) == max(keys)
