"""What megatron-core's own GPTModel and HybridModel wrote, in the layout that Megatron-LM gives it, loads at other
layouts."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_grit.config.schema import RunConfig
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_row, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LENGTH = 24
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Written:
    """How a checkpoint is written."""

    model: dict[str, Any] = field(default_factory=dict)
    numbered: bool = False
    """Layers have a number each. They are stacked under one name otherwise."""
    te_names: bool = False
    """Norms before experts have the names that TransformerEngine's layers give them."""
    pattern: str | None = None
    """Layers of HybridModel, a symbol each. None: GPTModel."""


WRITTEN: dict[str, Written] = {
    "dense": Written(),
    "dense_numbered": Written(numbered=True),
    "experts_numbered_te": Written({"experts": 4}, numbered=True, te_names=True),
    "hybrid": Written(pattern="*-" * 4),
    "hybrid_experts_tied": Written({"experts": 4, "tie_embeddings": True}, pattern="*E" * 4),
    "hybrid_mixed": Written({"experts": 4, "moe_dense_layers": [0, 2]}, pattern="*-*E" * 2),
}
OTHER_ORDER = Written(pattern="**--" * 2)
LAYOUTS: dict[str, dict[str, Any]] = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "layers": ({"num_layers": 2}, VOCAB, "set model.num_layers to 4"),
    "width": ({"hidden_size": 32, "kv_channels": 16}, VOCAB, "compare model.hidden_size"),
    "ffn": ({"ffn_hidden_size": 96}, VOCAB, "compare model.ffn_hidden_size"),
    "groups": ({"num_query_groups": 4}, VOCAB, "model.num_query_groups"),
    "vocabulary": ({}, 5000, "the vocabulary 5000 tokens; give the tokenizer"),
    "biases": ({"add_qkv_bias": True}, VOCAB, "is of another model"),
}
WRONG_HYBRID: dict[str, tuple[str, dict[str, Any], str]] = {
    "hybrid_layers": ("hybrid", {"num_layers": 8}, "set model.num_layers to 4"),
    "hybrid_feed_forward": ("hybrid", {"experts": 4}, "its layers are *-*-*-*- (*"),
    "hybrid_order": ("order", {}, "a HybridModel with the layers **--**--; only attention"),
}


def engine_model(config: RunConfig, written: Written) -> Any:
    """megatron-core's own model with its local layers. HybridModel is MambaModel in 0.16, and its last norm is
    TransformerEngine's, which torch's takes the place of here."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_grit import compat
    from megatron_grit.models.layer_specs import transformer_config

    model = config.model
    common: dict[str, Any] = {
        "vocab_size": 256,  # as Megatron-LM pads it: a multiple of 128 that tensor parallel ranks divide
        "max_sequence_length": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(model.rotary_base),
        "share_embeddings_and_output_weights": model.tie_embeddings,
    }

    def local_layer(experts: int | None) -> Any:
        return get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm").submodules

    if written.pattern is None:
        spec = ModuleSpec(module=TransformerLayer, submodules=local_layer(model.num_experts))
        return GPTModel(config=transformer_config(config), transformer_layer_spec=spec, **common)

    if compat.engine_version() >= (0, 18):
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        stack, submodules = block.HybridStack, block.HybridStackSubmodules
        names = ("hybrid_stack_spec", "hybrid_layer_pattern")
    else:
        from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
        from megatron.core.ssm import mamba_block as block

        stack, submodules = block.MambaStack, block.MambaStackSubmodules
        names = ("mamba_stack_spec", "hybrid_override_pattern")
    dense, mixture = local_layer(None), local_layer(4)
    spec = submodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=dense.input_layernorm,
                self_attention=dense.self_attention,
                self_attn_bda=dense.self_attn_bda,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=dense.pre_mlp_layernorm,
                mlp=dense.mlp,
                mlp_bda=dense.mlp_bda,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        moe_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=mixture.pre_mlp_layernorm, mlp=mixture.mlp, mlp_bda=mixture.mlp_bda
            ),
        ),
    )
    # Each of the pattern's symbols is a layer there.
    model_config = replace(model, num_layers=len(written.pattern), moe_dense_layers=None)
    spec = {names[0]: ModuleSpec(module=stack, submodules=spec), names[1]: written.pattern}
    with mock.patch.object(block, "TENorm", WrappedTorchNorm):
        return HybridModel(config=transformer_config(replace(config, model=model_config)), **spec, **common)


def write(config: RunConfig, folder: Path, written: Written) -> list[list[float]]:
    """Save megatron-core's own model at tensor parallel size 2 as Megatron-LM does; returns its logits."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_grit import compat
    from megatron_grit.parallel.launch import parallel_job

    config = replace(config, parallel=replace(config.parallel, tensor=2))
    model_config = config.model
    with parallel_job(config.parallel, seed=3) as context:
        model = engine_model(config, written).eval()
        metadata: dict[str, Any] = {"dp_cp_group": context.replica_group}
        by_layer = {"non_homogeneous_layers": True} if written.numbered else {}
        weights = model.sharded_state_dict(metadata=metadata | by_layer)
        for tensor in weights.values() if written.te_names else ():
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
        has_strategies = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        options = {"async_strategy": "mcore"} if has_strategies else {}
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
        for name, written in WRITTEN.items():
            config = tiny_config(**written.model)
            found[name] = write(config, Path(directory) / name, written)
            for layout, options in LAYOUTS.items():
                found[f"{name}/{layout}"] = read(config, Path(directory) / name, options)
        write(tiny_config(), Path(directory) / "order", OTHER_ORDER)
        wrong = {name: ("dense", shape, vocab_size) for name, (shape, vocab_size, _) in WRONG.items()}
        wrong |= {name: (folder, shape, VOCAB) for name, (folder, shape, _) in WRONG_HYBRID.items()}
        for name, (folder, shape, vocab_size) in wrong.items():
            try:
                read(tiny_config(**shape), Path(directory) / folder, {"tensor": 2}, vocab_size)
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


@pytest.mark.parametrize("name", [*WRONG, *WRONG_HYBRID])
def test_another_model_is_refused_with_the_key_to_change(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert (WRONG | WRONG_HYBRID)[name][2] in rank[name] and "\n" not in rank[name]
