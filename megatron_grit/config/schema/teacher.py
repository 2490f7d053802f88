"""A frozen model beside the one that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class TeacherConfig:
    """What a frozen model says of the labels: distillation from a larger one, or a penalty for leaving a reference."""

    kind: Literal["none", "full", "topk", "gold"] = "none"
    """full: divergence over the whole vocabulary, from a model that runs beside the trained one. topk: divergence over
    the most probable tokens that megatron-grit teacher-logits has written to loss.teacher.cache, all others as one.
    gold: log-probability of the label less the teacher's, the KL baseline of Instruction Modelling as published; its
    gradient is that of the next-token loss, so it is no divergence and only scales that loss."""
    model: str | None = knob(None, path=True)
    """For full and gold: a checkpoint or output_dir, or a Hugging Face directory or name, with the same tokenizer; it
    may have another shape. null: the base of the adapters that are trained, which takes no second model."""
    cache: str | None = knob(None, path=True)
    """For topk: the folder that teacher-logits has written for all training files."""
    weight: float = knob(1.0, at_least=0)
    """Weight of the divergence in the loss of texts and conversations."""
    label_weight: float = knob(1.0, at_least=0)
    """Weight of the next-token loss beside it. 0: only the teacher is learned from."""
    temperature: float = knob(1.0, above=0)
    """Divides the logits of both; the divergence is multiplied by its square (arXiv 1503.02531)."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || model), as in distillation. reverse: KL(model || teacher), as a penalty for leaving it."""
