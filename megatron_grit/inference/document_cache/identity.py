"""What a cache follows from, beside its tokens: another model must not read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import computing_settings
from megatron_grit.data.chat.chat import Chat
from megatron_grit.data.text.markers import SideMarkers
from megatron_grit.data.text.templates import EMBEDDING_TEMPLATE, embedding_prefix
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.training.base_weights import base_fingerprint, exact_fingerprint

Attention = Literal["causal", "bidirectional"]
"""Of the pass that made a cache."""


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Digests of what keys and values follow from."""

    weights: str
    """Of the model's parameters, those of adapters left out."""
    adapters: str
    """Of adapters; empty where the model has none."""
    settings: str
    """Of the model's shape, positions and precision, and of how adapters are scaled."""
    tokenizer: str
    template: str
    """Of the templates of texts to embed and of conversations."""
    attention: Attention

    def check(self, model: CacheIdentity) -> None:
        """Refuse a model that this cache is not of.

        Args:
            model: what a cache of the model at hand would have; its attention does not count.

        Raises:
            DataError: names what differs.
        """
        names = [field.name for field in fields(self) if field.name != "attention"]
        others = [name for name in names if getattr(self, name) != getattr(model, name)]
        if others:
            raise DataError(
                f"the cache was made with other {' and '.join(others)} than this model's; make it again with this model"
            )


def identity_of(  # many: all that keys and values follow from
    config: RunConfig,
    model: GritDecoder,
    tokenizer: Tokenizer,
    chat: Chat,
    markers: SideMarkers,
    attention: Attention,
) -> CacheIdentity:
    """The identity of caches of a model that this process holds whole. Reads all weights."""
    settings, of_adapters = computing_settings(config)
    exact, has_adapters = exact_fingerprint(model, model.context), config.adapter.kind != "none"
    written = [EMBEDDING_TEMPLATE, embedding_prefix("{instruction}"), asdict(markers), chat.template, chat.source]
    return CacheIdentity(
        weights=base_fingerprint(model, model.context) if has_adapters else exact,
        adapters=exact if has_adapters else "",
        settings=digest_of_settings([settings, config.training.precision] + [of_adapters] * has_adapters),
        tokenizer=tokenizer.fingerprint,
        template=digest_of_settings(written),
        attention=attention,
    )
