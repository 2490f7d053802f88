"""Options of answering questions. Light to import, for command lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, RetroOptions, SamplingOptions
from megatron_grit.data.qa.options import EncoderContexts, PromptOptions
from megatron_grit.retrieval.rag.options import AnswerLength, ContextOptions


@dataclass(kw_only=True)
class QaGeneration(EncoderContexts, PromptOptions, RetroOptions, SamplingOptions, ModelOptions):
    """What is asked, and how."""

    input: str = knob(path=True)
    """JSON or JSONL file of questions (megatron-grit build-qa --help)."""
    output: str = knob(path=True)
    """File for the answers, a line each in the order of the questions; .jsonl: {"pred": "text"}."""
    start: int = knob(0, at_least=0)
    """First question, from 0."""
    num: int | None = knob(None, at_least=1)
    """Questions that are answered. null: all from start on."""
    batch_size: int = knob(8, at_least=1)
    """Questions that are answered together. With temperature 0 answers do not depend on it, but for the last bits of
    the scores; samples do."""
    stop: list[str] = knob(["\nUser:"], verbatim=True, text=True)
    """Texts, 4 at most, before the first of which an answer ends."""
    precision: Literal["fp32", "bf16"] | None = None
    """null: that of the training run, but fp32 on a CPU."""


@dataclass(kw_only=True)
class RagEvaluation(AnswerLength, ContextOptions, ModelOptions):
    """Which questions, and where answers and scores go."""

    input: str = knob(path=True)
    """Questions with answers: JSON list, JSONL with question and answers, or SQuAD's files."""
    output: str = knob(path=True)
    """JSONL with a line for each question; OUTPUT.summary.json has the figures."""
    limit: int | None = knob(None, at_least=1)
    """Only so many questions, the first. null: all."""
