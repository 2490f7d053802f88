"""A client of OpenAI's API for sampling, with what vLLM adds to it: ids of tokens."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.rollouts.records import SAMPLING, PromptGroup, SampledCompletion, read_ids, read_log_probs
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.rollouts.options import EndpointOptions, RolloutSampling
from megatron_grit.store.environment import is_loopback
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_OVERLOADED = (408, 429, 500, 502, 503, 504)
_FIRST_SECONDS = 10.0
"""To wait for the list of models, which any endpoint has at hand."""
_LONGEST_PAUSE = 60.0


class EndpointError(DataError):
    """An endpoint that does not answer, or answers something else than its API says."""


class Endpoint:
    """Samples completions. Calls may come from several threads.

    Args:
        options: whom to ask.

    Raises:
        ConfigError: no address of one.
        EndpointError: it does not answer, or is none.
    """

    def __init__(self, options: EndpointOptions) -> None:
        url = _parts(options.endpoint or "")
        if url is None or url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                f"--endpoint {options.endpoint} is no address; give the base of the API, such as "
                "http://127.0.0.1:8000/v1"
            )
        self.url, self.options = (options.endpoint or "").rstrip("/"), options
        proxies: dict[str, str] | None = {} if is_loopback(url.hostname) else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        self.model = self._find_model(options.model)

    def _find_model(self, wanted: str | None) -> str:
        listed = self._ask("/models", None, min(self.options.timeout, _FIRST_SECONDS), retries=0)
        try:
            names = [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError):
            raise self._other("/models", listed) from None
        if not names or (wanted is not None and wanted not in names):
            found = ", ".join(names) or "none"
            raise EndpointError(f"{self.url} has no model {wanted or ''}; it lists {found}; set --model")
        return wanted or names[0]

    def sample(self, group: PromptGroup, sampling: RolloutSampling, seed: int) -> PromptGroup:
        """Fill in a prompt's completions.

        Args:
            group: the prompt.
            sampling: how they are drawn.
            seed: of this prompt.

        Raises:
            EndpointError: there is no answer, or another one than was asked for.
        """
        is_chat = group.prompt is None
        body: dict[str, Any] = {"model": self.model, **group.asked, "seed": seed, "n": sampling.n}
        body |= {name: getattr(sampling, name) for name in ("max_tokens", "temperature", "top_p")}
        if sampling.token_ids:
            body |= {"return_token_ids": True, "logprobs": True if is_chat else 0}
        path = "/chat/completions" if is_chat else "/completions"
        try:
            answer = self._ask(path, body, self.options.timeout, self.options.retries)
        except EndpointError as error:
            raise group.line.error(str(error)) from None
        try:
            choices = answer["choices"]
            ids = read_ids(answer.get("prompt_token_ids", choices[0].get("prompt_token_ids")), "prompt_token_ids")
            found = [_completion(choice, is_chat) for choice in choices]
        except DataError as error:
            raise group.line.error(
                f"{self.url} answers {path} with something else than OpenAI's API: {error}"
            ) from None
        except (KeyError, TypeError, AttributeError, IndexError):
            raise group.line.error(str(self._other(path, answer))) from None
        if len(found) != sampling.n:
            remedy = f"give --n {len(found)}, or another endpoint"
            raise group.line.error(f"{self.url} gave {len(found)} completions in place of --n {sampling.n}; {remedy}")
        group.prompt_token_ids, group.completions = ids, found
        group.sampling = {name: getattr(sampling, name) for name in SAMPLING}
        return group

    def _ask(self, path: str, body: dict[str, Any] | None, seconds: float, retries: int) -> Any:
        """The JSON that it answers."""
        pause = 1.0
        for left in range(retries, -1, -1):
            try:
                return self._once(path, body, seconds)
            except urllib.error.HTTPError as error:
                with error:
                    said = _message(error.read(4096))
                problem, again = f"answers {path} with status {error.code}: {said}", error.code in _OVERLOADED
                if error.code == 404 and body is None:
                    problem += "; --endpoint is the base of the API, which mostly ends in /v1"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem, again = f"does not answer {path} ({reason or type(error).__name__})", True
                problem += "; start it, or correct --endpoint" if body is None else ""
            if not again or not left:
                raise EndpointError(f"{self.url} {problem}")
            log.warning(f"{self.url} {problem}; asking again in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def _once(self, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        with self._opener.open(request, timeout=seconds) as response:
            content = response.read()
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._other(path, content[:200].decode(errors="replace")) from None

    def _other(self, path: str, answer: Any) -> EndpointError:
        return EndpointError(
            f"{self.url} answers {path} with something else than OpenAI's API: {shortened(answer)}; correct --endpoint"
        )


def _completion(choice: dict[str, Any], is_chat: bool) -> SampledCompletion:
    text = choice["message"]["content"] if is_chat else choice["text"]
    ids, told = read_ids(choice.get("token_ids"), "token_ids"), choice.get("logprobs") or {}
    values = [entry["logprob"] for entry in told.get("content") or ()] if is_chat else told.get("token_logprobs")
    log_probs = read_log_probs(values, "logprobs") if ids is not None and values else None
    if log_probs is not None and len(log_probs) != len(ids or ()):
        raise DataError("logprobs and token_ids differ in number")
    if not isinstance(text, str):
        text = "" if text is None else str(text)
    return SampledCompletion(text=text, finish_reason=choice.get("finish_reason"), token_ids=ids, log_probs=log_probs)


def _message(content: bytes) -> str:
    """What the body of an error says."""
    text = content.decode(errors="replace")
    try:
        value = json.loads(text)
        return str(value.get("error", value).get("message", text))[:300]
    except (ValueError, AttributeError):
        return shortened(text)


def _parts(address: str) -> urllib.parse.SplitResult | None:
    """None: it cannot be asked for, whatever is there."""
    try:
        url = urllib.parse.urlsplit(address)
        url.port  # noqa: B018 - which raises where it is no number, or none of a port
    except ValueError:
        return None
    return url if address.isascii() and address.isprintable() and " " not in address else None
