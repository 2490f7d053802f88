"""What megatron-core's own GPTModel wrote, in the layout that Megatron-LM gives it, loads at other layouts."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import RunConfig
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_row, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LENGTH = 24
TOLERANCE = 2e-5
# How the checkpoint is written: with experts, layers stacked under one name or numbered, names of layers that
# TransformerEngine made.
WRITTEN: dict[str, tuple[int | None, bool, bool]] = {
    "dense": (None, False, False),
    "dense_numbered": (None, True, False),
    "experts_numbered_te": (4, True, True),
}
LAYOUTS: dict[str, dict[str, Any]] = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "layers": ({"num_layers": 2}, VOCAB, "set model.num_layers to 4"),
    "width": ({"hidden_size": 32, "kv_channels": 16}, VOCAB, "compare model.hidden_size"),
    "ffn": ({"ffn_hidden_size": 96}, VOCAB, "compare model.ffn_hidden_size"),
    "groups": ({"num_query_groups": 4}, VOCAB, "model.num_query_groups"),
    "vocabulary": ({}, 5000, "the vocabulary 5000 tokens; give the tokenizer"),
    "biases": ({"add_qkv_bias": True}, VOCAB, "is of another model"),
}


def write(config: RunConfig, folder: Path, numbered: bool, te_names: bool) -> list[list[float]]:
    """Save megatron-core's GPTModel at tensor parallel size 2 as Megatron-LM does; returns its logits."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_grit import compat
    from megatron_grit.models.layer_specs import transformer_config
    from megatron_grit.parallel.launch import parallel_job

    config = replace(config, parallel=replace(config.parallel, tensor=2))
    model_config = config.model
    with parallel_job(config.parallel, seed=3) as context:
        model = compat.gpt_model_class()(
            config=transformer_config(config),
            transformer_layer_spec=get_gpt_layer_local_spec(
                num_experts=model_config.num_experts, moe_grouped_gemm=False, normalization="RMSNorm"
            ),
            vocab_size=256,  # as Megatron-LM pads it: a multiple of 128 that tensor parallel ranks divide
            max_sequence_length=model_config.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=model_config.rotary_base,
            share_embeddings_and_output_weights=model_config.tie_embeddings,
        ).eval()
        metadata: dict[str, Any] = {"dp_cp_group": context.replica_group}
        weights = model.sharded_state_dict(metadata=metadata | ({"non_homogeneous_layers": True} if numbered else {}))
        for tensor in weights.values() if te_names else ():
            if isinstance(tensor, ShardedTensor):
                tensor.key = tensor.key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        moment = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(64), replica_id=context.rank
        )
        state = {
            "args": Namespace(num_layers=model_config.num_layers, hidden_size=model_config.hidden_size),
            "checkpoint_version": 3.0,
            "iteration": 100,
            "model": weights,
            "optimizer": {"exp_avg": moment},
            "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 100},
            "rng_state": ShardedObject(
                "rng_state", [{"torch_rng_state": torch.get_rng_state()}], (1, 2), (0, context.tensor_rank)
            ),
        }
        target = folder / "iter_0000100"
        if context.rank == 0:
            target.mkdir(parents=True)
            (folder / "latest_checkpointed_iteration.txt").write_text("100")
        dist.barrier()
        options = {"async_strategy": "mcore"} if compat.engine_version() >= (0, 19) else {}
        request = dist_checkpointing.save(state, str(target), async_sharded_save=True, **options)
        request.execute_sync()
        compat.let_routers_run_without_transformer_engine()  # 0.16's own cannot
        tokens = torch.arange(LENGTH)[None] % VOCAB
        mask = torch.ones(LENGTH, LENGTH).tril()[None, None] < 0.5
        logits = model(tokens, torch.arange(LENGTH)[None], mask)
        # With parallel output each rank holds its part of the vocabulary.
        return gather_from_tensor_model_parallel_region(logits)[0, :, :VOCAB].tolist()


def read(config: RunConfig, path: Path, layout: dict[str, Any], vocab_size: int = VOCAB) -> list[list[float]] | None:
    """Load it; the last stage returns its logits."""
    import torch
    import torch.distributed as dist

    from megatron_grit.data.indexed.roles import RowKind
    from megatron_grit.models.decoder import Output, build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights
    from megatron_grit.training.megatron_checkpoint import find_megatron_checkpoint

    config = replace(config, parallel=replace(config.parallel, **layout))
    with parallel_job(config.parallel, seed=4) as context:
        chunks = build_chunks(config, vocab_size, context)
        folder = find_megatron_checkpoint(path)
        assert folder is not None and find_megatron_checkpoint(folder) == folder
        load_weights(folder, chunks, context)
        (model,) = chunks
        model.eval()
        row = make_row(RowKind.GENERATIVE, [LENGTH], LENGTH)
        row.tokens_1T = torch.arange(LENGTH)[None] % VOCAB
        if not context.is_first_stage:
            hidden = torch.empty(LENGTH, 1, config.model.hidden_size)
            dist.recv(hidden, src=context.rank - 1)
            model.set_input_tensor(hidden)
        out = model(row, Output.LOGITS)
        if not context.is_last_stage:
            dist.send(out.contiguous(), dst=context.rank + 1)
            return None
        return out.tolist()


def run_everything(directory: str) -> dict[str, Any]:
    """One job for all cases: starting processes is what takes long."""
    import torch

    from megatron_grit.errors import CheckpointError

    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, (experts, numbered, te_names) in WRITTEN.items():
            config = tiny_config(experts=experts)
            found[name] = write(config, Path(directory) / name, numbered, te_names)
            for layout, options in LAYOUTS.items():
                found[f"{name}/{layout}"] = read(config, Path(directory) / name, options)
        for name, (shape, vocab_size, _) in WRONG.items():
            try:
                read(tiny_config(**shape), Path(directory) / "dense", {"tensor": 2}, vocab_size)
                found[name] = "loaded"
            except CheckpointError as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("megatron")
    return run_on_ranks(run_everything, 2, tmp_path_factory.mktemp("results"), str(directory))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written", WRITTEN)
def test_logits_are_those_of_the_engine(ranks: list[dict[str, Any]], written: str, layout: str) -> None:
    import torch

    expected = torch.tensor(ranks[0][written])
    compared = [torch.tensor(rank[f"{written}/{layout}"]) for rank in ranks if rank[f"{written}/{layout}"] is not None]
    assert compared and expected.std() > 0.1
    for logits in compared:
        torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", WRONG)
def test_another_model_is_refused_with_the_key_to_change(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert WRONG[name][2] in rank[name] and "\n" not in rank[name]
