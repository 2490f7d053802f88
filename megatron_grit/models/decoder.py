"""The decoder: megatron-core's transformer block over packed rows, with a language-model head and an embedding head.

Shape suffix legend: T = tokens of a row, S = segments, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import typing
from enum import StrEnum

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import padded_vocabulary
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.adapters import has_trained, insert_adapters, reach_back, select_trainable
from megatron_grit.models.attention import AttentionMode, KeyValueCache, PackedSegments
from megatron_grit.models.biases import drop_biases
from megatron_grit.models.embedding_head import build_head, embed_segments
from megatron_grit.models.layer_specs import block_spec, transformer_config
from megatron_grit.models.pooling import PositionWeights
from megatron_grit.models.retro.passes import NeighborCache, PassSegments, pass_plan
from megatron_grit.models.retro.plan import RetroSegments, held_neighbors, plan_of
from megatron_grit.models.rope import RotaryAngles
from megatron_grit.models.row_share import RowShare
from megatron_grit.models.vocabulary import OutputLayer, embedding_noise, spread, token_embedding
from megatron_grit.parallel.context import ParallelContext


class Output(StrEnum):
    """What the last pipeline stage returns."""

    EMBEDDINGS = "embeddings"
    """fp32 [S, D or embedding.projection_dim], one for each segment of an embedding row."""
    TOKEN_LOSSES = "token_losses"
    """fp32 [T]: negative log-likelihood of each label, 0 where the loss mask is 0 and where another context parallel
    rank holds the token. [2, T] where the row has a teacher: the second line is what it adds."""
    LOGITS = "logits"
    """[T, V], gathered over tensor parallel ranks, padding of the vocabulary cut off. Under context parallelism the
    tokens that this rank holds."""
    HIDDEN = "hidden"
    """[T, 1, D] after the final norm; of this rank's tokens."""


