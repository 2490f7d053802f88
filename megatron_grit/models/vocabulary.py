"""Token embedding and output layer of a decoder, with logits and token losses.

The rows of both weights, one for each token, are sharded over tensor parallel ranks and padded to equal shards.

Shape suffix legend: T = tokens of a row, L = some of them, D = width, V = vocabulary.
"""

from __future__ import annotations

import math
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
    """The embedding of tokens, and of positions where they are learned; arguments as for :class:`OutputLayer`."""
    return LanguageModelEmbedding(
        config=engine_config,
        vocab_size=num_rows,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type=model.position_embedding,
        tp_group=group,
    )


def embedding_noise(row: PackedRow, alpha: float, width: int) -> Tensor:
    """Noise of NEFTune (arXiv 2310.05914) on the embeddings of a row, fp32 [T, 1, D]: of each segment a function of its
    key in ``row.noise_keys``, on devices of one kind.

    Uniform within alpha / root(tokens x width) of each segment, without padding, as published; its code takes the
    length that a batch is padded to. Padding gets none.

    Args:
        row: on its device, with keys.
        alpha: see ``training.neftune_alpha``.
        width: D.
    """
    assert row.noise_keys is not None and row.segment_lengths is not None
    device = row.tokens_1T.device
    noise_T1D = torch.zeros(row.tokens_1T.shape[1], 1, width, device=device)
    generator, begin = torch.Generator(device), 0
    for key, length in zip(row.noise_keys, row.segment_lengths, strict=False):  # padding comes last
        bound = alpha / math.sqrt(length * width)
        noise_T1D[begin : begin + length].uniform_(-bound, bound, generator=generator.manual_seed(key))
        begin += length
    return noise_T1D


class OutputLayer(TrainedBiasLinear):
    """Logits and losses of tokens.

    Every method takes the weight to use: that of the token embedding if they are tied; None for the layer's own.

    Args:
        model: the decoder's shape.
        engine_config: the engine's configuration of it.
        vocab_size: number of tokens.
        num_rows: number of tokens, padding included.
        has_weight: whether to allocate a weight. Not needed if it is tied to an embedding in the same process.
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
        """This rank's logits, [L, 1, padded V / tensor parallel size]. Padding rows get no probability."""
        logits, _ = self(states_L1D, weight=weight)
        if self.num_padding:
            shard = logits.shape[-1]
            padding = torch.arange(shard, device=logits.device) >= shard - self.num_padding
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits

    def logits(self, states_L1D: Tensor, weight: Tensor | None) -> Tensor:
        """Logits gathered over tensor parallel ranks, [L, padded V]."""
        gathered: Tensor = gather_from_tensor_model_parallel_region(self.shard_logits(states_L1D, weight))
        return gathered.squeeze(1)

    def token_losses(self, states_T1D: Tensor, weight: Tensor | None, row: PackedRow) -> Tensor:
        """Negative log-likelihood of each label, fp32 [T]; 0 where the loss mask is 0. Where the row has a teacher,
        fp32 [2, T]: the second line is the divergence from it.

        Args:
            states_T1D: final states of the row; under sequence parallelism this rank's shard of them.
            weight: see the class.
            row: the tokens of the row that this context parallel rank holds.
        """
        assert row.labels_1T is not None and row.loss_mask_1T is not None
        if self.config.sequence_parallel:
            logits = self.shard_logits(states_T1D, weight)
            return _losses(logits, row.labels_1T[0], row, None) * (row.loss_mask_1T[0] > 0)
        # Logits are computed for supervised tokens only.
        supervised = row.label_index_L
        if supervised is None:  # makes the host wait for a GPU
            supervised = row.loss_mask_1T[0].nonzero().squeeze(1)
        logits = self.shard_logits(states_T1D[supervised], weight)
        found = _losses(logits, row.labels_1T[0, supervised], row, supervised)
        return spread(found, supervised, row.tokens_1T.shape[1])

    def sharded_state_dict(self, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
        """The engine's, without ``_extra_state``: checkpoints have no such entry for an output layer."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *args, **options)
        state.pop(f"{prefix}_extra_state", None)
        return state


def spread(values_L: Tensor, index_L: Tensor, length: int) -> Tensor:
    """Values of some tokens at their places among all, [..., T] of [..., L]; 0 elsewhere."""
    return values_L.new_zeros(*values_L.shape[:-1], length).index_copy(-1, index_L, values_L)


def _losses(logits_L1V: Tensor, labels_L: Tensor, row: PackedRow, index_L: Tensor | None) -> Tensor:
    """Of the tokens at these places: [L], or with a teacher [2, L]."""
    # The engine turns logits in fp32 into probabilities where they are.
    is_used_up = row.teacher is not None and logits_L1V.dtype is torch.float32
    losses: Tensor = vocab_parallel_cross_entropy(logits_L1V.clone() if is_used_up else logits_L1V, labels_L[:, None])
    losses = losses.squeeze(1).float()
    if row.teacher is None:
        return losses
    return torch.stack((losses, row.teacher.divergence(logits_L1V.squeeze(1), losses, index_L)))
