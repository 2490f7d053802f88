"""Every option of every verb against values that are none: one line with its name and its range."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from pathlib import Path

import pytest

from megatron_grit.config.checks.ranges import range_problems
from megatron_grit.config.commands import Option, options_of
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.knob import may_be_empty, range_text
from megatron_grit.config.options import (
    AllNliChoice,
    CacheUse,
    EmbeddingOptions,
    MsMarcoNegatives,
    RetroOptions,
    SamplingOptions,
    ServingLimits,
    ShownRecords,
    TokenizerTraining,
)
from megatron_grit.config.parse import TrainSwitches, run_options
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.values import takes_null
from megatron_grit.convert.conversion import ConvertOptions
from megatron_grit.data.builders.block_build import BuildRun
from megatron_grit.data.builders.options import DocumentFileOptions, GritOptions
from megatron_grit.data.builders.record_encoder import EncoderOptions, Limits
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import ConfigError
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.retrieval.stages.preparation import Preparation
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
        texts += ["2", "nan", "perhaps"]
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
            assert len(limits) == 1 or option.field.name in ANY_FINITE, f"{option.shown}: knob(..., at_least=...)"


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


NEEDED: dict[type, dict[str, typing.Any]] = {
    EncoderOptions: {"kind": RowKind.GENERATIVE, "tokenizer": "t"},
    GritOptions: {"input": ["a"], "output_prefix": "b", "tokenizer": "t"},
    DocumentFileOptions: {"input": ["a"], "output_prefix": "b", "tokenizer_model": "t"},
    ConvertOptions: {"source": "a", "target": "b"},
    TokenizerTraining: {"vocab_size": 300},
}
CHECKED = [EmbeddingOptions, SamplingOptions, ServingLimits, EmbedderOptions, RetroOptions, Limits, BuildRun, *NEEDED]
CHECKED += [AllNliChoice, CacheUse, MsMarcoNegatives, ShownRecords]


@pytest.mark.parametrize("cls", CHECKED)
def test_options_that_a_program_makes_are_checked_alike(cls: type) -> None:
    needed = NEEDED.get(cls, {})
    for option in options_of(cls).values():
        if option.key not in {field.name for field in dataclasses.fields(cls)}:
            continue  # of a dataclass in it, which is looked at by itself
        parts, values = parts_of(option), [{"a": 1}, object(), b"a", math.nan, math.inf, -math.inf]
        values += [-1, 10**20, True, "nan", "", [1.0]] if int in parts else []
        values += [10**400, True, "nan", "", *[-1] * (option.key not in ANY_FINITE)] if float in parts else []
        values += [5] * (str in parts) + ["\ud800"] * bool(option.field.metadata.get("text"))
        values += [] if type(None) in parts else [None]
        for value in values:
            with pytest.raises(ConfigError) as caught:
                cls(**(needed | {option.key: value}))
            told = str(caught.value)
            assert told.startswith(f"{option.key} ") and "\n" not in told and len(told) < 200, told


@pytest.mark.parametrize("option", options_of(RetroDbConfig).values(), ids=lambda option: option.key)
def test_settings_of_a_database_that_a_program_gives_are_checked_alike(option: Option) -> None:
    if not (parts := parts_of(option)) & {int, float}:
        return
    for value in (math.nan, math.inf, -math.inf, 10**400, True, "3", "", [1], {}, *([1.5] if int in parts else [])):
        with pytest.raises(ConfigError) as caught:
            Preparation(Path("nowhere"), "db-build", {option.key: value})
        assert str(caught.value).startswith(f"{option.key} must ") and "\n" not in str(caught.value)


def functions() -> list[tuple[str, typing.Callable[[typing.Any], object]]]:
    """Functions of a program's own with a number each."""
    from megatron_grit.convert.hf_in.convert import convert_checkpoint
    from megatron_grit.convert.hf_out.convert import parse_size
    from megatron_grit.data.builders.sources.allnli import convert_allnli
    from megatron_grit.data.builders.sources.msmarco import convert_msmarco
    from megatron_grit.data.indexed.inspection import describe_records
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    return [
        ("vocab_size", lambda value: convert_checkpoint("a", "b", vocab_size=value)),
        ("max_shard_size", lambda value: parse_size(value)),
        ("seed", lambda value: convert_allnli("a", "b", seed=value)),
        ("margin", lambda value: convert_msmarco("a", "b", "c", "d", margin=value)),
        ("per_system", lambda value: convert_msmarco("a", "b", "c", "d", per_system=value)),
        ("start", lambda value: list(describe_records("a", start=value))),
        ("show", lambda value: list(describe_records("a", count=value))),
        ("vocab_size", lambda value: train_sentencepiece(["a"], "b", value)),
        ("character_coverage", lambda value: train_sentencepiece(["a"], "b", 300, character_coverage=value)),
        ("max_text_chars", lambda value: train_sentencepiece(["a"], "b", 300, max_text_chars=value)),
        ("validate", lambda value: Preparation(Path("nowhere"), "db-build", {}, validate=value)),
    ]


def test_numbers_that_a_program_gives_are_checked_before_a_file_is_read() -> None:
    for name, call in functions():
        for value in (math.nan, math.inf, -math.inf, 10**400, True, "x", "", [1], {}):
            with pytest.raises(ConfigError) as caught:
                call(value)
            assert str(caught.value).startswith(f"{name} ") and len(str(caught.value).splitlines()) == 1
