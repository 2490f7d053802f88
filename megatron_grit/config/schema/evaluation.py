"""Evaluations inside a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_grit.config.knob import expand_path, knob
from megatron_grit.config.options import BatchSize, TextLength

Mode = Literal["auto", "min", "max"]

FIGURES: dict[str, tuple[str, ...] | None] = {
    "retrieval": ("ndcg_at_10", "recall_at_1", "recall_at_10"),
    "sts": ("spearman", "pearson"),
    "perplexity": ("lm_loss", "perplexity"),
    "lm": None,
}
"""Figures of each task among the metrics of a run. None: the task's data say which it has."""
_FORM = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<task>[A-Za-z_-]+):(?P<data>.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One of ``evaluation.tasks``: TASK:DATA or NAME=TASK:DATA."""

    name: str
    """Of its figures; the last part of DATA without its ending where none is given."""
    task: str
    data: str


_TEXT_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def is_text_file(data: str) -> bool:
    """Whether the data of a perplexity task are texts, and not the prefix of an indexed file."""
    return data.endswith(_TEXT_FILES)


def read_task(item: str) -> TaskSpec | None:
    """What an item of ``evaluation.tasks`` says; None: it is not of the form."""
    if (found := _FORM.fullmatch(item)) is None:
        return None
    name = found["name"] or Path(found["data"]).name.partition(".")[0]
    return TaskSpec(name=name, task=found["task"], data=found["data"])


def expand_task(item: str) -> str:
    """An item with ``~`` and ``$NAME`` of its path replaced.

    Raises:
        ConfigError: as :func:`~megatron_grit.config.knob.expand_path`.
    """
    found = _FORM.fullmatch(item)
    return expand_path(item) if found is None else item[: found.start("data")] + expand_path(found["data"])


@dataclass(kw_only=True)
class BestConfig:
    """The checkpoint that is kept because it was the best."""

    metric: str | None = None
    """Keep the checkpoint with the best value of this figure, beside the newest ones: NAME/FIGURE of evaluation.tasks,
    such as heldout/ndcg_at_10, or valid_loss. It is saved after its evaluation and named in output_dir/best.json, and
    every command takes it as --checkpoint OUTPUT_DIR/best. null: none is kept."""
    mode: Mode = "auto"
    """Whether lower (min) or higher (max) is better. auto: lower for losses and perplexities."""


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """When a run ends before its last step."""

    metric: str | None = None
    """Stop when this figure gets no better: NAME/FIGURE of evaluation.tasks, or valid_loss. null: never."""
    mode: Mode = "auto"
    """As evaluation.best.mode."""
    patience: int = knob(3, at_least=1)
    """Measurements in a row that are no better than the best one before, after which the run stops."""
    min_delta: float = knob(0.0, at_least=0)
    """A figure is better if it differs by more than this."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluations inside the run, on its own mesh."""

    every: int | None = knob(None, at_least=1)
    """Steps between evaluations; there is one after the last step too. null: only after the last step."""
    tasks: list[str] = knob([], path=expand_task)
    """What is measured: a list of TASK:DATA, or NAME=TASK:DATA to name the figures, else named after DATA.
    retrieval:FILE.jsonl are records of query and pos, retrieval:FOLDER is one of BEIR's, as megatron-grit evaluate
    --retrieval reads them; sts:FILE.csv are pairs of sentences with scores, as of --sts; perplexity:PREFIX is a
    generative indexed file, as of --generative, and perplexity:FILE.jsonl are texts, which are tokenised at the start;
    lm:NAME is a task or group of lm-eval, as of megatron-grit evaluate lm. Figures are eval/NAME/FIGURE in
    metrics.jsonl; intervals are in output_dir/evaluations."""
    max_length: int = knob(TextLength.max_length, at_least=1)
    """Longest text that is embedded, in tokens, template included."""
    batch_tokens: int = knob(BatchSize.batch_tokens, at_least=1)
    """Tokens of a forward pass of an evaluation, on each data parallel rank."""
    include_path: list[str] = knob([], path=True)
    """Folders with YAML files of tasks of lm, which count before lm-eval's."""
    limit: int | None = knob(None, at_least=1)
    """Only so many documents of each task of lm. null: all."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """Stopping before the last step."""
    best: BestConfig = field(default_factory=BestConfig)
    """The best checkpoint."""
