"""The kinds of training rows, and which of them a run trains.

A kind is a file of the same name in each of data/kinds, losses, training/objectives and config/schema/kinds. What is
above asks for it by name here, so no list has to name it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from megatron_grit.config.checks.indexed import TEXTS_MADE_BY
from megatron_grit.config.schema import RunConfig

SECTIONS = "megatron_grit.config.schema.kinds"
SHORT_FORMS = {"unified": ("embedding", "generative")}
"""Words of ``training.objective`` that stand for several kinds."""


def add_sections() -> None:
    """Give :class:`RunConfig` the section of each kind that has one. Called again, it looks for new kinds."""
    known = {field.name: field for field in dataclasses.fields(RunConfig)}
    new = {kind: section for kind in kind_names() if (section := kind_options(kind).SECTION) and kind not in known}
    if not new:
        return
    for name, declared in known.items():  # the decorator took what was declared off the class
        setattr(RunConfig, name, _declared_again(declared))
    for kind, section in new.items():
        RunConfig.__annotations__[kind] = section
        setattr(RunConfig, kind, dataclasses.field(default_factory=section))
    for name in ("__init__", "__repr__", "__eq__", "__match_args__"):  # of the old fields
        delattr(RunConfig, name)
    dataclasses.dataclass(kw_only=True)(RunConfig)


def _declared_again(declared: dataclasses.Field[Any]) -> Any:
    """A field as it was before a decorator read it: with its default and with what options say of it (its path)."""
    if declared.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=declared.default_factory, metadata=declared.metadata)
    return dataclasses.field(default=declared.default, metadata=declared.metadata)


def kind_names() -> list[str]:
    """Every kind, in the order in which a step trains them."""
    return list(_files_in(tuple(importlib.import_module(SECTIONS).__path__)))


@functools.cache
def _files_in(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


def load_kind(package: str, kind: str) -> Any:
    """A kind's file in one of the folders that have one for each kind."""
    return importlib.import_module(f"{package}.{kind}")


def trained_kinds(config: RunConfig) -> list[str]:
    """The kinds that a run trains."""
    objective = config.training.objective
    wanted = SHORT_FORMS.get(objective, (objective,)) if isinstance(objective, str) else objective
    return [kind for kind in kind_names() if kind in wanted]


def objective_problem(config: RunConfig) -> str | None:
    """What is wrong with ``training.objective``, to follow the key; None: nothing."""
    objective, names = config.training.objective, kind_names()
    words = [*SHORT_FORMS, *names]
    if isinstance(objective, str):
        if objective in words:
            return None
    elif objective and set(objective) <= set(names) and len(set(objective)) == len(objective):
        return None
    return f"must be one of {', '.join(words)}, or a list of kinds such as [{', '.join(names)}], not {objective!r}"


def kind_options(kind: str) -> Any:
    """A kind's file in config/schema/kinds."""
    return load_kind(SECTIONS, kind)


def option(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)


def kind_sources(config: RunConfig, kind: str) -> list[str]:
    """What a run says of a kind's sources: see :mod:`~megatron_grit.config.blend`."""
    return option(config, kind_options(kind).DATA)


def made_by(key: str) -> str:
    """The command that makes the indexed files which a key names, those of a kind or ``data.valid``."""
    every = {kind_options(kind).DATA: kind_options(kind).MADE_BY for kind in kind_names()}
    return str(every.get(key, TEXTS_MADE_BY))


def kind_weight(config: RunConfig, kind: str) -> float:
    """Weight of a kind's loss in the loss of a step."""
    return option(config, kind_options(kind).WEIGHT)


def loss_name(kind: str) -> str:
    """Name of a kind's loss among the metrics of a step."""
    return kind_options(kind).METRICS[0]


def metric_names(kinds: Iterable[str]) -> list[str]:
    """Names of the metrics of several kinds, all losses first."""
    metrics = [kind_options(kind).METRICS for kind in kinds]
    return [names[0] for names in metrics] + [name for names in metrics for name in names[1:]]


def loss_words(kind: str) -> str:
    """A kind's loss in words: "next token"."""
    return kind_options(kind).LOSS.replace("_", " ")


def compares_rows(kind: str) -> bool:
    """Whether a kind's rows are embedded, and its loss compares texts of all rows of a step."""
    options = kind_options(kind)
    return bool(options.EMBEDS and options.COMPARES_ROWS)


def measured_passes(config: RunConfig, kind: str) -> int:
    """Passes of as many rows as a step's that a kind's loss makes forward alone. Most kinds make none and do not say
    so."""
    passes = getattr(kind_options(kind), "measured_passes", None)
    return 0 if passes is None else int(passes(config))


def kind_batch_size(config: RunConfig, kind: str) -> int:
    """Samples of a kind in a global batch."""
    return option(config, kind_options(kind).BATCH)


add_sections()
