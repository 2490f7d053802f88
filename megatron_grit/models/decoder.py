"""The decoder: megatron-core's GPTModel over packed rows, with an embedding output beside the language-model head.

Shape suffix legend: T = tokens of a row, S = segments, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import padded_vocabulary
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.adapters import has_trained, insert_adapters, reach_back, select_trainable
from megatron_grit.models.attention import AttentionMode, KeyValueCache, PackedSegments
from megatron_grit.models.biases import add_output_bias, drop_biases
from megatron_grit.models.embedding_head import apply_head, build_head
from megatron_grit.models.layer_specs import block_spec, transformer_config
from megatron_grit.models.pooling import PositionWeights, normalize, pool
from megatron_grit.models.rope import stretched_frequencies
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.context import ParallelContext


class Output(StrEnum):
    """What the last pipeline stage returns."""

    EMBEDDINGS = "embeddings"
    """fp32 [S, D or embedding.projection_dim], one for each segment of an embedding row."""
    TOKEN_LOSSES = "token_losses"
    """fp32 [T]: negative log-likelihood of each label, 0 where the loss mask is 0 and where another context parallel
    rank holds the token."""
    LOGITS = "logits"
    """[T, V], gathered over tensor parallel ranks, padding of the vocabulary cut off. Under context parallelism the
    tokens that this rank holds."""
    HIDDEN = "hidden"
    """[T, 1, D] after the final norm; of this rank's tokens."""


