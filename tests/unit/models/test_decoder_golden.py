"""Names and shapes of a decoder's weights in a checkpoint, and what fresh weights compute, as they were recorded.

Checkpoints of earlier versions load as long as the names stay, and runs repeat as long as fresh weights and outputs do.
To record them again, on either engine: ``python -m tests.unit.models.test_decoder_golden``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.rows import VOCAB, make_row, tiny_config

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "decoder.json"
SEED = 1
TOLERANCE = 2e-6  # of processors with other vector instructions
GPT: dict[str, Any] = {"add_bias_linear": True, "normalization": "layernorm", "num_query_groups": None}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "qk_norm_yarn": {"qk_norm": True, "rope_type": "yarn", "rope_factor": 4.0, "rope_original_length": 128},
    "learned_positions": GPT | {"activation": "gelu", "position_embedding": "learned_absolute", "tie_embeddings": True},
    "parallel_residual": GPT
    | {
        "activation": "gelu_tanh",
        "parallel_residual": "one_norm",
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
        "add_output_bias": True,
    },
    "experts": {"experts": 4},
    "shared_expert": {"experts": 4, "moe_shared_ffn_hidden_size": 96, "moe_shared_expert_gate": True},
    "some_dense_layers": {"experts": 4, "moe_ffn_hidden_size": 48, "moe_dense_layers": [0]},
    "embedding_head": {"num_linear_layers": 2, "projection_dim": 24, "pooling": "learnedmean", "asymmetric": "heads"},
}
OF_EMBEDDING = ("num_linear_layers", "projection_dim", "pooling", "asymmetric")


def config_of(case: str) -> RunConfig:
    options = {"num_layers": 2} | CASES[case]
    embedding = {name: options.pop(name) for name in OF_EMBEDDING if name in options}
    config = tiny_config(**options)
    for name, value in embedding.items():
        setattr(config.embedding, name, value)
    return config


def observe(case: str, context: ParallelContext) -> dict[str, Any]:
    """What the file holds of a case."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.training.checkpoint import model_state

    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)
    model = build_model(config_of(case), VOCAB, context).eval()
    named: dict[str, str] = {}
    for value in nested_values(model_state(model, context)):
        # Gate and up projection are one tensor in the file.
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        named |= {part.key: str(list(part.global_shape)) for part in parts}
    embedding_row = make_row(RowKind.EMBEDDING, [12, 7, 16], 40)
    embedding_row.is_query_S = torch.tensor([True, False, False])
    with torch.no_grad():
        losses = model(make_row(RowKind.GENERATIVE, [12, 7, 16], 40), Output.TOKEN_LOSSES)
        embeddings = model(embedding_row, Output.EMBEDDINGS)
    return {
        "weights": dict(sorted(named.items())),
        "token_losses": losses.double().sum().item(),
        "embeddings": embeddings.double()[:, :3].flatten().tolist(),
    }


@pytest.mark.parametrize("case", CASES)
def test_names_and_outputs_are_those_recorded(case: str, context: ParallelContext) -> None:
    expected, found = json.loads(GOLDEN.read_text())[case], observe(case, context)
    assert found["weights"] == expected["weights"]
    for output in ("token_losses", "embeddings"):
        assert found[output] == pytest.approx(expected[output], rel=TOLERANCE, abs=TOLERANCE), output


if __name__ == "__main__":
    with parallel_job(ParallelConfig(device="cpu"), seed=SEED) as mesh:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({case: observe(case, mesh) for case in CASES}, indent=1) + "\n")
