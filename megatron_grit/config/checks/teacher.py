"""What contradicts itself in ``loss.teacher``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.kinds import kind_options, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.store.hub import is_hub_name

_KEY = "loss.teacher"
_USED: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("model", "weight", "label_weight", "temperature", "direction"),
    "topk": ("cache", "weight", "label_weight", "temperature", "direction"),
    "gold": ("model", "weight", "label_weight"),
}
"""Options that each kind looks at."""


def teacher_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems that the configuration alone shows."""
    knobs, fresh = config.loss.teacher, TeacherConfig()
    for name, value in vars(knobs).items():
        if name != "kind" and name not in _USED[knobs.kind] and value != getattr(fresh, name):
            yield Problem(f"{_KEY}.{name}", f"{_KEY}.{name} has no effect with {_KEY}.kind {knobs.kind}")
    if knobs.kind == "none":
        return
    if all(kind_options(kind).EMBEDS for kind in trained_kinds(config)):
        objective = config.training.objective
        yield Problem(
            f"{_KEY}.kind",
            f"{_KEY} adds to the loss of next tokens, which training.objective {objective} does not train",
        )
    if not knobs.weight:
        yield Problem(f"{_KEY}.weight", f"{_KEY}.weight 0 leaves the teacher out; set {_KEY}.kind to none")
    if knobs.kind == "topk":
        yield from _cache_problems(config)
    elif knobs.model is None:
        yield from _base_problems(config)
    elif config.model.retro.num_neighbors:
        yield Problem(
            f"{_KEY}.model",
            f"{_KEY}.model does not go with model.retro: it would not read what the trained model reads; train "
            f"adapters without {_KEY}.model, whose base reads as they do",
        )


def _cache_problems(config: RunConfig) -> Iterator[Problem]:
    if config.loss.teacher.cache is None:
        yield Problem(f"{_KEY}.cache", f"{_KEY}.kind topk needs {_KEY}.cache: a folder of megatron-grit teacher-logits")
    if config.data.over_long == "split":
        yield Problem(
            "data.over_long",
            f"data.over_long split does not go with {_KEY}.kind topk: the teacher has read the whole record, and a "
            "piece begins within it; use stop, drop or truncate",
        )


def _base_problems(config: RunConfig) -> Iterator[Problem]:
    knobs = config.loss.teacher
    if config.adapter.kind == "none":
        yield Problem(
            f"{_KEY}.model",
            f"{_KEY}.kind {knobs.kind} needs {_KEY}.model; without it the teacher is the base of adapters, and "
            "adapter.kind is none",
        )
    elif config.training.trainable:
        yield Problem(
            "training.trainable",
            f"training.trainable changes the base, which is the teacher where {_KEY}.model is not set; set it, or "
            "train adapters alone",
        )


def teacher_file_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of what it names on disk."""
    knobs = config.loss.teacher
    model = knobs.model if knobs.kind in ("full", "gold") else None
    if model is not None and not Path(model).is_dir() and not is_hub_name(model):
        yield Problem(f"{_KEY}.model", f"{_KEY}.model: there is no directory {model}")
    if knobs.kind == "topk" and knobs.cache is not None and not Path(knobs.cache).is_dir():
        yield Problem(
            f"{_KEY}.cache",
            f"{_KEY}.cache: there is no directory {knobs.cache}; make it with megatron-grit teacher-logits",
        )
