"""From token states to embeddings: pooling, with linear layers before or after it, shared or one set for each side.

Every rank of the last stage holds all linear layers. Before pooling, each context parallel rank applies them to its own
tokens, and the gradient of a step is the sum over ranks. After pooling, each of those ranks has the same pooled vectors
and the whole gradient, of which it contributes its share.

Shape suffix legend: N = token states or pooled vectors, L = tokens that this rank holds, S = segments, D = width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.config.embedding_shape import head_widths
from megatron_grit.config.schema import EmbeddingConfig, RunConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.pooling import normalize, pool
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.context import ParallelContext

_ACTIVATIONS = {"none": torch.nn.Identity, "gelu": torch.nn.GELU, "tanh": torch.nn.Tanh}


class DenseLayer(torch.nn.Linear):
    """A linear layer and its activation, as sentence-transformers' Dense.

    Args:
        gradient_share: the gradient of weight and bias is multiplied by this.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, activation: str, gradient_share: float, dtype: torch.dtype
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=dtype)
        self.activation = _ACTIVATIONS[activation]()
        self.gradient_share = gradient_share

    def forward(self, values: Tensor) -> Tensor:
        """[N, inputs] to [N, outputs], in the precision of ``values``: pooled vectors are fp32."""
        weight, bias = (self._shared(parameter) for parameter in (self.weight, self.bias))
        assert weight is not None
        return self.activation(F.linear(values, weight.to(values), None if bias is None else bias.to(values)))

    def _shared(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or self.gradient_share == 1.0:
            return parameter
        scaled = _ScaleGradient.apply(parameter, self.gradient_share)
        assert isinstance(scaled, Tensor)
        return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def build_head(config: RunConfig, dtype: torch.dtype, context: ParallelContext) -> torch.nn.Module | None:
    """The linear layers of a configuration with fresh weights; None where it has none.

    One layer is a module of its own, so that its tensors are called ``embedding_head.weight`` and ``.bias``; several
    are ``embedding_head.0.weight`` and so on; those of two sides stand under ``query.`` and ``passage.`` there.
    """
    embedding, widths = config.embedding, head_widths(config)
    if not widths:
        return None
    after = embedding.linear_place == "after_pooling"
    layers = []
    for inputs, outputs in zip([config.model.hidden_size, *widths], widths, strict=False):
        layer = DenseLayer(
            inputs,
            outputs,
            bias=embedding.linear_bias,
            activation=embedding.linear_activation,
            gradient_share=1 / context.context_size if after else 1.0,
            dtype=dtype,
        )
        torch.nn.init.normal_(layer.weight, std=config.model.init_std)
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)
        layers.append(layer)
    head = layers[0] if len(layers) == 1 else torch.nn.Sequential(*layers)
    if embedding.asymmetric == "heads":
        return torch.nn.ModuleDict({"query": head, "passage": copy.deepcopy(head)})
    return head


def apply_head(head: torch.nn.Module, values_ND: Tensor, is_query_N: Tensor | None) -> Tensor:
    """Token states or pooled vectors through the layers of their side.

    Args:
        head: from :func:`build_head`.
        values_ND: any floating type.
        is_query_N: bool, whether each belongs to a query. Only looked at where the sides differ.

    Returns:
        [N, embedding width], of the type of ``values_ND``.

    Raises:
        ValueError: the sides differ and it is not known which is which.
    """
    if not isinstance(head, torch.nn.ModuleDict):
        return head(values_ND)
    if is_query_N is None:
        raise ValueError("embedding.asymmetric heads: this row does not say which of its segments are queries")
    # Both for all: a choice by index would make a GPU's host wait, and no weight is left without a gradient.
    return torch.where(is_query_N[:, None], head["query"](values_ND), head["passage"](values_ND))


def embed_segments(
    states_LD: Tensor,
    row: PackedRow,
    share: RowShare | None,
    head: torch.nn.Module | None,
    position_weights: Tensor | None,
    options: EmbeddingConfig,
) -> Tensor:
    """The embedding of each segment of a row.

    Args:
        states_LD: final states of the tokens that this rank holds.
        row: the whole row.
        share: which of its tokens this rank holds. None: all.
        head: from :func:`build_head`.
        position_weights: of learnedmean, as for :func:`~megatron_grit.models.pooling.pool`.
        options: how to pool, and where the linear layers are.

    Returns:
        fp32 [S, embedding width].
    """
    assert row.pool_mask_T is not None and row.segment_ids_T is not None and row.slots_S is not None
    segment_ids_T, num_segments, is_query_S = row.segment_ids_T, len(row.slots_S), row.is_query_S
    after = options.linear_place == "after_pooling"
    if head is not None and not after:
        segment_ids_L = segment_ids_T if share is None else segment_ids_T[share.index_L]
        # Padding's segment comes after all others.
        is_query_L = None if is_query_S is None else F.pad(is_query_S, (0, 1))[segment_ids_L]
        states_LD = apply_head(head, states_LD, is_query_L)
    pooled = pool(states_LD, row.pool_mask_T, segment_ids_T, num_segments, options.pooling, share, position_weights)
    if head is not None and after:
        pooled = apply_head(head, pooled, is_query_S)
    return normalize(pooled) if options.normalize else pooled
