"""What tokens are compared with, by kind of ``loss.teacher``.

Shape suffix legend: T = tokens of a row that a context parallel rank holds, L = some of them, D = width of the teacher,
V = the part of the vocabulary that a rank holds, K = the teacher's most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.losses.divergence import Divergence, bucket_divergence, full_divergence
from megatron_grit.parallel.context import ParallelContext


def divergence_options(config: TeacherConfig, context: ParallelContext, width: int) -> Divergence:
    """The divergence that a configuration asks for.

    Args:
        config: the section.
        context: this process's place in the mesh.
        width: V.
    """
    return Divergence(
        is_reverse=config.direction == "reverse",
        temperature=config.temperature,
        group=context.tensor_group if context.tensor_size > 1 else None,
        first_id=context.tensor_rank * width,
    )


@dataclass(frozen=True, kw_only=True)
class FullTarget:
    """The teacher's final states; its logits are computed of the labels alone, when they are needed."""

    states_T1D: Tensor
    """Of the tokens that this rank holds; under sequence parallelism of its part of them."""
    logits: Callable[[Tensor], Tensor]
    """Makes [L, V] of [L, 1, D]."""
    config: TeacherConfig
    context: ParallelContext

    def take(self, index_L: Tensor) -> FullTarget:
        """The states are already those of the rank."""
        return self

    def divergence(self, logits_LV: Tensor, losses_L: Tensor, index_L: Tensor | None) -> Tensor:
        """Over the whole vocabulary."""
        with torch.no_grad():
            teacher_LV = self.logits(self.states_T1D if index_L is None else self.states_T1D[index_L])
        options = divergence_options(self.config, self.context, logits_LV.shape[1])
        return full_divergence(logits_LV, teacher_LV, options).float()


@dataclass(frozen=True, kw_only=True)
class TopTarget:
    """The teacher's most probable tokens."""

    ids_TK: Tensor
    """int32; -1 where the teacher predicts nothing."""
    log_probs_TK1: Tensor
    """float32; the last is that of all other tokens."""
    config: TeacherConfig
    context: ParallelContext

    def take(self, index_L: Tensor) -> TopTarget:
        """As :class:`~megatron_grit.data.rows.batch.TeacherTarget`."""
        return replace(self, ids_TK=self.ids_TK[index_L], log_probs_TK1=self.log_probs_TK1[index_L])

    def divergence(self, logits_LV: Tensor, losses_L: Tensor, index_L: Tensor | None) -> Tensor:
        """Over these tokens, and all others as one."""
        held = self if index_L is None else self.take(index_L)
        options = divergence_options(self.config, self.context, logits_LV.shape[1])
        return bucket_divergence(logits_LV, held.ids_TK.long(), held.log_probs_TK1, options).float()


@dataclass(frozen=True, kw_only=True)
class GoldTarget:
    """The teacher's loss of each label."""

    losses_T: Tensor

    def take(self, index_L: Tensor) -> GoldTarget:
        """As :class:`~megatron_grit.data.rows.batch.TeacherTarget`."""
        return GoldTarget(losses_T=self.losses_T[index_L])

    def divergence(self, logits_LV: Tensor, losses_L: Tensor, index_L: Tensor | None) -> Tensor:
        """log p(label) - log p_teacher(label): of the label alone, so its gradient is minus that of the loss."""
        return (self.losses_T if index_L is None else self.losses_T[index_L]) - losses_L
