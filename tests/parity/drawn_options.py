"""Decoders drawn at random from our own options, whether a family has such a shape or not.

A case is right if every segment of a packed row gives what it gives alone, in both modes, if its loss falls along the
gradient by what the gradient says, and if, where a family of transformers has the shape, the exported model gives our
logits there. Or it is refused before anything is built, by the key of an option.
"""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import CheckpointError
from tests.parity.drawn_models import LENGTHS, ROWS, SEGMENTS, VOCAB, export_case, logits_of_theirs, near

BIASES = ("add_bias_linear", "add_qkv_bias", "add_attention_output_bias", "add_mlp_bias", "add_output_bias")


def draw_options(draw: random.Random) -> dict[str, Any]:
    """Values of ``model``. Each option is at its default in about half of the cases."""

    def maybe(share: float, *values: Any) -> Any:
        return draw.choice(values) if draw.random() < share else None

    layers, groups, width = draw.randint(1, 3), draw.choice([1, 2, 3]), draw.choice([8, 16])
    heads = groups * draw.choice([1, 2])
    given: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": maybe(0.3, 24, 40) or heads * width,
        "ffn_hidden_size": draw.choice([24, 40]),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": width,
        "max_position_embeddings": draw.choice([64, 128]),
        "init_std": 0.15,
        "norm_epsilon": draw.choice([1e-6, 1e-5, 1e-3]),
        "normalization": maybe(0.5, "layernorm"),
        "layernorm_zero_centered_gamma": maybe(0.2, True),
        "activation": maybe(0.5, "gelu", "gelu_tanh"),
        "parallel_residual": maybe(0.4, "two_norms", "one_norm"),
        "position_embedding": maybe(0.3, "learned_absolute", "none"),
        "rotary_base": maybe(0.3, 100.0),
        "rotary_percent": maybe(0.3, 0.5),
        "rotary_interleaved": maybe(0.2, True),
        "rope_type": maybe(0.3, "linear", "llama3", "yarn"),
        "qk_norm": maybe(0.2, True),
        "attention_scale": maybe(0.2, 1.0, 0.3),
        "tie_embeddings": maybe(0.4, True),
        "sliding_window": maybe(0.3, 3, 8),
    } | {key: maybe(0.25, True) for key in BIASES}
    if given["rope_type"] is not None:
        given |= {"rope_factor": 2.0, "rope_original_length": 32}
    if given["sliding_window"] is not None:
        given["window_layers"] = maybe(0.5, sorted(draw.sample(range(layers), draw.randint(1, layers))))
    if draw.random() < 0.35:
        given |= {
            "num_experts": (count := draw.randint(2, 4)),
            "moe_top_k": draw.randint(1, count),
            "moe_normalize_top_k": draw.random() < 0.5,
            "moe_ffn_hidden_size": maybe(0.5, 8, 20),
            "moe_shared_ffn_hidden_size": maybe(0.3, 12),
            "moe_shared_expert_gate": maybe(0.3, True),
            "moe_dense_layers": maybe(0.3, [0]),
            "moe_aux_loss_coeff": 0.0,
        }
    return {key: value for key, value in given.items() if value is not None}


def alone(kind: RowKind, tokens: Tensor) -> PackedRow:
    """A row of one segment."""
    length = len(tokens)
    return PackedRow(
        embeds=kind is RowKind.EMBEDDING,
        tokens_1T=tokens[None],
        positions_1T=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        padding_mask_1T=torch.zeros(1, length, dtype=torch.bool),
        labels_1T=tokens.roll(-1)[None],
        loss_mask_1T=torch.ones(1, length),
    )


def run_own_case(seed: int, folder: Path, context: Any) -> str:
    """Draw a case and take it all the way. Returns what it was, and how it ended.

    Args:
        seed: of the draw.
        folder: empty.
        context: of the process.

    Raises:
        AssertionError: a number differs, or a refusal names no key.
    """
    given = draw_options(random.Random(seed))
    config = RunConfig(model=ModelConfig(**given, vocab_size=VOCAB))
    config.training.precision, config.parallel.device, config.data.tokenizer = "fp32", "cpu", "none"
    told = ", ".join(f"{key} {value}" for key, value in given.items())
    problems = [problem for problem in find_problems(config, 1, files=False) if problem.key.startswith("model")]
    names = {field.name for field in fields(ModelConfig)}
    for problem in problems:
        key = problem.key.rpartition(".")[2]
        assert key in names and key in problem.message and "\n" not in problem.message, problem
    if problems:
        return f"{told}: refused, {problems[0].message}"
    try:
        return f"{told}: {_run(config, seed, folder, context)}"
    except Exception as error:
        raise AssertionError(f"own case {seed}, {told}: {error}") from error


def _run(config: RunConfig, seed: int, folder: Path, context: Any) -> str:
    import transformers

    from megatron_grit.convert.families.registry import family_of_model
    from megatron_grit.models.decoder import Output, build_model

    ours = build_model(config, VOCAB, context).train()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for kind, output in ((RowKind.GENERATIVE, Output.LOGITS), (RowKind.EMBEDDING, Output.HIDDEN)):
            each = [ours(alone(kind, segment), output) for segment in SEGMENTS]
            near(f"{kind.value} alone", ours(ROWS[kind], output), torch.cat(each))
    row = ROWS[RowKind.GENERATIVE]

    def loss() -> Tensor:
        return (ours(row, Output.TOKEN_LOSSES).flatten() * row.loss_mask_1T[0]).sum() / sum(LENGTHS)

    before = loss()
    before.backward()
    gradients = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    square = sum(float(value.double().square().sum()) for value in gradients.values())
    with torch.no_grad():
        step = min(1e-3, 1e-3 / square)
        for name, parameter in ours.named_parameters():
            if name in gradients:
                parameter -= step * gradients[name]
        fall = float(before - loss()) / (step * square)
    assert 0.7 < fall < 1.3, f"the loss falls by {fall:.3f} of what its gradient says"
    try:
        table = family_of_model(config.model)
    except CheckpointError as error:
        assert "no architecture of transformers that is known here has such a shape" in str(error)
        return "no family has it"
    export_case(ours, table, config.model, folder / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        near("exported", ours(row, Output.LOGITS), logits_of_theirs(theirs))
    return f"is a {table.architecture}"
