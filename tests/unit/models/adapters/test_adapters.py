"""Adapters and frozen parameters on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_grit.config.checks.adapter import adapter_targets
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.models.adapters import PartLayout, adapted_linears, count_trainable, global_name
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.context import ParallelContext
from tests.rows import VOCAB, make_batch, tiny_config


def lora_config(**model: Any) -> RunConfig:
    config = tiny_config(**model)
    config.adapter.kind, config.adapter.rank = "lora", 4
    return config


def losses(model: GritDecoder) -> torch.Tensor:
    batch = make_batch(rows=1)
    outputs = [
        model(batch.rows_of("embedding")[0], Output.EMBEDDINGS),
        model(batch.rows_of("generative")[0], Output.TOKEN_LOSSES),
    ]
    return torch.cat([output.flatten() for output in outputs])


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("groups", "widths", "dim"), [(2, (6, 3, 3), 0), (1, (4, 4), 1), (1, (5,), 2), (3, (2, 1, 1), 2)]
)
def test_split_and_join_are_inverse(groups: int, widths: tuple[int, ...], dim: int) -> None:
    layout = PartLayout(("a", "b", "c")[: len(widths)], widths, groups)
    shape = [2, 3, 4]
    shape[dim] = groups * sum(widths)
    rows = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = layout.split(rows, dim)
    assert [part.shape[dim] for part in parts] == [groups * width for width in widths]
    assert torch.equal(layout.join(parts, dim), rows)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("experts", [None, 4])
def test_fresh_adapters_change_nothing(context: ParallelContext, kind: str, experts: int | None) -> None:
    config = lora_config(experts=experts, add_qkv_bias=True)
    config.adapter.kind = kind  # type: ignore[assignment]
    model = build_model(config, VOCAB, context).eval()
    plain = build_model(tiny_config(experts=experts, add_qkv_bias=True), VOCAB, context).eval()
    state = {name: value for name, value in model.state_dict().items() if ".adapter." not in name}
    plain.load_state_dict(state)
    for linear in adapted_linears(model).values():
        linear.adapter.reset_magnitudes(linear)
    with torch.no_grad():
        torch.testing.assert_close(losses(model), losses(plain), atol=1e-5, rtol=1e-5)


def merged(linear: Any) -> torch.Tensor:
    """The weight of a layer with its adapter in it, written out row by row of the engine's order."""
    parts, result, row = linear.adapter.parts, linear.weight.detach().clone(), 0
    layout = linear.adapter.layout
    taken = dict.fromkeys(layout.names, 0)
    for _ in range(layout.num_groups):
        for name, width in zip(layout.names, layout.widths, strict=True):
            part, own = parts[name], slice(taken[name], taken[name] + width)
            rows = result[row : row + width] + part.scaling * part.lora_B[own].detach() @ part.lora_A.detach()
            if part.magnitude is not None:
                rows = part.magnitude.detach()[own, None] * F.normalize(rows, dim=1)
            result[row : row + width] = rows
            taken[name] += width
            row += width
    return result


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_its_merged_weight(context: ParallelContext, kind: str, rslora: bool) -> None:
    config = lora_config(add_qkv_bias=True, experts=4, moe_shared_ffn_hidden_size=32)
    config.adapter.kind, config.adapter.rslora, config.adapter.alpha = kind, rslora, 6.0  # type: ignore[assignment]
    model = build_model(config, VOCAB, context).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            linear.adapter.reset_magnitudes(linear)
            for name, parameter in linear.adapter.named_parameters():
                if "lora_A" not in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            part = next(iter(linear.adapter.parts.values()))
            assert part.scaling == pytest.approx(6 / 4**0.5 if rslora else 6 / 4)
        adapted = losses(model)
        for linear in adapted_linears(model).values():
            linear.weight.copy_(merged(linear))
            for name, parameter in linear.adapter.named_parameters():
                if name.endswith("lora_B"):
                    parameter.zero_()
            linear.adapter.reset_magnitudes(linear)
        torch.testing.assert_close(adapted, losses(model), atol=1e-5, rtol=1e-5)


