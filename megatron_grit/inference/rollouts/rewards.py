"""Rewards of completions: rules on strings, math-verify, reward models, and functions of the user's.

A reward is ``[WEIGHT*]NAME[:ARGUMENT]``; that of a completion is the sum of all, each times its weight.
"""

from __future__ import annotations

import importlib
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from megatron_grit.compat import needed
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.commands import suggestion
from megatron_grit.config.values import shortened
from megatron_grit.data.rollouts.records import PromptGroup, SampledCompletion, read_reward
from megatron_grit.data.text.records import Message, parse_record
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.rollouts.options import RewardOptions

Judge = Callable[[str, list[str], PromptGroup], float]
"""Reward of a text, given what is right and the prompt."""


_MATH_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward."""

    spec: str
    """As it was given."""
    weight: float
    judge: Judge
    compares: bool
    """Whether it needs to know what is right, and looks at what the answer's tag holds only."""


class Rewards:
    """The rewards that options name.

    Args:
        options: which, and where to find what is right.

    Raises:
        ConfigError: one that there is not, or whose argument or package is missing.
    """

    def __init__(self, options: RewardOptions) -> None:
        self.options = options
        self.every = [_parse(spec) for spec in options.reward]
        tag = options.answer_tag
        self._tag = None if tag is None else re.compile(f"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", re.DOTALL)

    def add(self, group: PromptGroup) -> None:
        """Give each completion of a prompt its rewards.

        Raises:
            DataError: the prompt does not say what is right, or a function of the user's fails; names the line.
        """
        right = self._right(group) if any(reward.compares for reward in self.every) else []
        for completion in group.completions:
            completion.rewards = {reward.spec: self._of(reward, completion, right, group) for reward in self.every}
            total = sum(reward.weight * completion.rewards[reward.spec] for reward in self.every)
            try:
                completion.reward = read_reward(total, "the weighted sum of its rewards")
            except DataError as error:
                raise group.line.error(str(error)) from None

    def _of(self, reward: Reward, completion: SampledCompletion, right: list[str], group: PromptGroup) -> float:
        text = completion.text
        if reward.compares and self._tag is not None:
            found = self._tag.findall(text)
            text = found[-1] if found else ""
        try:
            return read_reward(reward.judge(text, right, group), "it")
        except DataError as error:
            raise group.line.error(f"reward {reward.spec}: {error}") from None
        except Exception as error:  # of a function of the user's
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise group.line.error(f"reward {reward.spec} failed with {said}") from error

    def _right(self, group: PromptGroup) -> list[str]:
        value = group.other.get(self.options.answer_key)
        several = value if isinstance(value, list) else [value]
        if not several or not all(map(_is_text_or_number, several)):
            raise group.line.error(
                f'says not what is right: "{self.options.answer_key}" is {shortened(value)}; give a text, or set '
                "--answer-key"
            )
        return [str(each) for each in several]


def _is_text_or_number(value: object) -> bool:
    """An empty text is none: every completion begins with it."""
    return not isinstance(value, bool) and isinstance(value, str | int | float) and bool(str(value).strip())


def _parse(spec: str) -> Reward:
    weight, star, rest = spec.partition("*")
    try:
        factor = float(weight) if star else 1.0
    except ValueError:
        factor, rest = 1.0, spec
    if not math.isfinite(factor):
        raise ConfigError(f"--reward {spec}: the weight {weight} is no finite number")
    name, _, argument = (rest if star else spec).partition(":")
    make = _MAKERS.get(name)
    if make is None:
        hint = suggestion(name, _MAKERS) or f"; there are {', '.join(_MAKERS)}"
        raise ConfigError(f"--reward {spec}: there is no reward {name!r}{hint}")
    try:
        judge = make(argument)
    except ConfigError as error:
        raise ConfigError(f"--reward {spec}: {error}") from None
    return Reward(spec=spec, weight=factor, judge=judge, compares=name in _COMPARING)


def _without_argument(judge: Judge) -> Callable[[str], Judge]:
    def make(argument: str) -> Judge:
        if argument:
            raise ConfigError("takes no argument; what is right stands in the file of prompts")
        return judge

    return make


def _exact(text: str, right: list[str], group: PromptGroup) -> float:
    return float(any(text.strip() == each.strip() for each in right))


def _contains(text: str, right: list[str], group: PromptGroup) -> float:
    return float(any(each.strip() in text for each in right))


def _starts_with(text: str, right: list[str], group: PromptGroup) -> float:
    return float(any(text.lstrip().startswith(each.strip()) for each in right))


def _regex(argument: str) -> Judge:
    if not argument:
        raise ConfigError("needs a pattern, as in regex:^[0-9]+$")
    try:
        pattern = re.compile(argument, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"is no pattern of Python's re: {error}") from None
    return lambda text, right, group: float(pattern.search(text) is not None)


def _format(argument: str) -> Judge:
    tags = [tag.strip() for tag in argument.split(",")]
    if not all(tags):
        raise ConfigError("needs tags, as in format:think,answer")
    parts = r"\s*".join(f"<{re.escape(tag)}>(?:(?!</?{re.escape(tag)}>).)*</{re.escape(tag)}>" for tag in tags)
    pattern = re.compile(rf"\s*{parts}\s*", re.DOTALL)
    return lambda text, right, group: float(pattern.fullmatch(text) is not None)


def _math_verify(argument: str) -> Judge:
    if argument:
        raise ConfigError("takes no argument; what is right stands in the file of prompts")
    with needed("needs", "math-verify", "rl"):
        from math_verify import parse, verify

    # Its time-outs are signals, which only a process's main thread can have.
    seconds = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None

    def judge(text: str, right: list[str], group: PromptGroup) -> float:
        found = parse(text, parsing_timeout=seconds)
        for each in right:  # which need not stand in dollars
            marked = each if "$" in each or "\\boxed" in each else f"${each}$"
            gold = parse(marked, parsing_timeout=seconds)
            if verify(gold, found, timeout_seconds=seconds):
                return 1.0
        return 0.0

    return judge


def _model(argument: str) -> Judge:
    if not argument:
        raise ConfigError("needs the checkpoint of a reward model, as in model:runs/train_reward")
    from megatron_grit.inference.rollouts.reward_model import RewardModel

    model = RewardModel.load(resolve_checkpoint(argument))

    def judge(text: str, right: list[str], group: PromptGroup) -> float:
        if group.messages:
            return float(model.score([[*group.messages, Message("assistant", text)]])[0])
        return float(model.score([parse_record({"prompt": group.prompt, "completion": text})])[0])

    return judge


def _python(argument: str) -> Judge:
    module, _, name = argument.partition(":")
    if not module or not name:
        raise ConfigError("needs a module and a function, as in python:my_rewards:length")
    try:
        function = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ConfigError(f"module {module} has no function {name}") from None
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"module {module} cannot be imported ({said}); PYTHONPATH says where to look") from error
    if not callable(function):
        raise ConfigError(f"{name} of {module} is no function")
    return lambda text, right, group: function(text, group.asked | group.other)


_COMPARING = ("exact", "contains", "starts_with", "math-verify")
_MAKERS: dict[str, Callable[[str], Judge]] = {
    "exact": _without_argument(_exact),
    "contains": _without_argument(_contains),
    "starts_with": _without_argument(_starts_with),
    "regex": _regex,
    "format": _format,
    "math-verify": _math_verify,
    "model": _model,
    "python": _python,
}
