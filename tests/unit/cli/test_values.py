"""Every option of every verb against values that are none: one line with its name and its range."""

from __future__ import annotations

import functools
import math
import typing

import pytest

from megatron_grit.config.checks.ranges import range_problems
from megatron_grit.config.commands import Option, options_of
from megatron_grit.config.knob import may_be_empty, range_text
from megatron_grit.config.options import EmbeddingOptions, SamplingOptions, ServingLimits
from megatron_grit.config.parse import TrainSwitches, run_options
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.values import takes_null
from megatron_grit.errors import ConfigError
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from tests.unit.cli.test_help import VERBS, options_class

NO_NUMBERS = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "",
    " ",
    "x",
    "1,5",
    "true",
    "0b11",
    "9" * 5000,
    "{}",
    "1:30",
    "\ud800",
]
NO_INTEGERS = ["1.5", "1e3", str(10**19), str(-(10**19)), str(2**63), "0x" + "f" * 5000]
ANY_FINITE = {"margin", "teacher_gap", "cross_margin"}
"""Numbers that may be negative, of any size."""


def parts_of(option: Option) -> set[typing.Any]:
    """The types that a value may have; those of items, of a list."""
    found = {option.hint, *typing.get_args(option.hint)}
    return found | {part for hint in list(found) for part in typing.get_args(hint)}


def bad_texts(option: Option) -> list[str]:
    """Texts that are no value of an option."""
    parts, facts, texts = parts_of(option), option.field.metadata, []
    if "read" in facts:
        return [*NO_NUMBERS, "-1", "5", "null"]
    if parts & {int, float}:
        texts += NO_NUMBERS + (NO_INTEGERS if int in parts else [])
        texts += [str(facts[name]) for name in ("above", "below") if name in facts]
        texts += [str(facts["at_least"] - 1)] if "at_least" in facts else []
        texts += [str(facts["at_most"] + 1)] if "at_most" in facts else []
    elif bool in parts:
        texts += ["2", "nan", "perhaps", "null"]
    elif any(isinstance(part, str) for part in parts):  # words of a Literal
        texts += ["", "nowhere", "-1", "nan", "\0", "[]"]
    else:
        texts += [] if may_be_empty(option.field) else [""]
        texts += ["a\0b"] if facts.get("path") else []
    return texts + ([] if takes_null(option.hint) or str in parts else ["null"])


def problem(option: Option, text: str) -> str:
    """How a value is refused; empty where it is taken."""
    try:
        option.check(option.read([text]))
    except ConfigError as error:
        return str(error)
    return ""


def every_option(monkeypatch: pytest.MonkeyPatch, verb: str) -> dict[str, Option]:
    return (
        options_of(TrainSwitches) | run_options() if verb == "train" else options_of(options_class(verb, monkeypatch))
    )


@pytest.mark.parametrize("verb", ["train", *VERBS])
def test_every_bad_value_is_one_line(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    for option in every_option(monkeypatch, verb).values():
        for text in bad_texts(option):
            told = problem(option, text)
            assert told, f"{option.shown} takes {text[:40]!r}"
            assert told.startswith(option.shown) and "\n" not in told and len(told) < 400, told
            if range_text(option.field):
                assert range_text(option.field) in told or "must be a finite number" in told, told
            count += 1
    assert count


@pytest.mark.parametrize("verb", ["train", *VERBS])
def test_every_number_has_a_range(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in every_option(monkeypatch, verb).values():
        if parts_of(option) & {int, float} and "read" not in option.field.metadata:
            limits = {"at_least", "above"} & option.field.metadata.keys()
            assert len(limits) == (option.field.name not in ANY_FINITE), f"{option.shown}: knob(..., at_least=...)"


def test_a_run_that_a_program_makes_is_checked_alike() -> None:
    """What no command line has read: types, ranges and empty texts of every key."""
    for key, option in run_options().items():
        sections, _, name = key.rpartition(".")
        values: list[typing.Any] = [math.nan, math.inf, {"a": 1}, object()]
        values += [] if type(None) in parts_of(option) else [None]
        values += [True] if bool not in parts_of(option) else [1]
        values += ["", "\0"] if int in parts_of(option) or bool in parts_of(option) else []
        values += [""] if str in parts_of(option) and not may_be_empty(option.field) else []
        for value in values:
            config = RunConfig()
            setattr(functools.reduce(getattr, filter(None, sections.split(".")), config), name, value)
            told = [problem.message for problem in range_problems(config) if problem.key == key]
            assert told and told[0].startswith(f"{key} must ") and "\n" not in told[0], (key, value)


@pytest.mark.parametrize("cls", [EmbeddingOptions, SamplingOptions, ServingLimits, EmbedderOptions])
def test_options_that_a_program_makes_are_checked_alike(cls: type) -> None:
    for option in options_of(cls).values():
        parts, values = parts_of(option), [{"a": 1}, object(), b"a", math.nan, math.inf, -math.inf]
        values += [-1, 10**20, True, "nan", "", [1.0]] if int in parts else []
        values += [-1, 10**400, True, "nan", ""] if float in parts else []
        values += [5, "\ud800"] if str in parts else []
        values += [] if type(None) in parts else [None]
        for value in values:
            with pytest.raises(ConfigError) as caught:
                cls(**{option.key: value})
            told = str(caught.value)
            assert told.startswith(f"{option.key} ") and "\n" not in told and len(told) < 200, told
