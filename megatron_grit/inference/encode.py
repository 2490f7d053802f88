"""Embeds texts at any layout (:mod:`mesh_rows`), packed into rows without padding to the longest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import ConfigError
from megatron_grit.inference.mesh_rows import WINDOW, common_length, forward_batches, share_out
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import from_last_stage, gather_in_order
from megatron_grit.store.progress import Progress

_PROGRESS_FROM = 256


@torch.no_grad()
def encode_tokens(
    chunks: Sequence[GritDecoder],
    texts: Sequence[tuple[list[int], list[int]]],
    *,
    group: ModelGroup,
    batch_tokens: int,
    progress: bool = True,
    is_query: bool | None = None,
    before_pass: Callable[[], object] | None = None,
    layer: int | None = None,
) -> np.ndarray:  # many: the model, the texts, and how they are embedded
    """Embed tokenised texts. All processes of a model-parallel group call it with the same texts; groups are
    independent of each other.

    Args:
        chunks: of this process's pipeline stage of the model; one, but for an interleaved pipeline.
        texts: for each text its instruction's tokens, attended and not pooled, and its own.
        batch_tokens: token budget of one forward pass, on each replica; raised to the longest text.
        progress: show a bar from 256 texts on, in the process that leads the group.
        is_query: whether they are queries or passages, for a model whose linear layers differ between the two.
        before_pass: called before each forward pass; what it raises ends the call.
        layer: pool the states after this layer, of a model without pipeline parallelism. None: the last.

    Returns:
        float32 [len(texts), D], on every process.

    Raises:
        ConfigError: there is no such layer.
    """
    for chunk in chunks:
        chunk.eval()
    lengths = np.array([len(head) + len(tail) for head, tail in texts], dtype=np.int64)
    budget = max(batch_tokens, int(lengths.max()))
    embeddings = np.empty((len(texts), embedding_width(chunks[0])), dtype=np.float32)
    shows = progress and group.leads and len(texts) >= _PROGRESS_FROM
    with first_layers(chunks[0], layer), Progress(len(texts), "embedding", "text", enabled=shows) as bar:
        for start in range(0, len(texts), WINDOW):
            window = slice(start, min(start + WINDOW, len(texts)))
            batches = share_out(lengths[window], budget, group.num_replicas)
            row_length = common_length(chunks[0].context, [int(lengths[window][batch].sum()) for batch in batches])
            row_of = partial(_row_of, texts[window], is_query, before_pass)
            vectors_ND = _encode_batches(chunks, group, batches, row_of, row_length, bar.update)
            embeddings[window] = vectors_ND.cpu().numpy()
    return embeddings


@contextmanager
def first_layers(model: GritDecoder, layer: int | None) -> Iterator[None]:
    """Have a model end after a layer until the block ends: its final states are then what transformers calls
    ``hidden_states[layer]``, of 0 the embedded tokens. The final norm is applied after the last layer only.

    Args:
        model: the layers of all stages, whole or its tensor parallel part.
        layer: 0 to the number of layers. None: all of them.

    Raises:
        ConfigError: there is no such layer.
    """
    if layer is None:
        yield
        return
    block = model.decoder
    layers, norm = block.layers, block.final_layernorm
    if not 0 <= layer <= len(layers):
        raise ConfigError(f"layer must be 0 to {len(layers)}, the model's last, or None, not {layer}")
    try:
        block.layers = layers[:layer]
        block.final_layernorm = norm if layer == len(layers) else None
        yield
    finally:
        block.layers, block.final_layernorm = layers, norm


def _row_of(
    texts: Sequence[tuple[list[int], list[int]]],
    is_query: bool | None,
    before_pass: Callable[[], object] | None,
    members: np.ndarray,
    row_length: int | None,
) -> PackedRow:
    if before_pass is not None:
        before_pass()
    return pooled_row([texts[member] for member in members.tolist()], is_query, row_length)


def _encode_batches(
    chunks: Sequence[GritDecoder],
    group: ModelGroup,
    batches: list[np.ndarray],
    row_of: Callable[[np.ndarray, int | None], PackedRow],
    row_length: int | None,
    advance: Callable[[int], Any],
) -> Tensor:
    """Embeddings of all batches' texts, on every process of the group: [N, D]."""
    context, num_replicas = chunks[0].context, group.num_replicas
    outputs = forward_batches(chunks, group, batches, row_of, row_length, Output.EMBEDDINGS, advance)
    places = [_joined(batches[replica::num_replicas]) for replica in range(num_replicas)]
    if context.is_last_stage:
        own_LD = torch.cat(outputs)[: len(places[group.replica])]
        vectors_ND = gather_in_order(own_LD, places, group.replica_group or context.data_group)
    else:
        vectors_ND = torch.empty(sum(map(len, places)), embedding_width(chunks[0]), device=context.device)
    return from_last_stage(vectors_ND, context)


def _joined(batches: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *batches]))


def embedding_width(model: GritDecoder) -> int:
    """Channels of an embedding, on every stage."""
    return model.embedding_config.projection_dim or model.config.hidden_size


def pooled_row(
    texts: Sequence[tuple[list[int], list[int]]], is_query: bool | None = None, row_length: int | None = None
) -> PackedRow:
    """A row of texts, each a segment: instruction tokens, then pooled tokens.

    Args:
        texts: for each text its instruction's tokens and its own.
        is_query: whether they are queries or passages. None: not known.
        row_length: length to pad the row to. None: no padding.
    """
    sizes = [len(head) + len(tail) for head, tail in texts]
    used = sum(sizes)
    padding = 0 if row_length is None else row_length - used
    bounds = torch.tensor([0, *sizes, padding] if padding else [0, *sizes]).cumsum(0)
    segment_ids = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    # Padding may be longer than the model has positions.
    positions = F.pad(torch.arange(used) - bounds[segment_ids[:used]], (0, padding))
    heads = torch.tensor([len(head) for head, _ in texts])
    pooled = positions[:used] >= heads[segment_ids[:used]]
    tokens = torch.tensor([token for head, tail in texts for token in (*head, *tail)])
    return PackedRow(
        embeds=True,
        tokens_1T=F.pad(tokens, (0, padding))[None],
        positions_1T=positions[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(*sizes, padding),
        padding_mask_1T=(torch.arange(used + padding) >= used)[None],
        segment_ids_T=segment_ids,
        pool_mask_T=F.pad(pooled.float(), (0, padding)),
        slots_S=torch.arange(len(texts)),
        is_query_S=None if is_query is None else torch.full((len(texts),), is_query),
    )
