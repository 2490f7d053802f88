"""Embeddings of a model: vectors of texts, in the names and forms that GritLM's users know."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from megatron_grit.config.embedding_shape import tells_sides_apart
from megatron_grit.config.options import EmbeddingOptions
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.chat import Chat
from megatron_grit.data.text.markers import Side, SideMarkers, TextMarkers
from megatron_grit.data.text.templates import cut_embedding, instruction_and_text
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.document_cache.document_cache import DocumentCache, Storage
from megatron_grit.inference.document_cache.identity import Attention, CacheIdentity, identity_of
from megatron_grit.inference.document_cache.make import make_caches
from megatron_grit.inference.document_cache.store import CacheStore
from megatron_grit.inference.embedding_formats import Precision, check_precision, corpus_texts, quantize_vectors
from megatron_grit.inference.encode import embedding_width, encode_tokens
from megatron_grit.inference.loading import check_value
from megatron_grit.inference.messages import read_texts
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.inference.results import Embeddings
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

Texts = str | Sequence[int] | Sequence[str | Sequence[int]]


class TextEmbedder:
    """What :class:`~megatron_grit.inference.model.GritModel` does with texts to embed."""

    config: RunConfig
    model: GritDecoder
    chunks: list[GritDecoder]
    tokenizer: Tokenizer
    chat: Chat
    markers: SideMarkers
    model_group: ModelGroup
    layer: int | None
    num_cut = 0
    """Texts so far that were longer than max_length, or than the model's positions, and were cut."""

    def encode(  # many: how texts are embedded, and in what form vectors are returned
        self,
        texts: Texts,
        instruction: str | None = EmbeddingOptions.instruction,
        *,
        side: Side | None = EmbeddingOptions.side,
        dimensions: int | None = EmbeddingOptions.dimensions,
        max_length: int = EmbeddingOptions.max_length,
        batch_tokens: int = EmbeddingOptions.batch_tokens,
        progress: bool = True,
        precision: Precision = "float32",
        ranges: np.ndarray | None = None,
        convert_to_tensor: bool = False,
        get_cache: bool = False,
    ) -> Any:
        """Embed texts with the pooling that the model was trained with.

        All processes of a model-parallel group call this with the same texts, and each gets all vectors.

        Args:
            texts: one text or several; none empty. A text may be given as the ids of its tokens, without template.
            instruction: what the embedding is for; attended and not pooled. "": the template without instruction.
                None: the bare text, for models that were trained on plain records.
            side: query or passage, for a model that was trained to tell them apart (brackets, side tokens, separate
                linear layers); other models ignore it.
            dimensions: keep this many of a vector's first numbers, and normalise them where the model normalises
                (Matryoshka). Good for the sizes that the model was trained for, loss.matryoshka_dims. None: all.
            max_length: tokens of a text with its instruction; the rest is cut off, as is what is beyond the model's
                positions.
            batch_tokens: token budget of one forward pass, on each replica of a group (see :class:`ModelGroup`).
            progress: show a bar from 256 texts on, and say how many texts were cut.
            precision: float32, or int8, uint8, binary, ubinary of
                :func:`~megatron_grit.inference.embedding_formats.quantize_vectors`.
            ranges: for int8 and uint8, as there.
            convert_to_tensor: return a tensor on the host in place of an array.
            get_cache: also return the keys and values of the same pass, by a model that this process holds whole.

        Returns:
            float32 [len(texts), dimensions], or [dimensions] for one text; with ``get_cache`` a pair of that and a
            :class:`~megatron_grit.inference.document_cache.document_cache.DocumentCache`, or a list of them.

        Raises:
            DataError: a text is empty or no text, the instruction alone fills ``max_length``, or the model needs a side
                and none is given.
            ConfigError: an option that is out of its range.
        """
        check_precision(precision)
        options = EmbeddingOptions(
            instruction=instruction,
            side=side,
            dimensions=dimensions,
            max_length=max_length,
            batch_tokens=batch_tokens,
        )
        several, single = read_texts(texts, self.tokenizer.vocab_size)
        caches: list[DocumentCache] = []
        if get_cache:
            found, caches = self._embed_and_cache(several, options)
        else:
            found = self.embed(several, options, progress=progress)
        self._count_cut(found.num_cut, len(several), max_length, say=progress)
        vectors: Any = quantize_vectors(found.vectors, precision, ranges)
        if convert_to_tensor:
            import torch

            vectors = torch.from_numpy(np.ascontiguousarray(vectors))
        vectors = vectors[0] if single else vectors
        return (vectors, caches[0] if single else caches) if get_cache else vectors

    def encode_queries(self, queries: Texts, instruction: str | None = EmbeddingOptions.instruction, **how: Any) -> Any:
        """:meth:`encode` of queries."""
        return self.encode(queries, instruction, **({"side": "query"} | how))

    def encode_corpus(self, corpus: Any, instruction: str | None = EmbeddingOptions.instruction, **how: Any) -> Any:
        """:meth:`encode` of passages, which may be objects with "text" and perhaps "title": title, a space, text.

        Raises:
            DataError: as there, or an object without text; names it.
        """
        return self.encode(corpus_texts(corpus), instruction, **({"side": "passage"} | how))

    def embed(
        self,
        texts: Sequence[str | list[int]],
        options: EmbeddingOptions,
        *,
        progress: bool = True,
        before_pass: Callable[[], object] | None = None,
    ) -> Embeddings:
        """As :meth:`encode`, for texts that were checked.

        Args:
            texts: of :func:`~megatron_grit.inference.messages.read_texts`.
            options: how.
            progress: as there.
            before_pass: called before each forward pass; what it raises ends the call.
        """
        tokenised, num_cut = self._cut_tokens(texts, options.instruction, options.side, options.max_length)
        vectors = self.embed_tokens(tokenised, options, progress=progress, before_pass=before_pass)
        return Embeddings(vectors, sum(len(head) + len(tail) for head, tail in tokenised), num_cut)

    def embed_tokens(
        self,
        tokenised: Sequence[tuple[list[int], list[int]]],
        options: EmbeddingOptions,
        *,
        progress: bool = True,
        before_pass: Callable[[], object] | None = None,
    ) -> np.ndarray:
        """Vectors of texts that are tokens, as :meth:`embedding_tokens` makes them; see :meth:`embed`."""
        self._check_embedding(tokenised, options)
        vectors = encode_tokens(
            self.chunks,
            tokenised,
            group=self.model_group,
            batch_tokens=options.batch_tokens,
            progress=progress,
            is_query=self._is_query(options.side),
            before_pass=before_pass,
            layer=self.layer,
        )
        return self._first_dimensions(vectors, options.dimensions)

    def _first_dimensions(self, vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
            if self.config.embedding.normalize:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _check_embedding(self, tokenised: Sequence[tuple[list[int], list[int]]], options: EmbeddingOptions) -> None:
        width = embedding_width(self.model)
        if options.dimensions is not None and options.dimensions > width:
            raise ConfigError(f"dimensions must be at most {width}, the model's, not {options.dimensions}")
        if not all(tail for _, tail in tokenised):
            raise DataError(f"the instruction fills max_length {options.max_length}; shorten it or raise max_length")

    def _count_cut(self, num_cut: int, num_texts: int, max_length: int, *, say: bool) -> None:
        self.num_cut += num_cut
        if num_cut and say:
            log.info(f"{num_cut:,} of {num_texts:,} texts are longer than {self._longest(max_length)} tokens: cut")

    def _cut_tokens(
        self, texts: Sequence[str | list[int]], instruction: str | None, side: Side | None, max_length: int
    ) -> tuple[list[tuple[list[int], list[int]]], int]:
        """As :meth:`embedding_tokens`, and how many texts were cut."""
        markers, longest = self._markers(side), self._longest(max_length)
        whole = [instruction_and_text(self.tokenizer, text, instruction) for text in texts]
        tokenised = [cut_embedding(*parts, longest, markers) for parts in whole]
        return tokenised, sum(len(head) + len(tail) + markers.num_tokens > longest for head, tail in whole)

    def _embed_and_cache(
        self, texts: Sequence[str | list[int]], options: EmbeddingOptions
    ) -> tuple[Embeddings, list[DocumentCache]]:
        self.refuse_sharded("keeping keys and values")
        if self.layer is not None:
            raise ConfigError("get_cache is of all layers, and this model embeds from one of them; set layer to None")
        tokenised, num_cut = self._cut_tokens(texts, options.instruction, options.side, options.max_length)
        self._check_embedding(tokenised, options)
        caches, vectors = make_caches(
            self.model,
            tokenised,
            self.cache_identity(self.embedding_attention),
            self.own_storage,
            embeds=True,
            batch_tokens=options.batch_tokens,
            is_query=self._is_query(options.side),
        )
        assert vectors is not None
        vectors = self._first_dimensions(vectors, options.dimensions)
        return Embeddings(vectors, sum(len(head) + len(tail) for head, tail in tokenised), num_cut), caches

    def cache(  # many: what is read, how, and where it is kept
        self,
        texts: Texts,
        instruction: str | None = EmbeddingOptions.instruction,
        *,
        attention: Attention | None = None,
        side: Side | None = EmbeddingOptions.side,
        storage: Storage | None = None,
        store: CacheStore | None = None,
        max_length: int | None = None,
        batch_tokens: int = EmbeddingOptions.batch_tokens,
        before_pass: Callable[[], object] | None = None,
    ) -> list[DocumentCache]:
        """Keys and values of texts, for ``generate(caches=...)``: each text is read by itself, in the template of texts
        to embed, and its cache may stand at any place of any number of prompts.

        Args:
            texts: one or several.
            instruction: as of :meth:`encode`.
            attention: of the pass. None: that of embeddings, as GritLM does. causal: the pass of generation, so that a
                prompt that begins with the cache gets the answer that it gets without one.
            side: as there.
            storage: fp32, bf16, int8 or int4. None: the model's precision.
            store: where caches are looked up, and kept if they are not there.
            max_length: as there. None: the model's positions.
            batch_tokens: as there.
            before_pass: called before each forward pass; what it raises ends the call.

        Raises:
            DataError: as there.
            ConfigError: as there, or the model is sharded over several processes.
        """
        self.refuse_sharded("keeping keys and values")
        attention, storage = attention or self.embedding_attention, storage or self.own_storage
        several, _ = read_texts(texts, self.tokenizer.vocab_size)
        options = EmbeddingOptions(
            instruction=instruction,
            side=side,
            max_length=max_length or self.config.model.max_position_embeddings,
            batch_tokens=batch_tokens,
        )
        tokenised, num_cut = self._cut_tokens(several, options.instruction, options.side, options.max_length)
        self._check_embedding(tokenised, options)
        self._count_cut(num_cut, len(several), options.max_length, say=True)
        identity = self.cache_identity(attention)
        ids = [tuple(head + tail) for head, tail in tokenised]
        found: dict[tuple[int, ...], DocumentCache | None] = {
            one: None if store is None else store.get(identity, one, storage) for one in ids
        }
        missing = {tuple(head + tail): (head, tail) for head, tail in tokenised if found[tuple(head + tail)] is None}
        if missing:
            made, _ = make_caches(
                self.model,
                list(missing.values()),
                identity,
                storage,
                embeds=attention == self.embedding_attention,
                batch_tokens=batch_tokens,
                is_query=self._is_query(side),
                before_pass=before_pass,
            )
            for cache in made:
                found[cache.tokens] = cache
                if store is not None:
                    store.put(cache)
        return [typing.cast(DocumentCache, found[one]) for one in ids]

    @property
    def embedding_attention(self) -> Attention:
        """What a text to embed sees of itself."""
        return "causal" if self.config.embedding.causal else "bidirectional"

    @property
    def own_storage(self) -> Storage:
        """In which caches lose nothing."""
        return "bf16" if self.config.training.precision == "bf16" else "fp32"

    def cache_identity(self, attention: Attention) -> CacheIdentity:
        """What this model's caches follow from; the first call reads all weights, those after it none: see
        :meth:`weights_changed`.

        Args:
            attention: of the pass.
        """
        return replace(self._cache_identity, attention=attention)

    def weights_changed(self) -> None:
        """To be called after weights were changed in memory: caches made before are not those of this model any more,
        and are refused."""
        self.__dict__.pop("_cache_identity", None)

    @cached_property
    def _cache_identity(self) -> CacheIdentity:
        return identity_of(self.config, self.model, self.tokenizer, self.chat, self.markers, "causal")

    def refuse_sharded(self, what: str) -> None:
        """
        Raises:
            ConfigError: the model is sharded over several processes.
        """
        if self.model_group.size > 1:
            raise ConfigError(
                f"{what} takes a model that each process holds whole, and this one is sharded over "
                f"{self.model_group.size} processes; a checkpoint of any mesh loads whole, in one process: "
                "GritModel.load(PATH) without parallel, or megatron-grit generate --checkpoint PATH"
            )

    def embedding_tokens(
        self,
        texts: Sequence[str | list[int]],
        instruction: str | None = "",
        *,
        side: Side | None = None,
        max_length: int = EmbeddingOptions.max_length,
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of each text's instruction and of the text with its markers, as :meth:`encode` embeds them.

        Raises:
            DataError: the model has to know the side and is not told.
        """
        return self._cut_tokens(texts, instruction, side, max_length)[0]

    def _markers(self, side: Side | None) -> TextMarkers:
        return self.markers.passage if self._is_query(side) is False else self.markers.query

    def _longest(self, max_length: int) -> int:
        return min(max_length, self.config.model.max_position_embeddings)

    def _is_query(self, side: str | None) -> bool | None:
        check_value("side", EmbeddingOptions, side)
        if side is None and tells_sides_apart(self.config.embedding):
            raise DataError(
                'this model embeds queries and passages in different ways; give side="query" or side="passage"'
            )
        return None if side is None else side == "query"
