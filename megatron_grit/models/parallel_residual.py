"""Layers with attention and feed-forward layer side by side, as in GPT-J and GPT-NeoX. The engine has none."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + feed_forward(norm(x)), with two norms or, where the second is the identity, with one.

    Weights have the names of the engine's layer.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """A layer over a row.

        Args:
            hidden_states: [T, 1, D].
            options: of the engine's layer; all but rotary_pos_emb, packed_seq_params and context are ignored.

        Returns:
            (states after the layer, the unchanged cross-attention context).
        """
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(
            normed,
            attention_mask=None,
            rotary_pos_emb=options.get("rotary_pos_emb"),
            packed_seq_params=options.get("packed_seq_params"),
        )
        has_one_norm = isinstance(self.pre_mlp_layernorm, IdentityOp)
        feed_forward = self.mlp(normed if has_one_norm else self.pre_mlp_layernorm(hidden_states))
        fused = self.config.bias_dropout_fusion
        with self.bias_dropout_add_exec_handler():
            states = self.self_attn_bda(self.training, fused)(attention, hidden_states, self.hidden_dropout)
            states = self.mlp_bda(self.training, fused)(feed_forward, states, self.hidden_dropout)
        return states, options.get("context")
