"""The start-up audit on two processes: no false alarm on any layout, and what only several processes can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, tiny_config

SP = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2_sp": SP,
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
    "dp2_overlap": {"overlap": True},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2},
    "ep2_overlap": {"expert": 2, "overlap": True},
    "cp2_ep2": {"context": 2, "expert": 2},
    "tp2_sp_ep2": SP | {"expert": 2, "expert_tensor": 1},
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"sliding_window": 64},
    "moe": {"experts": 4},
    "tied": {"tie_embeddings": True, "position_embedding": "learned_absolute"},
}
# Of each model, dtype and pooling go round with the layout, so that every layout has had each of them somewhere.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    f"{model}_{layout}": (
        model,
        mesh,
        ("fp32", "bf16")[number % 2],
        ("mean", "weightedmean", "lasttoken", "cls")[number % 4],
    )
    for start, model in enumerate(MODELS)
    for number, (layout, mesh) in enumerate((LAYOUTS | (EXPERT_LAYOUTS if model == "moe" else {})).items(), start)
}


def lose_boundaries_of_inner_chunks() -> AbstractContextManager[Any]:
    """Chunks of layers that neither embed tokens nor compute losses go without cu_seqlens."""
    from megatron_grit.models.attention import PackedSegments
    from megatron_grit.models.decoder import GritDecoder

    forward, of_row, inner = GritDecoder.forward, PackedSegments.of_row, [False]

    def watched_forward(self: Any, *args: Any) -> Any:
        inner[0] = not self.pre_process and not self.post_process
        return forward(self, *args)

    def damaged_of_row(*args: Any) -> Any:
        segments = of_row(*args)
        if inner[0]:
            segments.lengths = [sum(segments.lengths)]
        return segments

    stack = ExitStack()
    stack.enter_context(mock.patch.object(GritDecoder, "forward", watched_forward))
    stack.enter_context(mock.patch.object(PackedSegments, "of_row", damaged_of_row))
    return stack


def take_another_slice() -> AbstractContextManager[Any]:
    """Context parallel ranks hold consecutive tokens, and the keys are picked as if they did not."""
    from megatron_grit.models import row_share

    right = row_share.gathered_places(48, 2)

    def consecutive(row_length: int, rank: int, size: int) -> torch.Tensor:
        return torch.arange(row_length).view(size, -1)[rank]

    return mock.patch.multiple(row_share, held_positions=consecutive, gathered_places=lambda *_: right)


def pool_the_slice() -> AbstractContextManager[Any]:
    """Sums over a segment's tokens are not taken over the ranks that hold them."""
    from megatron_grit.models import pooling

    return mock.patch.object(pooling, "sum_over_group", lambda values, group: values)


def keep_keys_to_oneself() -> AbstractContextManager[Any]:
    """Keys and values are not gathered: the other rank's are taken to be one's own."""
    from megatron_grit.models import attention

    return mock.patch.object(
        attention, "gather_from_sequence_parallel_region", lambda both, group: torch.cat([both, both])
    )


def touch(name: str, rank: int = 1) -> Callable[[list[Any]], None]:
    """One bit of one weight of one rank differs."""

    def damage(wrapped: list[Any]) -> None:
        if torch.distributed.get_rank() == rank:
            parameters = dict(wrapped[0].module.named_parameters())
            with torch.no_grad():
                parameters[name].view(-1).view(torch.uint8)[40] ^= 1

    return damage


def spoil(wrapped: list[Any]) -> None:
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            wrapped[0].module.decoder.final_layernorm.weight[0] = float("nan")


