"""Linear layers on top of the decoder: shapes, places, activations, sides, and what an embedding is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.embedding_shape import head_widths, num_head_parameters
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.models.embedding_head import apply_head, build_head
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.planning.parameters import count_parameters
from megatron_grit.training.checkpoint import load_weights, save_weights
from tests.rows import VOCAB, make_row, tiny_config

LENGTHS = [5, 9]


def config_of(**embedding: Any) -> RunConfig:
    config = tiny_config(num_layers=2)
    for name, value in embedding.items():
        setattr(config.embedding, name, value)
    return config


def row_of_both() -> PackedRow:
    """A query, a passage, and padding."""
    row = make_row(RowKind.EMBEDDING, LENGTHS, 16)
    row.is_query_S = torch.tensor([True, False])
    return row


def randomize(model: GritDecoder) -> None:
    """Weights of the head that no test could mistake for others: biases are no zeros, the two sides differ."""
    generator = torch.Generator().manual_seed(5)
    for module in (model.embedding_head, model.embedding_pooling):
        for parameter in [] if module is None else module.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)


@pytest.mark.parametrize(
    ("embedding", "widths"),
    [
        ({}, []),
        ({"projection_dim": 12}, [12]),
        ({"num_linear_layers": 1}, [64]),
        ({"num_linear_layers": 3}, [64, 64, 64]),
        ({"num_linear_layers": 2, "projection_dim": 12}, [64, 12]),
    ],
)
def test_widths(embedding: dict[str, Any], widths: list[int], context: ParallelContext) -> None:
    config = config_of(**embedding)
    assert head_widths(config) == widths
    model = build_model(config, VOCAB, context)
    assert model(row_of_both(), Output.EMBEDDINGS).shape == (2, widths[-1] if widths else 64)
    assert (model.embedding_head is None) == (not widths)


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh"])
@pytest.mark.parametrize("place", ["before_pooling", "after_pooling"])
@pytest.mark.parametrize("asymmetric", ["none", "heads"])
def test_an_embedding_is_what_the_layers_make_of_the_states(
    activation: str, place: str, asymmetric: str, context: ParallelContext
) -> None:
    config = config_of(
        num_linear_layers=2,
        projection_dim=12,
        linear_activation=activation,
        linear_place=place,
        asymmetric=asymmetric,
        pooling="weightedmean",
        normalize=False,
    )
    model, row = build_model(config, VOCAB, context).eval(), row_of_both()
    randomize(model)
    assert model.embedding_head is not None
    weights = dict(model.embedding_head.named_parameters())
    function = {"none": lambda values: values, "gelu": F.gelu, "tanh": torch.tanh}[activation]

    def layers(values: Tensor, side: str) -> Tensor:
        prefix = f"{side}." if asymmetric == "heads" else ""
        for number in range(2):
            values = function(values @ weights[f"{prefix}{number}.weight"].T + weights[f"{prefix}{number}.bias"])
        return values

    hidden, expected, begin = model(row, Output.HIDDEN)[:, 0], [], 0
    for side, length in zip(("query", "passage"), LENGTHS, strict=True):
        states = hidden[begin : begin + length]
        ranks = torch.arange(1.0, length + 1)[:, None]
        states = layers(states, side) if place == "before_pooling" else states
        pooled = (states * ranks).sum(0) / ranks.sum()
        expected.append(layers(pooled, side) if place == "after_pooling" else pooled)
        begin += length
    torch.testing.assert_close(model(row, Output.EMBEDDINGS), torch.stack(expected))


def test_sides_start_out_equal_and_are_trained_apart(context: ParallelContext) -> None:
    config = config_of(projection_dim=12, asymmetric="heads")
    model, row = build_model(config, VOCAB, context), row_of_both()
    head = model.embedding_head
    assert head is not None
    query, passage = head.query, head.passage
    assert torch.equal(query.weight, passage.weight) and query.weight is not passage.weight
    model(row, Output.EMBEDDINGS)[0].sum().backward()
    assert query.weight.grad.abs().max() > 0
    assert passage.weight.grad.abs().max() == 0, "a query trains the layers of passages"


def test_a_row_that_does_not_tell_the_sides_is_refused(context: ParallelContext) -> None:
    model = build_model(config_of(projection_dim=12, asymmetric="heads"), VOCAB, context)
    with pytest.raises(ValueError, match="which of its segments are queries"):
        model(make_row(RowKind.EMBEDDING, LENGTHS, 16), Output.EMBEDDINGS)


@pytest.mark.parametrize("asymmetric", ["none", "heads"])
def test_generative_rows_give_the_head_a_gradient_of_zero(asymmetric: str, context: ParallelContext) -> None:
    """Gradients are reduced when the last row of a step has reached every parameter."""
    config = config_of(num_linear_layers=2, pooling="learnedmean", asymmetric=asymmetric)
    model = build_model(config, VOCAB, context)
    model(make_row(RowKind.GENERATIVE, [10], 10), Output.TOKEN_LOSSES).sum().backward()
    assert model.embedding_head is not None and model.embedding_pooling is not None
    parameters = [*model.embedding_head.parameters(), *model.embedding_pooling.parameters()]
    assert len(parameters) == (9 if asymmetric == "heads" else 5)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("place", ["before_pooling", "after_pooling"])
def test_bf16(place: str, context: ParallelContext) -> None:
    """After pooling the layers work in fp32 on fp32 vectors; before it in the states' precision."""
    config = config_of(num_linear_layers=2, linear_place=place, linear_activation="gelu", normalize=False)
    config.training.precision = "bf16"
    model = build_model(config, VOCAB, context)
    randomize(model)
    assert model.embedding_head is not None
    assert {parameter.dtype for parameter in model.embedding_head.parameters()} == {torch.bfloat16}
    embeddings = model(row_of_both(), Output.EMBEDDINGS)
    assert embeddings.dtype is torch.float32
    rounded = torch.equal(embeddings, embeddings.bfloat16().float())
    assert not rounded


