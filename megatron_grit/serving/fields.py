"""Fields of a request's body: each is done, changes no answer, or is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_grit.config.commands import suggestion
from megatron_grit.config.knob import value_problem
from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import parse_json
from megatron_grit.errors import DataError

Json = dict[str, Any]

EMBEDDINGS = {"input", "model", "instruction", "side", "dimensions", "encoding_format"}
"""What ``/v1/embeddings`` does."""
RERANK = {"query", "documents", "model", "top_n", "return_documents", "method", "instruction"}
"""What ``/v1/rerank`` does."""
_SAMPLING = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "stop",
    "n",
    "logprobs",
    "return_token_ids",
    "stream",
    "stream_options",
}
CHAT = _SAMPLING | {"messages", "max_completion_tokens"}
"""What ``/v1/chat/completions`` does."""
COMPLETIONS = _SAMPLING | {"prompt"}
"""What ``/v1/completions`` does."""
MAX_CHOICES = 128
"""Answers to one request."""
HARMLESS = {
    *("user", "metadata", "safety_identifier", "service_tier", "prediction", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
"""Fields that change no answer here, whatever they hold: parallel_tool_calls without tools, prediction (for speed)."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields of OpenAI's API that are not done, with the values that ask for nothing; null does too."""


class RequestError(DataError):
    """A request that cannot be used.

    Args:
        message: what is wrong and what to do about it.
        field: of the body.
        status: of the response.
        code: of the error in it.
    """

    def __init__(self, message: str, field: str | None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


def read_body(content: bytes) -> Json:
    """The object that a body holds.

    Raises:
        RequestError: it holds none.
    """
    try:
        value = parse_json(content)
    except DataError as error:
        raise RequestError(f"the body is no request: {error}", None) from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", None)
    return value


def check_fields(body: Json, done: set[str], name: str) -> None:
    """Refuse what would change an answer and is not done, and another model than ``name``.

    Raises:
        RequestError: names the field.
    """
    for field, value in body.items():
        if value is None or field in done or field in HARMLESS:
            continue
        if field not in NEUTRAL:
            raise RequestError(f"unknown field {field[:80]}{suggestion(field, done)}", field)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[field]):
            allowed = "".join(f", or give {shortened(one)}" for one in NEUTRAL[field][:1])
            raise RequestError(f"{field} {shortened(value)} is not supported; leave it out{allowed}", field)
    model = body.get("model")
    if model is not None and model != name:
        message = f"there is no model {shortened(model)} here, but {name!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def read_value(body: Json, field: str, cls: type, name: str | None = None) -> Any:
    """The value of a field that is an option of ``cls``, there called ``name``; the option's default where it is null.

    Raises:
        RequestError: it is of another type, or out of its range.
    """
    value = body.get(field)
    if value is None:
        return getattr(cls, name or field)
    if (problem := value_problem(cls, name or field, value)) is not None:
        raise RequestError(f"{field} {problem}", field)
    return value


def read_sampling(body: Json, most_new_tokens: int) -> SamplingOptions:
    """How the answer to a chat request is drawn.

    Args:
        body: the request.
        most_new_tokens: longest answer, and the default.

    Raises:
        RequestError: names the field.
    """
    lengths = {field: body[field] for field in ("max_tokens", "max_completion_tokens") if body.get(field) is not None}
    for field in lengths:
        if read_value(body, field, SamplingOptions, "max_new_tokens") > most_new_tokens:
            message = f"{field} must be at least 1 and at most {most_new_tokens}, not {lengths[field]}"
            raise RequestError(message, field)
    if len(set(lengths.values())) > 1:
        raise RequestError("max_tokens and max_completion_tokens are two names of one limit; give one", "max_tokens")
    drawn = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    values = {field: read_value(body, field, SamplingOptions) for field in drawn}
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (problem := value_problem(SamplingOptions, "stop", stop)) is not None:
        raise RequestError(f"stop {problem}", "stop")
    return SamplingOptions(max_new_tokens=min([most_new_tokens, *lengths.values()]), stop=stop, **values)


def read_number(body: Json, field: str, least: int, most: int, default: int) -> int:
    """A whole number of a request; the default where it is null.

    Raises:
        RequestError: it is none, or out of range.
    """
    value = body.get(field)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        between = f"at least {least} and at most {most}" if most > least else str(least)
        raise RequestError(f"{field} must be {between}, not {shortened(value)}", field)
    return value


def check_tokens(num_tokens: int, most: int) -> None:
    """Refuse a request with more tokens to read than one may have.

    Raises:
        RequestError: it has, with status 413.
    """
    if num_tokens > most:
        message = f"the request has {num_tokens} tokens to read, and may have {most}; send less at a time"
        raise RequestError(message, None, status=413, code="request_too_large")


def read_switch(body: Json, field: str) -> bool:
    """Whether a request asks for something.

    Raises:
        RequestError: it is neither true nor false.
    """
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{field} must be true or false, not {shortened(value)}", field)
    return bool(value)


def read_stream(body: Json) -> tuple[bool, bool]:
    """Whether a request wants its answer in chunks, and whether another one with the usage.

    Raises:
        RequestError: names the field.
    """
    streams, options = read_switch(body, "stream"), body.get("stream_options")
    if options is None:
        return streams, False
    if not streams:
        raise RequestError("stream_options is of stream, which is not true", "stream_options")
    # Obfuscation pads chunks against those who watch their sizes; none is done, so false asks for nothing.
    known = isinstance(options, dict) and options.keys() <= {"include_usage", "include_obfuscation"}
    if not known or options.get("include_obfuscation"):
        raise RequestError(
            f'stream_options must be {{"include_usage": true or false}}, not {shortened(options)}', "stream_options"
        )
    return True, read_switch(options, "include_usage")


def error_body(error: Exception, status: int) -> Mapping[str, Any]:
    """The response to what failed, in the form of OpenAI's API."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    field, code = getattr(error, "field", None), getattr(error, "code", None)
    return {"error": {"message": str(error), "type": kind, "param": field, "code": code}}
