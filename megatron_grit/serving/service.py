"""The endpoints without HTTP: a request's body to a response's."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from megatron_grit.config.knob import value_problem
from megatron_grit.config.options import EmbeddingOptions, SamplingOptions, ServingLimits
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.messages import read_messages, read_texts
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.reading import sources_of
from megatron_grit.inference.results import Answer
from megatron_grit.serving import choices, fields, rerank
from megatron_grit.serving.choices import Choices
from megatron_grit.serving.embed import embed
from megatron_grit.serving.fields import Json, RequestError, check_fields, read_value

BeforePass = Callable[[], None]
"""Called before each forward pass; what it raises ends the work."""
Job = Callable[..., Json]
"""The work that remains once a body is checked. It takes a :data:`BeforePass`."""

MAX_TEXTS = 2048


class Stream(NamedTuple):
    """Work that gives its answer in chunks."""

    chunks: Callable[[BeforePass], Generator[Json, None, Json]]
    """Yields them, and returns the ``usage``."""


class Service:
    """The endpoints: each checks the body of a request and returns the remaining work as a function.

    Args:
        model: the loaded model.
        name: what it is called in requests and responses.
        limits: those of :class:`~megatron_grit.config.options.ServingLimits` that are not as there.

    Raises:
        ConfigError: a limit is out of its range.
    """

    def __init__(self, model: GritModel, name: str, **limits: Any) -> None:
        self.model, self.name, self.limits = model, name, ServingLimits(**limits)
        self.created = int(time.time())

    def embeddings(self, body: Json) -> Job:
        """Embed ``input``: a text, its tokens' ids, or a list of either.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.EMBEDDINGS, self.name)
        texts = self._texts(body, "input")
        instruction = body.get("instruction", EmbeddingOptions.instruction)  # null: the bare text
        if (problem := value_problem(EmbeddingOptions, "instruction", instruction)) is not None:
            raise RequestError(f"instruction {problem}", "instruction")
        options = EmbeddingOptions(
            instruction=instruction,
            side=read_value(body, "side", EmbeddingOptions),
            dimensions=read_value(body, "dimensions", EmbeddingOptions),
            max_length=self.limits.max_length,
        )
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise RequestError("encoding_format must be float or base64", "encoding_format")

        def job(before_pass: BeforePass | None = None) -> Json:
            most = self.limits.max_request_tokens
            vectors, num_tokens = embed(self.model, texts, options, most, before_pass)
            rows = vectors.tolist()
            if encoding == "base64":
                rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            return {"object": "list", "data": data, "model": self.name, "usage": usage}

        return job

    def rerank(self, body: Json) -> Job:
        """Order ``documents`` by their relevance to ``query``.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.RERANK, self.name)
        asked = rerank.read_request(body, MAX_TEXTS)

        def job(before_pass: BeforePass | None = None) -> Json:
            scores, num_tokens = rerank.scores(self.model, asked, self.limits, before_pass)
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            head = {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": self.name}
            return head | {"results": rerank.results(asked, scores), "usage": usage}

        return job

    def chat(self, body: Json) -> Job | Stream:
        """Answer the conversation ``messages``.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.CHAT, self.name)
        given = body.get("messages")
        messages = _of_field("messages", lambda: read_messages(None if isinstance(given, str) else given))
        options, asked = fields.read_sampling(body, self.limits.max_new_tokens), choices.read_chat(body)

        def prompts() -> list[list[int]]:
            return [_of_field("messages", lambda: self.model.prompt_tokens(messages))] * asked.n

        return self._answers(body, prompts, options, asked)

    def completions(self, body: Json) -> Job | Stream:
        """Continue ``prompt``: a text, the ids of its tokens, or a list of either, without a template.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.COMPLETIONS, self.name)
        given = self._texts(body, "prompt")
        options, asked = fields.read_sampling(body, self.limits.max_new_tokens), choices.read_text(body, len(given))

        def prompts() -> list[list[int]]:
            ids = [self.model.completion_prompt(one) if isinstance(one, str) else one for one in given]
            return [prompt for prompt in ids for _ in range(asked.n)]

        return self._answers(body, prompts, options, asked)

    def _answers(
        self, body: Json, prompts: Callable[[], list[list[int]]], options: SamplingOptions, asked: Choices
    ) -> Job | Stream:
        """The work of answering, whole or in chunks.

        Args:
            body: of the request.
            prompts: makes them, each as often as it is answered.
            options: how.
            asked: what is given of answers.
        """
        field, model = ("messages" if asked.chat else "prompt"), self.model
        streams, tells_usage = fields.read_stream(body)

        def checked() -> list[list[int]]:
            several = prompts()
            fields.check_tokens(sum(map(len, several)), self.limits.max_request_tokens)
            return several

        def job(before_pass: BeforePass | None = None) -> Json:
            several = checked()
            answers = _of_field(field, lambda: model.continue_prompts(several, options, before_pass))
            made = [asked.choice(*numbered, model.tokenizer) for numbered in enumerate(answers)]
            usage = choices.usage(answers, len(several) // asked.n)
            return self._head(asked, asked.kind) | {"choices": made, "usage": usage} | _read_by(asked, answers[0])

        def chunks(before_pass: BeforePass) -> Generator[Json, None, Json]:
            several = checked()
            head = self._head(asked, asked.kind_of_chunk) | ({"usage": None} if tells_usage else {})
            answers: dict[int, Answer] = {}
            begun: set[int] = set()
            for part in _errors_of(field, model.stream_prompts(several, options, before_pass)):
                more: Json = {}
                if part.answer is not None:
                    answers[part.prompt] = part.answer
                    more = _read_by(asked, part.answer)
                yield head | {"choices": [asked.delta(part, part.prompt not in begun, model.tokenizer)]} | more
                begun.add(part.prompt)
            usage = choices.usage([answers[number] for number in range(len(several))], len(several) // asked.n)
            if tells_usage:
                yield head | {"choices": [], "usage": usage}
            return usage

        return Stream(chunks) if streams else job

    def _head(self, asked: Choices, kind: str) -> Json:
        prefix = "chatcmpl" if asked.chat else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _texts(self, body: Json, field: str) -> list[str | list[int]]:
        """Texts of a field, each a string or the ids of its tokens."""
        given, size = body.get(field), self.model.tokenizer.vocab_size
        texts, _ = _of_field(field, lambda: read_texts(given, size, field))
        if len(texts) > MAX_TEXTS:
            raise RequestError(f"{field} holds {len(texts)} texts; send at most {MAX_TEXTS} at a time", field)
        return texts

    def models(self) -> Json:
        """The one model that there is."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "megatron_grit"}
        return {"object": "list", "data": [entry]}


def _read_by(asked: Choices, answer: Answer) -> Json:
    """What a chat response says of its prompt and of what was read for the answer."""
    if not asked.chat:
        return {}
    prompt = {"prompt_token_ids": list(answer.prompt_token_ids)} if asked.token_ids else {}
    return prompt | ({"sources": read} if (read := sources_of(answer.readings)) else {})


def _of_field(field: str, step: Callable[[], Any]) -> Any:
    """What a step returns; what it refuses is in that field."""
    try:
        return step()
    except RequestError:
        raise
    except (DataError, ConfigError) as error:
        raise RequestError(str(error), field) from error


def _errors_of(field: str, parts: Any) -> Any:
    """Parts of an answer; what cannot be answered is in that field."""
    try:
        yield from parts
    except (DataError, ConfigError) as error:
        raise RequestError(str(error), field) from error