def test_fresh_weights_are_those_of_peft(context: ParallelContext) -> None:
    """Within 1 / sqrt(width), and none of two layers, parts or seeds the same."""
    config = lora_config(experts=2)
    matrices = {
        name: parameter.detach()
        for name, parameter in build_model(config, VOCAB, context).named_parameters()
        if name.endswith("lora_A")
    }
    assert len(matrices) == 4 * (4 + 2 * 3)
    for matrix in matrices.values():
        bound = matrix.shape[1] ** -0.5
        assert 0.9 * bound < matrix.abs().max() <= bound
        assert abs(matrix.std() / (bound / 3**0.5) - 1) < 0.15
    assert len({matrix.flatten()[0].item() for matrix in matrices.values()}) == len(matrices)
    config.training.seed += 1
    other = dict(build_model(config, VOCAB, context).named_parameters())
    assert not any(torch.equal(matrix, other[name]) for name, matrix in matrices.items())


def test_targets(context: ParallelContext) -> None:
    config = lora_config(activation="gelu")
    assert "gate_proj" not in adapter_targets(config)
    config.adapter.targets = ["v_proj", "down_proj"]
    parts = {
        name.rpartition(".")[2]: set(linear.adapter.parts)
        for name, linear in adapted_linears(build_model(config, VOCAB, context)).items()
    }
    assert parts == {"linear_qkv": {"v_proj"}, "linear_fc2": {"down_proj"}}


PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str], bool]]] = {
    "adapters alone": ({}, {}, lambda name: ".adapter." in name),
    "and norms": ({}, {"trainable": ["norms"]}, lambda name: ".adapter." in name or "layernorm" in name),
    "and new tokens": (
        {},
        {"trainable": ["embeddings", "head"]},
        lambda name: ".adapter." in name or name.startswith(("embedding.", "output_layer")),
    ),
    "some adapters": (
        {},
        {"frozen": ["decoder.layers.[01].*", "*.k_proj.*"]},
        lambda name: (
            ".adapter." in name and ".layers.0." not in name and ".layers.1." not in name and "k_proj" not in name
        ),
    ),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_what_is_trained(context: ParallelContext, case: str) -> None:
    shape, training, expected = PATTERNS[case]
    config = lora_config(**shape)
    config.embedding.projection_dim = 8
    for key, value in training.items():
        setattr(config.training, key, value)
    model = build_model(config, VOCAB, context)
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if expected(name) or name.startswith("embedding_head.")}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert count_trainable([model]) == (sum(sizes[name] for name in trained(model)), sum(sizes.values()))


def test_freezing_without_adapters(context: ParallelContext) -> None:
    config = tiny_config(experts=2)
    config.training.frozen = ["embeddings", "decoder.layers.3.mlp.experts.*.linear_fc1.*"]
    model = build_model(config, VOCAB, context)
    names = {name for name, _ in model.named_parameters()}
    assert names - trained(model) == {
        "embedding.word_embeddings.weight",
        "decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight",
    }
    config.training.frozen = ["decoder.layers.3.mlp.experts.local_experts.1.*"]
    with pytest.raises(ConfigError, match=r"some experts of decoder.layers.3.mlp.experts.local_experts.\*.linear_fc1"):
        build_model(config, VOCAB, context)


def test_a_pattern_that_matches_nothing_is_refused(context: ParallelContext) -> None:
    config = tiny_config()
    config.training.frozen = ["decoder.layers.9.*"]
    with pytest.raises(ConfigError, match=r"training.frozen: 'decoder.layers.9.\*' matches no parameter"):
        build_model(config, VOCAB, context)
    config.training.frozen = ["*"]
    with pytest.raises(ConfigError, match="leave no parameter to train"):
        build_model(config, VOCAB, context)


def test_global_names(context: ParallelContext) -> None:
    model = build_model(tiny_config(experts=2, tie_embeddings=True), VOCAB, context)
    model.decoder.layers[1].layer_number = 8
    assert global_name(model, "decoder.layers.1.mlp.router.weight") == "decoder.layers.7.mlp.router.weight"
    assert global_name(model, "output_layer.weight") == "embedding.word_embeddings.weight"
    experts = model.decoder.layers[1].mlp.experts
    experts.ep_group = type("Group", (), {"rank": lambda self: 3})()
    name = "mlp.experts.local_experts.1.linear_fc1"
    assert global_name(model, f"decoder.layers.1.{name}") == f"decoder.layers.7.{name.replace('.1.', '.7.')}"