NORM = "decoder.layers.1.input_layernorm.weight"
# Case, what is wrong with the code, what is wrong with the weights, and the rank's message.
DAMAGED: dict[str, tuple[str, Callable[[], Any], Callable[[list[Any]], None] | None, str]] = {
    "middle stage without cu_seqlens": (
        "dense_pp2_vpp2",
        lose_boundaries_of_inner_chunks,
        None,
        r"rank 0 .*pipeline stage 0, .*layer 3, .*as without the boundaries of segments",
    ),
    "wrong slice": ("dense_cp2", take_another_slice, None, "causal pass: layer 1, attention of segment 2 sees padding"),
    "own keys only": ("dense_cp2", keep_keys_to_oneself, None, r"layer 1, attention of segment \d (sees|does not see)"),
    "slice pooled": (
        "moe_cp2",
        pool_the_slice,
        None,
        "embedding output: embedding.normalize is set, and an embedding has the norm 0.0000",
    ),
    "replicas differ": (
        "dense_dp2",
        nullcontext,
        touch(NORM),
        "the weight decoder.layers.1.input_layernorm.weight is not that of rank 1",
    ),
    "overlapped replicas differ": (
        "dense_dp2_overlap",
        nullcontext,
        touch("embedding.word_embeddings.weight"),
        "embedding.word_embeddings.weight is not that of rank 1",
    ),
    "norms of tensor parallel ranks differ": (
        "dense_tp2_sp",
        nullcontext,
        touch(NORM),
        "input_layernorm.weight is not",
    ),
    "context parallel replicas differ": ("dense_cp2", nullcontext, touch("output_layer.weight"), "output_layer.weight"),
    "tied embeddings differ": (
        "tied_pp2",
        nullcontext,
        touch("output_layer.weight"),
        "embedding.word_embeddings.weight is not that of rank 1",
    ),
    "routers differ": ("moe_ep2", nullcontext, touch("decoder.layers.0.mlp.router.weight"), "router.weight is not"),
    "last stage not finite": ("dense_pp2", nullcontext, spoil, "rank 1 .*decoder.final_layernorm.weight is not finite"),
}


def config_of(case: str) -> RunConfig:
    model, mesh, precision, pooling = CASES[case]
    config = tiny_config(**MODELS[model])
    config.training.precision = precision  # type: ignore[assignment]
    config.embedding.pooling = pooling  # type: ignore[assignment]
    config.embedding.projection_dim = 12 if model == "dense" else None
    for name, value in mesh.items():
        setattr(config.parallel, name, value)
    return config


def audit_of(case: str, damage: Callable[[list[Any]], None] | None = None) -> str:
    """The message; "passed" where there is none."""
    from megatron_grit.errors import AuditError
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.audit.run import audit_model, audit_weights
    from megatron_grit.training.optimizer import wrap_chunks

    config = config_of(case)
    with parallel_job(config.parallel, seed=1) as context:
        wrapped = wrap_chunks(build_chunks(config, VOCAB, context), config.parallel.overlap)
        if damage is not None:
            damage(wrapped)
        try:
            audit_weights([chunk.module for chunk in wrapped], context)
            audit_model(config, context, wrapped, pad_id=0)
        except AuditError as error:
            return str(error)
        return "passed"


def audit_everything() -> dict[str, str]:
    results = {case: audit_of(case) for case in CASES}
    for name, (case, code, weights, _) in DAMAGED.items():
        with code():
            results[name] = audit_of(case, weights)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_on_ranks(audit_everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_no_false_alarm(results: list[dict[str, str]], case: str) -> None:
    assert [rank[case] for rank in results] == ["passed", "passed"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_found(results: list[dict[str, str]], name: str) -> None:
    message = DAMAGED[name][-1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(results[0][name])
    assert results[0][name] == results[1][name]  # every rank ends with the same words
    assert results[0][name].endswith("--training.audit off")


def train_with_and_without(directory: str) -> list[list[float]]:
    """Weights after two steps on this rank, with the audit and without."""
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.trainer import Trainer
    from tests.corpus import tiny_run

    found = []
    for audit in ("on", "off"):
        config = tiny_run(Path(directory), experts=4)
        config.model.hidden_dropout = 0.1
        config.parallel.expert, config.parallel.overlap = 2, True
        config.training.steps, config.training.audit = 2, audit  # type: ignore[assignment]
        config.output_dir = str(Path(directory) / audit)
        with parallel_job(config.parallel, config.training.seed) as context:
            trainer = Trainer(config, context)
            trainer.run()
            found.append(torch.cat([p.detach().flatten() for p in trainer.chunks[0].parameters()]).tolist())
    return found


def test_training_is_the_same_with_it_and_without(tmp_path: Path) -> None:
    from tests.corpus import tiny_run

    tiny_run(tmp_path)
    for with_audit, without in run_on_ranks(train_with_and_without, 2, tmp_path, str(tmp_path)):
        assert with_audit == without
