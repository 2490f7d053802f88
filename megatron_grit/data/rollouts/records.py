"""Lines of sampled completions: one line a prompt, with all completions of it, which are a group.

    {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "prompt_token_ids": [1, 9, 3],
     "completions": [{"text": "4", "token_ids": [7, 2], "logprobs": [-0.1, -0.02], "finish_reason": "stop",
                      "reward": 1.0}, ...]}

``prompt``, a text without a template, may stand in place of ``messages``. What else a line holds, such as ``answer``,
is for rewards. Of a completion only ``text`` has to be there, and ``reward`` to train on it; it may be a text itself.
``temperature`` and ``top_p`` of the line are those that were sampled with; training takes them to be 1.
``token_ids`` are those that were sampled, the end of the turn included, and ``logprobs`` their log-probabilities under
the model that sampled them, at temperature 1.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.data.text.records import Message, check_text, read_messages
from megatron_grit.errors import DataError

SAMPLING = ("temperature", "top_p")
"""Keys of a line that say how its completions were sampled."""
_OWN = ("prompt", "messages", "prompt_token_ids", "completions", *SAMPLING)
_LEAST_LOG_PROB = -80.0
"""Nothing is sampled at less; a ratio to it may be more than fp32 holds, which is e^88. Samplers that cannot write
-infinity write a number such as -9999."""


@dataclass(kw_only=True)
class SampledCompletion:
    """What a model said to a prompt."""

    text: str
    finish_reason: str | None = None
    """stop, length, or what else the sampler said."""
    token_ids: list[int] | None = None
    log_probs: list[float] | None = None
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    """Each reward before they were weighed and added up."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a line; what is not known is left out."""
        values = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "logprobs": self.log_probs,
            "reward": self.reward,
            "rewards": self.rewards or None,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class PromptGroup:
    """A prompt and its completions, none where it is still to be answered."""

    line: Line
    """Where it was read."""
    prompt: str | None = None
    messages: list[Message] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    """``prompt`` or ``messages`` as they were given."""
    prompt_token_ids: list[int] | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    """``temperature`` and ``top_p`` of the completions, as far as they are known."""
    completions: list[SampledCompletion] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)
    """What else the line holds."""

    @property
    def is_tempered(self) -> bool:
        """Whether the completions are known to be no samples of the model's own distribution, that of temperature 1."""
        return any(value != 1 for value in self.sampling.values())

    def to_json(self) -> dict[str, Any]:
        """As a line of JSON holds it."""
        ids = {} if self.prompt_token_ids is None else {"prompt_token_ids": self.prompt_token_ids}
        return (
            self.asked
            | self.other
            | ids
            | self.sampling
            | {"completions": [each.to_json() for each in self.completions]}
        )


def read_groups(path: str | Path, *, answered: bool) -> Iterator[PromptGroup]:
    """Prompts of a file, with their completions.

    Args:
        path: JSONL, plain, ``.gz`` or ``.zst``.
        answered: whether each has to have completions; if not, those that are there are ignored.

    Raises:
        DataError: a line that is none, with file and line; or a file without one.
    """
    empty = True
    for line in filled_lines(path):
        empty = False
        value = line.value()
        try:
            yield _group(line, value, answered)
        except DataError as error:
            raise line.error(str(error)) from None
    if empty:
        raise DataError("holds no prompt; give one a line", path=Path(path))


def _group(line: Line, value: Any, answered: bool) -> PromptGroup:
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {shortened(value)}")
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) != 1:
        raise DataError('needs "prompt", a text, or "messages", a conversation that ends with the user')
    group = PromptGroup(
        line=line,
        asked={given[0]: value[given[0]]},
        other={name: held for name, held in value.items() if name not in _OWN},
    )
    if given == ["prompt"]:
        group.prompt = check_text(value["prompt"], "prompt")
    else:
        group.messages = read_messages(value["messages"], all_keys=True)
        if not group.messages or group.messages[-1].role == "assistant":
            raise DataError('"messages" must end with the user, or a tool')
    if not answered:
        return group
    completions = value.get("completions")
    if not isinstance(completions, list) or not completions:
        raise DataError('needs "completions", a list of what a model said to the prompt')
    group.prompt_token_ids = read_ids(value.get("prompt_token_ids"), "prompt_token_ids")
    group.sampling = {name: _positive(value[name], name) for name in SAMPLING if value.get(name) is not None}
    group.completions = [_completion(each, f"completion {number}") for number, each in enumerate(completions, 1)]
    return group


def _completion(value: Any, name: str) -> SampledCompletion:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"{name} must be a text or an object with one, not {shortened(value)}")
    ids, log_probs = (
        read_ids(value.get("token_ids"), f"{name}: token_ids"),
        read_log_probs(value.get("logprobs"), f"{name}: logprobs"),
    )
    if log_probs is not None and len(log_probs) != (size := len(ids or ())):
        raise DataError(f"{name} has {len(log_probs)} logprobs for {size} token_ids; there must be one of each")
    reward, reason = value.get("reward"), value.get("finish_reason")
    return SampledCompletion(
        text=check_text(value.get("text"), f"{name}: text"),
        finish_reason=reason if isinstance(reason, str) else None,
        token_ids=ids,
        log_probs=log_probs,
        reward=None if reward is None else read_reward(reward, f"{name}: reward"),
    )


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise DataError(f"{name} must be that of the completions, a number, not {shortened(value)}")
    return float(value)


def read_reward(value: Any, name: str) -> float:
    """A reward as a number.

    Raises:
        DataError: it is none, or not finite.
    """
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise DataError(f"{name} must be a number, not {shortened(value)}")
    return float(value)


def read_ids(value: Any, name: str) -> list[int] | None:
    """Ids of tokens. None: there are none.

    Raises:
        DataError: something else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise DataError(f"{name} must be a list of ids, not {shortened(value)}")
    return value


def read_log_probs(value: Any, name: str) -> list[float] | None:
    """Log-probabilities of tokens. None: there are none.

    Raises:
        DataError: something else.
    """
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"{name} must be a list of numbers, not {shortened(value)}")
    for place, each in enumerate(value):
        if isinstance(each, bool) or not isinstance(each, numbers.Real) or not each <= 1e-3:
            raise DataError(
                f"{name}: number {place} is {shortened(each)}; a log-probability is a number and at most 0. Where some "
                "are not known, leave logprobs out"
            )
        if each < _LEAST_LOG_PROB:
            raise DataError(
                f"{name}: number {place} is {shortened(each)}; no token is sampled at less than {_LEAST_LOG_PROB:g}, "
                "so it stands for one that is not known. Leave logprobs out"
            )
    return [min(float(each), 0.0) for each in value]
