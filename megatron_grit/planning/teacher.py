"""Memory of a teacher that runs beside the trained model, computed from options and from what lies on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.config.parse import load_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LOGITS_AT_ONCE, RowWorkload
from megatron_grit.planning.parameters import count_parameters

FP32 = 4
_TEMPORARIES = 5
"""Matrices in fp32 of the logits that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class TeacherMemory:
    """Bytes of one process."""

    weights: int = 0
    """Frozen. Of a Hugging Face directory, what its files take shared out over the mesh."""
    states: int = 0
    """What is kept of a step's rows."""
    logits: int = 0
    """What a row's loss takes more."""


def teacher_memory(
    config: RunConfig, rows: list[RowWorkload], data_size: int, vocab_size: int, stage: int
) -> TeacherMemory:
    """What ``loss.teacher`` adds.

    Args:
        config: the run.
        rows: of the kinds whose next tokens are predicted.
        data_size: data parallel size.
        vocab_size: of both models before padding.
        stage: pipeline stage.
    """
    knobs, parallel = config.loss.teacher, config.parallel
    if knobs.kind == "none":
        return TeacherMemory()
    size = 2 if config.training.precision == "bf16" else FP32
    weights, width = 0, config.model.hidden_size
    if knobs.kind != "topk" and knobs.model is not None:
        taught = teacher_run(config)
        if taught is None:
            weights = _bytes_of_files(Path(knobs.model)) * size // 2 // (parallel.tensor * parallel.pipeline)
        else:
            width = taught.model.hidden_size
            weights = count_parameters(taught, vocab_size, stage).rank * size
    if stage < parallel.pipeline - 1:
        return TeacherMemory(weights=weights)
    shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    kept = {"full": width * size // shards, "gold": FP32, "topk": 0}[knobs.kind]
    states = sum(ceil(each.rows / data_size) * each.row_tokens * kept for each in rows)
    logits = 0
    if knobs.kind != "gold":
        elements = max((each.row_labels for each in rows), default=0) * vocab_size // parallel.tensor
        copies = 1 + (knobs.kind == "full") + (size == FP32)  # the gradient, the teacher's, the engine's own
        logits = elements * copies * size + min(elements, LOGITS_AT_ONCE) * _TEMPORARIES * FP32
    return TeacherMemory(weights=weights, states=states, logits=logits)


def teacher_run(config: RunConfig) -> RunConfig | None:
    """The run, if its model were the teacher that runs beside it. None: no model does, or it is a Hugging Face
    directory, whose shape is not looked at here."""
    knobs = config.loss.teacher
    if knobs.kind not in ("full", "gold"):
        return None
    if knobs.model is None:
        return config
    if not holds_checkpoint(knobs.model):
        return None
    shape = load_config(resolve_checkpoint(knobs.model) / "config.yaml").model
    return replace(config, model=replace(shape, vocab_multiple=config.model.vocab_multiple))


def _bytes_of_files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
