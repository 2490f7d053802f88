"""The mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class ParallelConfig:
    """The mesh. Data parallel size = processes / (tensor x pipeline x context)."""

    tensor: int = knob(1, at_least=1)
    """Tensor parallel size."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor parallel layers."""
    pipeline: int = knob(1, at_least=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = knob(None, at_least=2)
    """Chunks of layers that each stage holds (interleaved schedule): stages wait less and exchange more. null: one. A
    step needs at least as many rows on each data parallel rank as there are stages."""
    context: int = knob(1, at_least=1)
    """Context parallel size: processes that hold a part of each row's tokens. They gather keys and values."""
    expert: int = knob(1, at_least=1)
    """Expert parallel size; divides the processes of a pipeline stage by expert_tensor."""
    expert_tensor: int | None = knob(None, at_least=1)
    """Tensor parallel size of the experts. null: that of the rest."""
    overlap: bool = False
    """Reduce gradients while the last row's backward pass goes on, and gather updated weights while the next forward
    pass goes on. false: both in one piece at the end of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else CPU with gloo."""
    timeout_minutes: float = knob(10.0, above=0)
    """A collective that waits longer than this ends the job."""
