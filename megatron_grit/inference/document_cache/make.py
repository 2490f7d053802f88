"""Passes that make caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_grit.inference.continuations import text_row
from megatron_grit.inference.document_cache.document_cache import DocumentCache, Storage
from megatron_grit.inference.document_cache.identity import CacheIdentity
from megatron_grit.inference.encode import embedding_width, pooled_row
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.inference.mesh_rows import share_out
from megatron_grit.models.decoder import GritDecoder, Output


@torch.no_grad()
def make_caches(  # many: the model, the texts, and how they are read
    model: GritDecoder,
    texts: Sequence[tuple[list[int], list[int]]],
    identity: CacheIdentity,
    storage: Storage,
    *,
    embeds: bool,
    batch_tokens: int,
    is_query: bool | None = None,
    before_pass: Callable[[], object] | None = None,
) -> tuple[list[DocumentCache], np.ndarray | None]:
    """Read texts, several in a pass, each by itself.

    Args:
        model: whole in this process.
        texts: for each its instruction's tokens and its own.
        identity: of the caches.
        storage: how they are kept.
        embeds: whether the pass is that of embeddings, which are returned too; else it is that of generation.
        batch_tokens: token budget of one forward pass; raised to the longest text.
        is_query: as of :func:`~megatron_grit.inference.encode.encode_tokens`.
        before_pass: called before each forward pass; what it raises ends the call.

    Returns:
        A cache of each text, and float32 [texts, D] where ``embeds``.
    """
    model.eval()
    lengths = np.array([len(head) + len(tail) for head, tail in texts], dtype=np.int64)
    vectors = np.empty((len(texts), embedding_width(model)), dtype=np.float32) if embeds else None
    made: dict[int, DocumentCache] = {}
    for batch in share_out(lengths, max(batch_tokens, int(lengths.max())), 1):
        if before_pass is not None:
            before_pass()
        several = [texts[number] for number in batch.tolist()]
        row = pooled_row(several, is_query) if embeds else text_row([[*head, *tail] for head, tail in several])
        cache = SequenceCache()
        for head, tail in several:
            cache.add(len(head) + len(tail))
        output = model(row.to(model.context.device), Output.EMBEDDINGS if embeds else Output.HIDDEN, cache)
        if vectors is not None:
            vectors[batch] = output.float().cpu().numpy()
        for sequence, (number, (head, tail)) in enumerate(zip(batch.tolist(), several, strict=True)):
            layers = [cache.layer(sequence, layer) for layer in range(1, model.config.num_layers + 1)]
            made[number] = DocumentCache.of(identity, [*head, *tail], layers, storage, model.rotary_angles)
    return [made[number] for number in range(len(texts))], vectors