class GritDecoder(compat.gpt_model_class()):  # type: ignore[misc]
    """One pipeline stage, or one chunk of an interleaved one, of a decoder that generates and embeds.

    State-dict names are those of the engine's GPTModel, plus ``embedding_head`` (see
    :func:`~megatron_grit.models.embedding_head.build_head`) and ``embedding_pooling`` where they are configured.
    """

    def __init__(
        self,
        config: RunConfig,
        engine_config: TransformerConfig,
        vocab_size: int,
        context: ParallelContext,
        virtual_stage: int | None = None,
    ) -> None:
        model = config.model
        last_virtual_stage = None if context.virtual_size is None else context.virtual_size - 1
        super().__init__(
            config=engine_config,
            transformer_layer_spec=block_spec(config, engine_config, context.device, virtual_stage),
            vocab_size=padded_vocabulary(vocab_size, model.vocab_multiple, context.tensor_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=context.is_first_stage and not virtual_stage,
            post_process=context.is_last_stage and virtual_stage == last_virtual_stage,
            position_embedding_type=model.position_embedding,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            share_embeddings_and_output_weights=model.tie_embeddings,
            vp_stage=virtual_stage,
        )
        drop_biases(self.decoder, model)
        if model.add_output_bias and self.post_process:
            add_output_bias(self.output_layer, self.output_layer.output_size_per_partition, engine_config.params_dtype)
        if model.position_embedding == "rope":
            self.rotary_pos_emb.inv_freq = stretched_frequencies(model, self.rotary_pos_emb.inv_freq)
        self.num_tokens_in_vocab = vocab_size
        self.embedding_config = config.embedding
        self.context = context
        self.layers_differ = False
        """Layers are not all trained alike."""
        self.embedding_head: torch.nn.Module | None = None
        self.embedding_pooling: PositionWeights | None = None
        if self.post_process:
            dtype, device = engine_config.params_dtype, context.device
            head = build_head(config, dtype, context)
            self.embedding_head = None if head is None else head.to(device)
            if config.embedding.pooling == "learnedmean":
                self.embedding_pooling = PositionWeights(model.max_position_embeddings, dtype, device)

    def forward(self, row: PackedRow, output: Output, cache: KeyValueCache | None = None) -> Tensor:
        """One row through this stage.

        Args:
            row: the micro-batch, whole, on this process's device; every stage and context parallel rank gets the same
                one.
            output: what the last stage returns; other stages return their hidden states.
            cache: keys and values of earlier tokens, for generation.

        Returns:
            See :class:`Output`.
        """
        mode = attention_mode(row.embeds, self.embedding_config.causal)
        share = RowShare.of_row(row, self.context)
        segments = PackedSegments.of_row(row.cu_seqlens, row.max_seqlen, mode, share, row.segment_lengths)
        segments.cache = cache
        held = row if share is None else share.take(row)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=held.tokens_1T, position_ids=held.positions_1T)
            if self.config.recompute_granularity == "full" and has_trained(self.decoder):
                hidden = reach_back(hidden)  # a recomputed layer has a gradient if its input has one
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary_of(held),
            packed_seq_params=segments,
            padding_mask=self._router_padding(held),
        )
        if not self.post_process or output is Output.HIDDEN:
            return hidden
        if output is Output.EMBEDDINGS:
            return self._embed(hidden, row, share)
        if output is Output.TOKEN_LOSSES:
            losses = self._token_losses(hidden, held)
            for module in (self.embedding_head, self.embedding_pooling):
                if module is not None:
                    # A gradient of zero: gradients are reduced when the last row has reached every parameter.
                    losses = losses + 0.0 * sum(parameter.sum() for parameter in module.parameters())
            return losses if share is None else losses.new_zeros(share.row_length).index_put((share.index_L,), losses)
        return self._logits(hidden)

    def _rotary_of(self, row: PackedRow) -> Tensor | None:
        """Angles of each token's own position, [T, 1, 1, H]; positions restart in each segment."""
        if self.position_embedding_type != "rope":
            return None
        # The engine keeps a table for each of the last 32 lengths that it was asked for, and rows differ in theirs.
        table = self.rotary_pos_emb(1 << (row.max_seqlen - 1).bit_length(), packed_seq=True)
        return table[row.positions_1T[0]]

    def _router_padding(self, row: PackedRow) -> Tensor | None:
        """Padding that the router's balancing loss leaves out; this rank's share under sequence parallelism."""
        if self.config.num_moe_experts is None:
            return None
        mask = row.padding_mask_1T
        if self.config.sequence_parallel:
            mask = mask.chunk(self.context.tensor_size, dim=1)[self.context.tensor_rank]
        return mask

    def _embed(self, hidden: Tensor, row: PackedRow, share: RowShare | None) -> Tensor:
        assert row.pool_mask_T is not None and row.segment_ids_T is not None and row.slots_S is not None
        if self.config.sequence_parallel:
            # Every tensor parallel rank pools the whole row, so a gathered gradient is split, not summed.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        states_LD, segment_ids_T, num_segments = hidden.squeeze(1), row.segment_ids_T, len(row.slots_S)
        head, is_query_S = self.embedding_head, row.is_query_S
        after = self.embedding_config.linear_place == "after_pooling"
        if head is not None and not after:
            segment_ids_L = segment_ids_T if share is None else segment_ids_T[share.index_L]
            # Padding's segment comes after all others.
            is_query_L = None if is_query_S is None else torch.nn.functional.pad(is_query_S, (0, 1))[segment_ids_L]
            states_LD = apply_head(head, states_LD, is_query_L)
        weights = None if self.embedding_pooling is None else self.embedding_pooling.weight
        method = self.embedding_config.pooling
        pooled = pool(states_LD, row.pool_mask_T, segment_ids_T, num_segments, method, share, weights)
        if head is not None and after:
            pooled = apply_head(head, pooled, is_query_S)
        return normalize(pooled) if self.embedding_config.normalize else pooled

    def _token_losses(self, hidden: Tensor, row: PackedRow) -> Tensor:
        assert row.labels_1T is not None and row.loss_mask_1T is not None
        if self.config.sequence_parallel:
            logits = self._shard_logits(hidden)
            token_losses = self.compute_language_model_loss(row.labels_1T, logits)[0]
            return token_losses.float() * row.loss_mask_1T[0]
        # Logits are computed where a label is supervised and nowhere else.
        supervised = row.label_index_L
        if supervised is None:  # a GPU's mask is waited for here
            supervised = row.loss_mask_1T[0].nonzero().squeeze(1)
        losses = row.loss_mask_1T.new_zeros(row.tokens_1T.shape[1])
        logits = self._shard_logits(hidden[supervised])
        token_losses = self.compute_language_model_loss(row.labels_1T[:, supervised], logits)[0]
        return losses.index_put((supervised,), token_losses.float())

    def _shard_logits(self, hidden: Tensor) -> Tensor:
        """[L, 1, V / tensor parallel size]; rows that only pad the vocabulary get no probability."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        shard = logits.shape[-1]
        num_real = self.num_tokens_in_vocab - self.context.tensor_rank * shard
        if num_real < shard:
            padding = torch.arange(shard, device=logits.device) >= num_real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(self._shard_logits(hidden))
        return logits.squeeze(1)[:, : self.num_tokens_in_vocab]


def attention_mode(embeds: bool, embed_causally: bool) -> AttentionMode:
    """The mode of a row: causal for prediction, bidirectional for embeddings unless asked otherwise."""
    return AttentionMode.BIDIRECTIONAL if embeds and not embed_causally else AttentionMode.CAUSAL


def build_model(config: RunConfig, vocab_size: int, context: ParallelContext) -> GritDecoder:
    """This process's pipeline stage, on its device, with fresh weights from ``training.seed``.

    An interleaved pipeline has several models a process: :func:`build_chunks`.
    """
    (model,) = build_chunks(config, vocab_size, context)
    return model


def build_chunks(config: RunConfig, vocab_size: int, context: ParallelContext) -> list[GritDecoder]:
    """The chunks of layers that this process holds, first layers first; one without an interleaved pipeline."""
    engine_config = transformer_config(config)
    stages = [None] if context.virtual_size is None else range(context.virtual_size)
    chunks = [GritDecoder(config, engine_config, vocab_size, context, stage) for stage in stages]
    if config.adapter.kind != "none":
        for chunk in chunks:
            insert_adapters(chunk, config)
    select_trainable(chunks, config)
    expert_tensor = config.parallel.expert_tensor or context.tensor_size
    if expert_tensor != context.tensor_size:
        for chunk in chunks:
            _reduce_experts_apart(chunk)
    return [chunk.to(context.device) for chunk in chunks]


def _reduce_experts_apart(model: GritDecoder) -> None:
    """Have gradients of experts reduced over the ranks that hold the same ones.

    megatron-core 0.16 does so for an expert parallel size above 1 only (layers.py:886). With experts that are split
    over more tensor parallel ranks than the rest, it would add up gradients of different parts of them; over fewer, it
    would leave out those of other ranks' tokens.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