class GritDecoder(LanguageModule):  # type: ignore[misc]
    """One pipeline stage, or one chunk of an interleaved one, of a decoder that generates and embeds.

    It is put together from parts that know nothing of each other: the embedding of tokens and the output layer
    (:mod:`~megatron_grit.models.vocabulary`), positions (:mod:`~megatron_grit.models.rope`), layers by a specification
    (:mod:`~megatron_grit.models.layer_specs`) and the embedding head (:mod:`~megatron_grit.models.embedding_head`). The
    engine's base class keeps a tied output weight on the last stage equal to the embedding's on the first.

    State-dict names are those of Megatron-LM's GPTModel, plus ``embedding_head`` (see
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
        super().__init__(engine_config)
        model = config.model
        last_virtual_stage = None if context.virtual_size is None else context.virtual_size - 1
        # Read by the engine's schedules and by its base class, under these names.
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = virtual_stage
        self.pre_process = context.is_first_stage and not virtual_stage
        self.post_process = context.is_last_stage and virtual_stage == last_virtual_stage
        self.share_embeddings_and_output_weights = model.tie_embeddings

        num_rows = padded_vocabulary(vocab_size, model.vocab_multiple, context.tensor_size)
        if self.pre_process:
            self.embedding = token_embedding(model, engine_config, num_rows, self.tp_group)
        self.rotary_angles = RotaryAngles(model, context.device) if model.position_embedding == "rope" else None
        self.decoder = TransformerBlock(
            engine_config,
            block_spec(config, engine_config, context.device, virtual_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=virtual_stage,
        )
        drop_biases(self.decoder, model)
        if self.post_process:
            has_weight = not (model.tie_embeddings and self.pre_process)
            self.output_layer = OutputLayer(model, engine_config, vocab_size, num_rows, has_weight, self.tp_group)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        self.num_tokens_in_vocab = vocab_size
        self.embedding_config = config.embedding
        self.retro = model.retro
        self.noise_alpha = config.training.neftune_alpha
        self._received: Tensor | None = None
        self._shards = context.tensor_size if engine_config.sequence_parallel else 1
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

    def set_input_tensor(self, states: Tensor | list[Tensor]) -> None:
        """What :meth:`forward` starts from on a stage that does not embed tokens; called by the engine's schedules."""
        self._received = states[0] if isinstance(states, list) else states
        self.decoder.set_input_tensor(self._received)

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
        segments, neighbors = self._read_neighbors(row, segments, share)
        held = row if share is None else share.take(row)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=held.tokens_1T, position_ids=held.positions_1T)
            if row.noise_keys is not None and self.training:
                hidden = hidden + self._noise(row, share).to(hidden.dtype)
            if self.config.recompute_granularity == "full" and has_trained(self.decoder):
                hidden = reach_back(hidden)  # a recomputed layer has a gradient if its input has one
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=neighbors,
            rotary_pos_emb=None if self.rotary_angles is None else self.rotary_angles(held.positions_1T[0]),
            packed_seq_params=segments,
            padding_mask=self._router_padding(held),
        )
        if not self.post_process or output is Output.HIDDEN:
            return hidden
        if output is Output.EMBEDDINGS:
            if self.config.sequence_parallel:
                # Every tensor parallel rank pools the whole row, so a gathered gradient is split, not summed.
                hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
            weights = None if self.embedding_pooling is None else self.embedding_pooling.weight
            return embed_segments(hidden.squeeze(1), row, share, self.embedding_head, weights, self.embedding_config)
        if output is Output.TOKEN_LOSSES:
            losses = self.output_layer.token_losses(hidden, self._output_weight(), held)
            for module in (self.embedding_head, self.embedding_pooling):
                if module is not None:
                    # A gradient of zero: gradients are reduced when the last row has reached every parameter.
                    losses = losses + 0.0 * sum(parameter.sum() for parameter in module.parameters())
            return losses if share is None else spread(losses, share.index_L, share.row_length)
        return self.output_layer.logits(hidden, self._output_weight())[:, : self.num_tokens_in_vocab]

    def shard_logits(self, states_L1D: Tensor) -> Tensor:
        """Logits of final states for this tensor parallel rank's part of the vocabulary, [L, V / tensor parallel size],
        on the last stage."""
        return self.output_layer.shard_logits(states_L1D, self._output_weight()).squeeze(1)

    def logits_at(self, states_L1D: Tensor, row: PackedRow, positions_P: Tensor) -> Tensor:
        """Logits of some tokens of a row, [P, V], gathered over tensor and context parallel ranks, on the last stage.

        Args:
            states_L1D: of :attr:`Output.HIDDEN`.
            row: that they are of.
            positions_P: int64, in the row, on the host.
        """
        share = RowShare.of_row(row, self.context)
        held, index = None, positions_P.numpy()
        if share is not None:
            held = torch.from_numpy(share.places[index] >= 0).to(states_L1D.device)
            index = share.places[index].clip(0)
        places = torch.from_numpy(index).to(states_L1D.device)
        if self.config.sequence_parallel:  # the layer gathers all tokens
            shard = self.shard_logits(states_L1D)[places]
        else:
            shard = self.shard_logits(states_L1D[places])
        logits: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(shard)[:, : self.num_tokens_in_vocab]
        if share is not None and held is not None:
            logits = logits.where(held[:, None], 0.0)
            torch.distributed.all_reduce(logits, group=share.group)
        return logits

    def _noise(self, row: PackedRow, share: RowShare | None) -> Tensor:
        """Of the tokens that this rank embeds: [L, 1, D]."""
        noise = embedding_noise(row, self.noise_alpha, self.config.hidden_size)
        if share is not None:
            noise = noise[share.index_L]
        return noise.chunk(self._shards)[self.context.tensor_rank if self._shards > 1 else 0]

    def _read_neighbors(
        self, row: PackedRow, segments: PackedSegments, share: RowShare | None
    ) -> tuple[PackedSegments, Tensor | None]:
        """The segments with what they read, and the neighbors' states, [N, 1, D]: embeddings of their tokens, or what
        the stage before has sent behind the row."""
        retro = self.retro
        if row.neighbors is None or not retro.num_neighbors:
            return segments, None
        if segments.cache is not None:
            return self._read_in_pass(row.neighbors, segments)
        neighbors = row.neighbors if share is None else held_neighbors(row.neighbors, share)
        neighbors, row_length = neighbors.padded(self._shards), row.tokens_1T.shape[1]
        plan = plan_of(neighbors, row_length, retro, row.tokens_1T.device, share)
        if plan is None:
            return segments, None
        if self.pre_process:
            texts = self.embedding(input_ids=neighbors.tokens_1N, position_ids=plan.positions_N[None])
        else:
            assert self._received is not None
            sizes = [row_length // self.context.context_size, neighbors.tokens_1N.shape[1]]
            states, texts = self._received.split([size // self._shards for size in sizes])
            self.decoder.set_input_tensor(states)
        return RetroSegments(**vars(segments), plan=plan), texts

    def _read_in_pass(self, neighbors: Neighbors, segments: PackedSegments) -> tuple[PackedSegments, Tensor | None]:
        """As :meth:`_read_neighbors`, in a pass of generation."""
        assert self.pre_process and self.post_process, "generation is of a model that one process holds"
        conditioned = self.retro.encoder_conditioning == "chunk"
        cache = typing.cast(NeighborCache, segments.cache)
        plan, texts = pass_plan(neighbors, segments.lengths, conditioned, cache), None
        if plan.encoding is not None:
            texts = self.embedding(input_ids=plan.tokens_1N, position_ids=plan.encoding.positions_N[None])
        return PassSegments(**vars(segments), plan=plan), texts

    def _output_weight(self) -> Tensor | None:
        """The embedding's weight, where the output layer has none of its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _router_padding(self, row: PackedRow) -> Tensor | None:
        """Padding that the router's balancing loss leaves out; this rank's share under sequence parallelism."""
        if self.config.num_moe_experts is None:
            return None
        mask = row.padding_mask_1T
        if self.config.sequence_parallel:
            mask = mask.chunk(self.context.tensor_size, dim=1)[self.context.tensor_rank]
        return mask


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
