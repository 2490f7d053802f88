"""Caches one after another as the beginning of a prompt, and which of their tokens are computed anew.

Each cache was computed by itself, so from the second one on its tokens know nothing of what stands before them, and its
first ones drew attention that belongs to the first tokens of the prompt. Computing a few of them anew repairs most of
it: the first of each cache (EPIC, arXiv 2410.15332), or those whose keys and values in the second layer deviate most
from what the model computes over the whole (CacheBlend, arXiv 2405.16444).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_grit.config.options import CacheUse
from megatron_grit.errors import DataError
from megatron_grit.inference.continuations import text_row
from megatron_grit.inference.document_cache.document_cache import DocumentCache
from megatron_grit.inference.encode import first_layers
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.models.decoder import GritDecoder, Output


class JoinedCaches:
    """A prompt's past: :class:`~megatron_grit.inference.generation.generate.Past`.

    Args:
        model: whole in this process.
        caches: in their order.
        use: what is computed anew.

    Raises:
        DataError: the model's positions do not let a cache stand behind another.
    """

    def __init__(self, model: GritDecoder, caches: Sequence[DocumentCache], use: CacheUse) -> None:
        if model.rotary_angles is None and model.embedding.add_position_embedding and len(caches) > 1:
            raise DataError(
                "this model adds a table of positions to its tokens, so a cache cannot stand behind another one; cache "
                "the texts as one"
            )
        self._model, self._caches = model, caches
        self._starts = [0, *accumulate(cache.num_tokens for cache in caches)]
        self.num_tokens = self._starts[-1]
        self.tokens = [token for cache in caches for token in cache.tokens]
        repair = use.repair
        if repair == "auto":
            repair = "first" if len(caches) > 1 else "none"
        self.recomputed: Sequence[int] = []
        if repair == "all":
            self.recomputed = list(range(self.num_tokens))
        elif repair == "first":
            spans = zip(self._starts[1:], caches[1:], strict=False)
            self.recomputed = [
                start + place for start, cache in spans for place in range(min(use.repair_tokens, cache.num_tokens))
            ]
        elif repair == "deviating":
            self.recomputed = self._deviating(math.ceil(use.repair_share * self.num_tokens))

    def layer(self, layer_number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their places in the prompt, and values of a layer: [num_tokens, G, H] each."""
        dtype, angles = self._model.config.params_dtype, self._model.rotary_angles
        starts = zip(self._caches, self._starts, strict=False)
        parts = [cache.layer(layer_number, start, angles, dtype, device) for cache, start in starts]
        keys, values = zip(*parts, strict=True)
        return (keys[0], values[0]) if len(parts) == 1 else (torch.cat(keys), torch.cat(values))

    @torch.no_grad()
    def _deviating(self, count: int) -> list[int]:
        """Places of so many tokens whose keys and values in the second layer, the first one that depends on other
        tokens, differ most from those over the whole; less where fewer differ."""
        model = self._model
        if model.config.num_layers < 2 or not count:
            return []
        cache = SequenceCache()
        cache.add(self.num_tokens)
        with first_layers(model, 2):
            model(text_row([self.tokens]).to(model.context.device), Output.HIDDEN, cache)
        held = torch.stack(self.layer(2, model.context.device))
        deviations_T = (cache.layer(0, 2).float() - held.float()).square().sum((0, 2, 3))
        found = deviations_T.topk(min(count, self.num_tokens))
        return sorted(found.indices[found.values > 0].tolist())
