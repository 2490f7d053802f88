"""Where tokens enter and leave a decoder: their embedding, and the output layer with its logits and losses.

Rows of both are sharded over tensor parallel ranks, and padded so that these have equally many.

Shape suffix legend: T = tokens of a row, L = some of them, D = width, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.biases import TrainedBiasLinear


def token_embedding(
    model: ModelConfig, engine_config: TransformerConfig, num_rows: int, group: dist.ProcessGroup
) -> LanguageModelEmbedding:
    """The embedding of tokens, and of positions where they are learned.

    Args:
        model: the decoder's shape.
        engine_config: the engine's configuration of it.
        num_rows: of the padded vocabulary.
        group: the tensor parallel ranks.
    """
    return LanguageModelEmbedding(
        config=engine_config,
        vocab_size=num_rows,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type=model.position_embedding,
        tp_group=group,
    )


class OutputLayer(TrainedBiasLinear):
    """Logits of the vocabulary, and the losses of labels.

    Every method takes the weight to use: that of the token embedding where it is tied. None: the layer's own.

    Args:
        model: the decoder's shape.
        engine_config: the engine's configuration of it.
        vocab_size: tokens.
        num_rows: tokens and padding.
        has_weight: whether it has a weight. It has none where it shares that of an embedding in the same process.
        group: the tensor parallel ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine_config: TransformerConfig,
        vocab_size: int,
        num_rows: int,
        has_weight: bool,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(
            engine_config.hidden_size,
            num_rows,
            config=engine_config,
            init_method=engine_config.init_method,
            bias=model.add_output_bias,
            skip_weight_param_allocation=not has_weight,
            tp_group=group,
        )
        self.num_padding = max(0, (dist.get_rank(group) + 1) * self.output_size_per_partition - vocab_size)

    def shard_logits(self, states_L1D: Tensor, weight: Tensor | None) -> Tensor:
        """[L, 1, V / tensor parallel size]; rows that only pad the vocabulary get no probability."""
        logits, _ = self(states_L1D, weight=weight)
        if self.num_padding:
            shard = logits.shape[-1]
            padding = torch.arange(shard, device=logits.device) >= shard - self.num_padding
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits

    def logits(self, states_L1D: Tensor, weight: Tensor | None) -> Tensor:
        """[L, padded V], gathered over tensor parallel ranks."""
        gathered: Tensor = gather_from_tensor_model_parallel_region(self.shard_logits(states_L1D, weight))
        return gathered.squeeze(1)

    def token_losses(self, states_T1D: Tensor, weight: Tensor | None, row: PackedRow) -> Tensor:
        """fp32 [T]: negative log-likelihood of each label, 0 where the loss mask is 0.

        Args:
            states_T1D: of the tokens that this rank holds, or its share of them under sequence parallelism.
            weight: see the class.
            row: what this rank holds of the row.
        """
        assert row.labels_1T is not None and row.loss_mask_1T is not None
        if self.config.sequence_parallel:
            logits = self.shard_logits(states_T1D, weight)
            return _cross_entropy(logits, row.labels_1T[0]) * row.loss_mask_1T[0]
        # Logits are computed where a label is supervised and nowhere else.
        supervised = row.label_index_L
        if supervised is None:  # a GPU's mask is waited for here
            supervised = row.loss_mask_1T[0].nonzero().squeeze(1)
        losses = row.loss_mask_1T.new_zeros(row.tokens_1T.shape[1])
        logits = self.shard_logits(states_T1D[supervised], weight)
        return losses.index_put((supervised,), _cross_entropy(logits, row.labels_1T[0, supervised]))

    def sharded_state_dict(self, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
        """The engine's, without the empty entry that other linear layers have: checkpoints do not hold it."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *args, **options)
        state.pop(f"{prefix}_extra_state", None)
        return state


def _cross_entropy(logits_L1V: Tensor, labels_L: Tensor) -> Tensor:
    losses: Tensor = vocab_parallel_cross_entropy(logits_L1V, labels_L[:, None])
    return losses.squeeze(1).float()
