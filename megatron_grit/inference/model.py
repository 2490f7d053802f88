"""The Python interface of a trained model: embeddings and text from one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.config.options import BatchSize, CacheUse, SamplingOptions
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.chat.chat import Chat, chat_beside, default_chat, named_chat
from megatron_grit.data.chat.run_chat import checkpoint_chat
from megatron_grit.data.text.markers import load_markers
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.templates import encode_prompt, encode_text_prompt
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.document_cache.document_cache import DocumentCache
from megatron_grit.inference.document_cache.formats import check_one_attention, prompt_behind
from megatron_grit.inference.document_cache.join import JoinedCaches
from megatron_grit.inference.embedder import TextEmbedder
from megatron_grit.inference.generation.answers import AnswerPart, stream_answers
from megatron_grit.inference.generation.generate import Generation, Past, check_room
from megatron_grit.inference.loading import load_decoder
from megatron_grit.inference.messages import Conversation, check_texts, read_conversations
from megatron_grit.inference.model_group import ModelGroup, join_model_group
from megatron_grit.inference.reading import (
    NeighborSource,
    Reader,
    RetrievedNeighbors,
    Searches,
    check_every,
    given_neighbors,
)
from megatron_grit.inference.results import Answer
from megatron_grit.inference.score import read_supervised, score_tokens
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

Messages = Sequence[Mapping[str, Any]]


class GritModel(TextEmbedder):
    """Encode and generate with a checkpoint.

    >>> model = GritModel.load("runs/quickstart")
    >>> queries = model.encode(["parse a date"], instruction="Find the function that does this")
    >>> passages = model.encode(["Return a datetime from a string."])
    >>> similarity = queries @ passages.T
    >>> model.generate("What does json.dumps do?")

    A model that one process cannot hold is sharded over several, which then call :meth:`encode` together:

    >>> model = GritModel.load("runs/mixtral", parallel=ParallelConfig(tensor=2, expert=8))

    Use :meth:`load`. The constructor takes a model that is already built, on all processes of the job.
    """

    def __init__(
        self,
        config: RunConfig,
        model: GritDecoder | Sequence[GritDecoder],
        tokenizer: Tokenizer,
        chat: Chat | None = None,
        group: ModelGroup | None = None,
    ) -> None:
        self.chunks = [model] if isinstance(model, GritDecoder) else list(model)
        self.config, self.model, self.tokenizer = config, self.chunks[0], tokenizer
        self.chat = chat or default_chat(tokenizer)
        """Its chat template, and what ends its answers."""
        self.chat_date: datetime | None = None
        """What a template that asks for the date is told. None: now."""
        self._chat_format = self.chat.bind(tokenizer)
        self.layer: int | None = None
        """Texts are embedded from the states after this layer, 0 for the embedded tokens. None: after the last."""
        self.markers = load_markers(config.embedding, config.model.vocab_size, tokenizer)
        self.model_group = group or join_model_group(self.model, config.parallel.timeout_minutes)
        self._database: RetrievedNeighbors | None = None
        self._every: int | None = None
        self._said_unread = False

    @staticmethod
    def load(
        path: str | Path,
        device: str = "auto",
        precision: str | None = None,
        base: str | Path | None = None,
        parallel: ParallelConfig | None = None,
        chat_template: str | None = None,
        chat_date: str | None = None,
    ) -> GritModel:
        """Load a checkpoint of any layout, or a Hugging Face folder, whole into each process of the job or sharded over
        all of them.

        Args:
            path: a checkpoint, the output directory of a run for its newest one, or a Hugging Face folder.
            precision: fp32 or bf16. None: that of the training run, but fp32 on a CPU.
            base: for a run with adapters, where their base is now: a checkpoint or a Hugging Face directory. None:
                where the run read it.
            parallel: the mesh over the processes of the job, all of which call this; its ``device`` is ignored.
                Sequence parallelism is switched on for a mixture of experts with tensor parallelism, which needs it.
                None: each process holds the whole model.
            chat_template: another one than the checkpoint's: its name, "tokenizer", or a YAML file.
            chat_date: what a template that asks for the date (``strftime_now``) is told: YYYY-MM-DD, or "data" for the
                date that the training data have. None: today's, as in transformers.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or its adapters belong to another base.
            ConfigError: there is no such device or precision.
            MeshError: the mesh does not fit the model or the number of processes.
        """
        log.info(f"loading the model of {path}")
        config, model, tokenizer, folder = load_decoder(path, device, precision, base, parallel)
        if chat_template is not None:
            chat = named_chat(chat_template, tokenizer, "chat_template")
        elif holds_checkpoint(folder):
            chat = checkpoint_chat(folder, config, tokenizer)
        else:
            chat = chat_beside(tokenizer) or default_chat(tokenizer)
        date = chat.date_of(chat_date)
        made = GritModel(config, model, tokenizer, chat)
        made.chat_date = date
        return made

    def read_from(self, retriever: Searches, every: int | None = None) -> None:
        """Read neighbors from a database, in every answer from now on.

        Args:
            retriever: a :class:`~megatron_grit.retrieval.retriever.Retriever`.
            every: retrieve after so many tokens of an answer, 1 to model.retro.chunk_length. None: chunk_length.

        Raises:
            ConfigError: the model reads no neighbors, or the database is of another tokenizer or chunk length.
        """
        database = RetrievedNeighbors(retriever, self.config.model, self.tokenizer)
        self._every, self._database = check_every(every, self.config.model), database

    def generate(  # many: how an answer is drawn, and what is read for it
        self,
        messages: str | Messages | Sequence[str | Messages] | None,
        *,
        max_new_tokens: int = SamplingOptions.max_new_tokens,
        temperature: float = SamplingOptions.temperature,
        top_p: float = SamplingOptions.top_p,
        top_k: int | None = SamplingOptions.top_k,
        repetition_penalty: float = SamplingOptions.repetition_penalty,
        seed: int = SamplingOptions.seed,
        stop: str | Sequence[str] = (),
        neighbors: Sequence[str | Sequence[int] | Sequence[str | Sequence[int]]] | None = None,
        tools: Sequence[Any] | None = None,
        caches: Sequence[DocumentCache] | None = None,
        cache_use: CacheUse | None = None,
    ) -> str | list[str]:
        """Answer a prompt, a conversation, or several conversations at once.

        All processes of a model-parallel group call this with the same conversations, and each gets all answers.

        Args:
            messages: a user prompt, or messages with "role" and "content" that end with the user's or a tool's; what
                else they hold, such as "tool_calls", is for a template that reads it.
            max_new_tokens: at most this many tokens are generated, and no more than the model has positions.
            temperature: 0 for the most likely token at each position, else it divides the logits.
            top_p: nucleus to sample from, above 0 and at most 1.
            top_k: sample from so many of the likeliest tokens. None: from all.
            repetition_penalty: divides the scores of tokens that prompt or answer hold already. 1: none.
            seed: of the sampling. What is drawn for a conversation does not depend on the others; equal ones draw
                differently.
            stop: texts, at most 4; an answer ends before the first of them.
            neighbors: what is read in place of the database of :meth:`read_from`, by a model that reads: at most
                model.retro.num_neighbors texts, or lists of token ids, which every chunk reads; for several
                conversations a list of them for each.
            tools: what the assistant may call, for a template that reads it.
            caches: of :meth:`cache`, which begin the prompt; ``messages`` is then the text that follows them in one of
                GritLM's forms (:class:`CacheUse`), or None where both sides are cached.
            cache_use: in which form, and which tokens of the caches are computed anew.

        Returns:
            The answer; a list of them for several conversations.

        Raises:
            DataError: a conversation that does not end with the user, or leaves no room for an answer; too many
                neighbors, or an empty one.
            ConfigError: an option that is out of its range, or neighbors are given to a model that reads none, or that
                is sharded over several processes.
        """
        options = SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=[stop] if isinstance(stop, str) else stop,  # type: ignore[arg-type]
        )
        if caches is not None:
            if tools is not None or neighbors is not None:
                raise ConfigError("caches go without tools and neighbors; leave these out")
            prompt, past = self.prompt_behind(caches, messages, cache_use)
            parts = self.stream_prompts([prompt], options, pasts=[past])
            return next(part.answer.text for part in parts if part.answer is not None)
        conversations, single = read_conversations(messages)
        source = None
        if neighbors is not None:
            several: Any = [neighbors] if single else neighbors
            if not isinstance(several, Sequence) or len(several) != len(conversations):
                raise DataError(f"neighbors must be a list for each of the {len(conversations)} conversations")
            source = given_neighbors(self.config.model, self.tokenizer, several)
        answers = [answer.text for answer in self.answer(conversations, options, source=source, tools=tools)]
        return answers[0] if single else answers

    def stream(
        self,
        messages: str | Messages | None,
        options: SamplingOptions | None = None,
        *,
        tools: Sequence[Any] | None = None,
        before_pass: Callable[[], object] | None = None,
        caches: Sequence[DocumentCache] | None = None,
        cache_use: CacheUse | None = None,
    ) -> Iterator[str]:
        """Answer a prompt or a conversation, piece by piece: joined, what :meth:`generate` returns.

        >>> for piece in model.stream("What does json.dumps do?"):
        ...     print(piece, end="", flush=True)

        A piece holds whole characters, and nothing that may be the beginning of a stop text.

        Args:
            messages: as there, one conversation.
            options: how. None: as :meth:`generate` does by default.
            tools: as there.
            before_pass: called before each forward pass; what it raises ends the answer.
            caches: as there.
            cache_use: as there.

        Raises:
            DataError: at once, a conversation that cannot be answered.
        """
        past: JoinedCaches | None = None
        if caches is not None:
            prompt, past = self.prompt_behind(caches, messages, cache_use)
        else:
            conversations, single = read_conversations(messages)
            if not single:
                raise DataError("give one conversation to stream, not several")
            prompt = self.prompt_tokens(conversations[0], tools)
        check_room(len(prompt), self.config.model.max_position_embeddings)
        parts = self.stream_prompts([prompt], options or SamplingOptions(), before_pass, pasts=[past])
        return (part.text for part in parts if part.text)

    def answer(
        self,
        conversations: Sequence[Conversation],
        options: SamplingOptions,
        before_pass: Callable[[], object] | None = None,
        *,
        source: NeighborSource | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[Answer]:
        """As :meth:`generate`, for conversations that were checked.

        Args:
            conversations: of :func:`~megatron_grit.inference.messages.read_conversations`.
            options: how.
            before_pass: called before each forward pass; what it raises ends the call.
            source: of neighbors. None: the database of :meth:`read_from`.
            tools: as there.
        """
        prompts = [self.prompt_tokens(conversation, tools) for conversation in conversations]
        return self.continue_prompts(prompts, options, before_pass, source=source)

    def continue_prompts(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        before_pass: Callable[[], object] | None = None,
        *,
        source: NeighborSource | None = None,
    ) -> list[Answer]:
        """As :meth:`answer`, for prompts that are tokens, in any form."""
        parts = self.stream_prompts(prompts, options, before_pass, source=source)
        answers = {part.prompt: part.answer for part in parts if part.answer is not None}
        return [answers[number] for number in range(len(prompts))]

    def stream_prompts(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        before_pass: Callable[[], object] | None = None,
        *,
        source: NeighborSource | None = None,
        pasts: Sequence[Past | None] | None = None,
    ) -> Iterator[AnswerPart]:
        """As :meth:`continue_prompts`, with the text of each prompt's answer in parts as it comes.

        Args:
            prompts: as there.
            options: as there.
            before_pass: as there.
            source: as there.
            pasts: of each prompt what :meth:`prompt_behind` gives, or None. None: nothing is known of any.
        """
        if len(self.chunks) > 1:
            raise ConfigError("generation takes stages of one chunk each; leave parallel.virtual_pipeline out")
        reader = self._reader(prompts, source or self._database)
        if reader is not None:
            self.refuse_sharded("reading neighbors in generation")
        generation = Generation(
            self.model,
            stop_ids=self.chat.end_ids,
            max_positions=self.config.model.max_position_embeddings,
            before_pass=before_pass,
            reader=reader,
        )
        for part in stream_answers(generation, prompts, options, self.tokenizer, pasts):
            if part.answer is not None and reader is not None:
                part = part._replace(answer=part.answer._replace(readings=reader.readings[part.prompt]))
            yield part

    def prompt_behind(
        self, caches: Sequence[DocumentCache], text: Any, use: CacheUse | None = None
    ) -> tuple[list[int], JoinedCaches]:
        """A prompt that begins with caches, and what is known of them: an element of ``prompts`` and of ``pasts`` of
        :meth:`stream_prompts`.

        Args:
            caches: in their order.
            text: what follows them, or None.
            use: as of :meth:`generate`.

        Raises:
            DataError: a cache of another model, caches of both kinds of attention, too many or too few of them, or a
                text too much or too little.
            ConfigError: the model is sharded over several processes, or reads neighbors.
        """
        self.refuse_sharded("reading caches")
        if self._database is not None:
            raise ConfigError("caches are read without neighbors; use a model that reads no database")
        use = use or CacheUse()
        if text is not None:
            (text,) = check_texts([text], "text behind caches")
        behind = prompt_behind(self.tokenizer, use.format, len(caches), text)
        check_one_attention([cache.identity.attention for cache in caches])
        for cache in caches:
            cache.identity.check(self.cache_identity("causal"))
        past = JoinedCaches(self.model, caches, use)
        return [*past.tokens, *behind], past

    def _reader(self, prompts: Sequence[list[int]], source: NeighborSource | None) -> Reader | None:
        """Reads for these prompts. None: the model reads nothing, which is said once where it could."""
        retro = self.config.model.retro
        if source is not None and retro.gate != 0:
            every = self._every or retro.chunk_length
            return Reader(source, retro.chunk_length, every, [len(prompt) for prompt in prompts])
        why = "model.retro.gate is 0" if source is not None else "give neighbors, or a database (--retro-project)"
        self._say_unread(f"generates without them: {why}")
        return None

    def _say_unread(self, what: str) -> None:
        """Say once that neighbors are not read, of a model that could."""
        if self.config.model.retro.num_neighbors and not self._said_unread:
            self._said_unread = True
            log.info(f"this model was trained to read neighbors, and {what}")

    def prompt_tokens(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation, in the model's chat template, up to where its answer begins.

        Args:
            messages: of the conversation.
            tools: what the assistant may call.

        Raises:
            DataError: it does not end with the user or a tool, or the template refuses it or does not read it all.
        """
        return encode_prompt(self.tokenizer, messages, self._chat_format, tools=tools, date=self.chat_date)

    def completion_prompt(self, text: str) -> list[int]:
        """Ids of a text that is continued without a template; see :func:`encode_text_prompt`."""
        return encode_text_prompt(self.tokenizer, text, self._chat_format)

    def token_losses(self, prefix: str, *, batch_tokens: int = BatchSize.batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """Next-token losses over an indexed generative file. All processes of a model-parallel group call this.

        Args:
            prefix: file written by tools/preprocess/build_grit.py with this model's tokenizer.
            batch_tokens: token budget of one forward pass.

        Returns:
            For each record the sum of its supervised tokens' losses in nats (float64), and their number (int64).

        Raises:
            DataError: the file is damaged, of another kind or of another tokenizer.
        """
        self._say_unread("is measured without them")
        BatchSize(batch_tokens=batch_tokens)
        texts = read_supervised(prefix, self.tokenizer, self.config.model.max_position_embeddings)
        return score_tokens(self.chunks, texts, group=self.model_group, batch_tokens=batch_tokens)
