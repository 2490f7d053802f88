"""Attention of one sequence to another in groups, on the engine's parallel linear layers.

Shape suffix legend: A, B = tokens of the sequence that asks and of the one that is asked, D = width, G = groups,
Q, K = queries and keys of a group, N = query heads, J = key-value heads, H = channels of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_grit.models.attention import attend
from megatron_grit.models.biases import TrainedBiasLinear
from megatron_grit.models.retro.passes import NeighborCache, PassPlan
from megatron_grit.models.retro.plan import Groups


class GroupedCrossAttention(MegatronModule):
    """softmax(q k^T / sqrt(H)) v within each group, with grouped-query attention.

    Under sequence parallelism both sequences come in shards, and so does the result. The engine's own CrossAttention
    has no grouped-query attention and takes no mask by groups; weights have its names.

    Args:
        config: the engine's configuration.
        dropout: of attention probabilities.
        gate: factor of the output; None: learned, 0 at the start; it goes through tanh.
    """

    def __init__(self, config: TransformerConfig, dropout: float, gate: float | None) -> None:
        super().__init__(config=config)
        heads, groups, channels = config.num_attention_heads, config.num_query_groups, config.kv_channels
        assert groups is not None and channels is not None
        self.heads, self.groups = (number // config.tensor_model_parallel_size for number in (heads, groups))
        self.channels = channels
        self.dropout = dropout
        self.linear_q = self._column(heads * channels)
        self.linear_kv = self._column(2 * groups * channels)
        self.linear_proj = RowParallelLinear(
            heads * channels,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self.fixed_gate = gate
        if gate is None:
            self.gate = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
            self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def _column(self, width: int) -> TrainedBiasLinear:
        config = self.config
        return TrainedBiasLinear(
            config.hidden_size,
            width,
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear or config.add_qkv_bias,
            gather_output=False,
        )

    def forward(self, asking_A1D: Tensor, asked_B1D: Tensor, groups: Groups) -> Tensor:
        """What each token reads, gated: [A, 1, D]; exactly 0 where it is in no group.

        Args:
            asking_A1D: states that the queries come from.
            asked_B1D: states that the keys and values come from; of this rank's tokens where keys are gathered.
            groups: over the whole sequences.
        """
        query_ANH = self.linear_q(asking_A1D)[0].view(-1, self.heads, self.channels)
        key_value = self.linear_kv(asked_B1D)[0]
        if groups.key_group is not None:
            key_value = gather_from_sequence_parallel_region(key_value, group=groups.key_group)
        key_value = key_value.view(-1, self.groups, 2 * self.channels)[groups.key_index_GK]
        query_GNQH = query_ANH[groups.query_index_GQ].transpose(1, 2)
        key_GJKH, value_GJKH = key_value.transpose(1, 2).chunk(2, -1)
        output_GNQH = F.scaled_dot_product_attention(
            query_GNQH,
            key_GJKH,
            value_GJKH,
            attn_mask=groups.key_mask_GK[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.config.softmax_scale,
            enable_gqa=self.heads != self.groups,
        )
        flat = output_GNQH.transpose(1, 2).reshape(-1, self.heads * self.channels)
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        return self._project(flat[groups.place_of_query], groups.has_query)

    def read_pass(
        self, asking_A1D: Tensor, asked_B1D: Tensor | None, plan: PassPlan, cache: NeighborCache, layer_number: int
    ) -> Tensor:
        """As :meth:`forward`, in a pass of generation; what each segment read last is kept for its next tokens.

        Args:
            asking_A1D: states of the new tokens.
            asked_B1D: states of new neighbors. None: there are none.
            plan: of the pass.
            cache: what is kept.
            layer_number: of the layer.
        """
        query_ANH = self.linear_q(asking_A1D)[0].view(-1, self.heads, self.channels)
        asked = None if asked_B1D is None else self.linear_kv(asked_B1D)[0].view(-1, self.groups, 2 * self.channels)
        parts, reading = [], np.full(len(query_ANH), False)
        at = 0
        for read in plan.reads:
            if read.texts is not None:
                found = None if asked is None or not len(read.texts) else asked[read.texts.start : read.texts.stop]
                cache.keep_neighbors(layer_number, read.segment, found)
            kept = cache.kept_neighbors(layer_number, read.segment)
            if kept is None or not len(read.tokens):
                continue
            if at < read.tokens.start:
                parts.append(query_ANH.new_zeros(read.tokens.start - at, *query_ANH.shape[1:]))
            at, reading[read.tokens.start : read.tokens.stop] = read.tokens.stop, True
            query = query_ANH[read.tokens.start : read.tokens.stop]
            key, value = kept.chunk(2, -1)
            parts.append(attend(query, key, value, causal=False, scale=self.config.softmax_scale))
        parts.append(query_ANH.new_zeros(len(query_ANH) - at, *query_ANH.shape[1:]))
        flat = torch.cat(parts).view(-1, self.heads * self.channels)
        return self._project(flat, None if reading.all() else torch.from_numpy(reading))

    def _project(self, flat: Tensor, has_query: Tensor | None) -> Tensor:
        """The gated output of what tokens read, [A, N * H]; no bias where a token reads nothing."""
        output, bias = self.linear_proj(flat[:, None])
        if bias is not None:
            output = output + (bias if has_query is None else bias * self._share(has_query).to(output)[:, None, None])
        return output * (self.fixed_gate if self.fixed_gate is not None else torch.tanh(self.gate))

    def _share(self, values_A: Tensor) -> Tensor:
        """This rank's part of values of the whole sequence."""
        if not self.config.sequence_parallel:
            return values_A
        return values_A.chunk(self.config.tensor_model_parallel_size)[dist.get_rank(self.linear_proj.tp_group)]


def unused(module: torch.nn.Module, like: Tensor) -> Any:
    """A zero whose backward pass reaches every parameter: gradients are reduced when the last row has reached all."""
    if not torch.is_grad_enabled():
        return 0.0
    return sum(
        (parameter.sum() * 0.0 for parameter in module.parameters() if parameter.requires_grad), 0.0 * like.sum()
    )
