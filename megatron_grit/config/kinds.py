"""The kinds of training rows, and which of them a run trains.

A kind is a file of the same name in each of data/kinds, losses, training/objectives and config/schema/kinds. What is
above asks for it by name here, so no list has to name it.
"""

from __future__ import annotations

import importlib
import pkgutil
from operator import attrgetter
from typing import Any

from megatron_grit.config.schema import RunConfig

SECTIONS = "megatron_grit.config.schema.kinds"
SHORT_FORMS = {"unified": ("embedding", "generative")}
"""Words of ``training.objective`` that stand for several kinds."""


def kind_names() -> list[str]:
    """Every kind, in the order in which a step trains them."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(SECTIONS).__path__))


def load_kind(package: str, kind: str) -> Any:
    """A kind's file in one of the folders that have one for each kind."""
    return importlib.import_module(f"{package}.{kind}")


def trained_kinds(config: RunConfig) -> list[str]:
    """The kinds that a run trains."""
    objective = config.training.objective
    wanted = SHORT_FORMS.get(objective, (objective,)) if isinstance(objective, str) else objective
    return [kind for kind in kind_names() if kind in wanted]


def kind_options(kind: str) -> Any:
    """A kind's file in config/schema/kinds."""
    return load_kind(SECTIONS, kind)


def option(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)


def kind_sources(config: RunConfig, kind: str) -> list[str]:
    """What a run says of a kind's sources: see :mod:`~megatron_grit.config.blend`."""
    return option(config, kind_options(kind).DATA)


def kind_weight(config: RunConfig, kind: str) -> float:
    """Weight of a kind's loss in the loss of a step."""
    return option(config, kind_options(kind).WEIGHT)


def kind_batch_size(config: RunConfig, kind: str) -> int:
    """Samples of a kind in a global batch."""
    return option(config, kind_options(kind).BATCH)