def test_no_bias(context: ParallelContext) -> None:
    head = build_head(config_of(num_linear_layers=2, linear_bias=False), torch.float32, context)
    assert head is not None
    assert [name for name, _ in head.named_parameters()] == ["0.weight", "1.weight"]
    zeros = torch.zeros(3, 64)
    assert torch.equal(apply_head(head, zeros, None), zeros)


def test_one_layer_keeps_the_names_of_a_projection(context: ParallelContext) -> None:
    model = build_model(config_of(projection_dim=12), VOCAB, context)
    names = [name for name in model.state_dict() if name.startswith("embedding_")]
    assert names == ["embedding_head.weight", "embedding_head.bias"]


@pytest.mark.parametrize(
    "embedding",
    [
        {},
        {"projection_dim": 12},
        {"num_linear_layers": 3, "projection_dim": 12, "linear_bias": False},
        {"num_linear_layers": 2, "asymmetric": "heads", "pooling": "learnedmean"},
    ],
)
def test_parameters_are_counted(embedding: dict[str, Any], context: ParallelContext) -> None:
    config = config_of(**embedding)
    model = build_model(config, VOCAB, context)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config, VOCAB).rank == held
    named = [parameter.numel() for name, parameter in model.named_parameters() if name.startswith("embedding_")]
    assert num_head_parameters(config) == sum(named)


def test_a_checkpoint_brings_back_every_tensor(context: ParallelContext, tmp_path: Path) -> None:
    config = config_of(num_linear_layers=2, asymmetric="heads", pooling="learnedmean", linear_place="after_pooling")
    model, row = build_model(config, VOCAB, context).eval(), row_of_both()
    randomize(model)
    save_weights(model, context, tmp_path / "checkpoint")
    other = build_model(config, VOCAB, context).eval()
    assert not torch.equal(other(row, Output.EMBEDDINGS), model(row, Output.EMBEDDINGS))
    load_weights(tmp_path / "checkpoint", other, context)
    assert torch.equal(other(row, Output.EMBEDDINGS), model(row, Output.EMBEDDINGS))


@pytest.mark.parametrize(
    ("embedding", "key"),
    [
        ({"num_linear_layers": 0, "projection_dim": 12}, "num_linear_layers"),
        ({"linear_place": "after_pooling"}, "linear_place"),
        ({"linear_activation": "gelu"}, "linear_activation"),
        ({"linear_bias": False}, "linear_bias"),
        ({"asymmetric": "heads"}, "asymmetric"),
        ({"num_linear_layers": -1}, "num_linear_layers"),
    ],
)
def test_options_without_effect_are_refused(embedding: dict[str, Any], key: str) -> None:
    config = config_of(**embedding)
    config.data.tokenizer, config.data.embedding, config.data.generative = "t", ["e"], ["g"]
    assert f"embedding.{key}" in [problem.key for problem in find_problems(config, 1, files=False)]


def test_options_that_go_together_are_accepted() -> None:
    config = config_of(num_linear_layers=1, linear_place="after_pooling", linear_bias=False, asymmetric="heads")
    config.data.tokenizer, config.data.embedding, config.data.generative = "t", ["e"], ["g"]
    assert list(find_problems(config, 1, files=False)) == []
