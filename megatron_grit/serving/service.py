"""The endpoints without HTTP: a request's body to a response's."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable
from typing import Any

from megatron_grit.config.knob import value_problem
from megatron_grit.config.options import EmbeddingOptions, ServingLimits
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.messages import read_messages, read_texts
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.reading import sources_of
from megatron_grit.serving import choices, fields
from megatron_grit.serving.fields import Json, RequestError, check_fields, read_value

Job = Callable[..., Json]
"""The work that remains once a body is checked. It takes what is called before each forward pass."""

MAX_TEXTS = 2048


class Service:
    """The endpoints: each checks the body of a request and returns the remaining work as a function.

    Args:
        model: the loaded model.
        name: what it is called in requests and responses.
        max_length: longest text to embed, in tokens, instruction included; the rest is cut off.
        max_new_tokens: largest ``max_tokens`` of an answer, and its default.

    Raises:
        ConfigError: a length is out of its range.
    """

    def __init__(
        self,
        model: GritModel,
        name: str,
        *,
        max_length: int = ServingLimits.max_length,
        max_new_tokens: int = ServingLimits.max_new_tokens,
    ) -> None:
        ServingLimits(max_length=max_length, max_new_tokens=max_new_tokens)
        self.model, self.name, self.max_length, self.max_new_tokens = model, name, max_length, max_new_tokens
        self.created = int(time.time())

    def embeddings(self, body: Json) -> Job:
        """Embed ``input``: a text, its tokens' ids, or a list of either.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.EMBEDDINGS, self.name)
        given = body.get("input")
        texts, _ = _of_field("input", lambda: read_texts(given, self.model.tokenizer.vocab_size, "input"))
        if len(texts) > MAX_TEXTS:
            raise RequestError(f"input holds {len(texts)} texts; send at most {MAX_TEXTS} at a time", "input")
        instruction = body.get("instruction", EmbeddingOptions.instruction)  # null: the bare text
        if (problem := value_problem(EmbeddingOptions, "instruction", instruction)) is not None:
            raise RequestError(f"instruction {problem}", "instruction")
        options = EmbeddingOptions(
            instruction=instruction,
            side=read_value(body, "side", EmbeddingOptions),
            dimensions=read_value(body, "dimensions", EmbeddingOptions),
            max_length=self.max_length,
        )
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise RequestError("encoding_format must be float or base64", "encoding_format")

        def job(before_pass: Callable[[], None] | None = None) -> Json:
            vectors, num_tokens = self.model.embed(texts, options, progress=False, before_pass=before_pass)
            rows = vectors.tolist()
            if encoding == "base64":
                rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            return {"object": "list", "data": data, "model": self.name, "usage": usage}

        return job

    def chat(self, body: Json) -> Job:
        """Answer the conversation ``messages``.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.CHAT, self.name)
        given = body.get("messages")
        messages = _of_field("messages", lambda: read_messages(None if isinstance(given, str) else given))
        options, asked = fields.read_sampling(body, self.max_new_tokens), choices.read_chat(body)

        def job(before_pass: Callable[[], None] | None = None) -> Json:
            answers = _of_field("messages", lambda: self.model.answer([messages] * asked.n, options, before_pass))
            made = [asked.chat_choice(*numbered, self.model.tokenizer) for numbered in enumerate(answers)]
            prompt = {"prompt_token_ids": list(answers[0].prompt_token_ids)} if asked.token_ids else {}
            sources = {"sources": read} if (read := sources_of(answers[0].readings)) else {}
            return self._response("chatcmpl", "chat.completion", made, choices.usage(answers, 1)) | prompt | sources

        return job

    def completions(self, body: Json) -> Job:
        """Continue ``prompt``: a text, the ids of its tokens, or a list of either, without a template.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        check_fields(body, fields.COMPLETIONS, self.name)
        model, given = self.model, body.get("prompt")
        prompts, _ = _of_field("prompt", lambda: read_texts(given, model.tokenizer.vocab_size, "prompt"))
        options, asked = fields.read_sampling(body, self.max_new_tokens), choices.read_text(body, len(prompts))

        def job(before_pass: Callable[[], None] | None = None) -> Json:
            ids = [model.completion_prompt(one) if isinstance(one, str) else one for one in prompts]
            several = [prompt for prompt in ids for _ in range(asked.n)]
            answers = _of_field("prompt", lambda: model.continue_prompts(several, options, before_pass))
            made = [asked.text_choice(*numbered, model.tokenizer) for numbered in enumerate(answers)]
            return self._response("cmpl", "text_completion", made, choices.usage(answers, len(prompts)))

        return job

    def _response(self, prefix: str, kind: str, made: list[Json], used: Json) -> Json:
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return head | {"model": self.name, "choices": made, "usage": used}

    def models(self) -> Json:
        """The one model that there is."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "megatron_grit"}
        return {"object": "list", "data": [entry]}


def _of_field(field: str, step: Callable[[], Any]) -> Any:
    """What a step returns; what it refuses is in that field."""
    try:
        return step()
    except (DataError, ConfigError) as error:
        raise RequestError(str(error), field) from error
