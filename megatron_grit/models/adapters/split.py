"""How an adapter is split over the tensor parallel ranks of its layer: what is exchanged, and whose gradient counts.

    linear_qkv, linear_fc1 (column parallel)   lora_A whole on every rank; lora_B and magnitude split by rows
    linear_proj, linear_fc2 (row parallel)     lora_A split along its input; lora_B and magnitude whole on every rank

Experts are split over the expert tensor parallel ranks. The engine's dispatcher gathers their tokens before and sums
their outputs after, so nothing is exchanged within.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """The ranks over which a linear layer and its adapter are split."""

    is_column: bool
    is_expert: bool
    is_sequence_parallel: bool
    """Ranks hold different tokens before a column parallel and after a row parallel layer."""
    group: dist.ProcessGroup

    @staticmethod
    def of_linear(linear: Any) -> Split:
        """Of an engine's layer."""
        is_shared = bool(linear.sequence_parallel) and not linear.is_expert
        return Split(
            is_column=isinstance(linear, ColumnParallelLinear),
            is_expert=bool(linear.is_expert),
            is_sequence_parallel=is_shared and dist.get_world_size(linear.tp_group) > 1,
            group=linear.tp_group,
        )

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return dist.get_world_size(self.group)

    def axis_of(self, name: str) -> int | None:
        """Axis along which lora_A, lora_B or magnitude is split; None: each rank has it whole."""
        if name == "lora_A":
            return None if self.is_column else 1
        return 0 if self.is_column else None

    def mark(self, name: str, parameter: torch.nn.Parameter, allreduce: bool) -> None:
        """Tell the engine how a parameter is split, and over which ranks its gradient is summed.

        Args:
            name: lora_A, lora_B or magnitude.
            parameter: gets the engine's attributes.
            allreduce: that of the layer's weight: whether it belongs to the dense or the expert mesh.
        """
        axis = self.axis_of(name)
        # Of a parameter that several ranks have whole, one gradient counts towards the norm. The engine takes that of
        # tensor parallel rank 0; for the experts' own mesh that is another rank, and what the others hold is marked as
        # it marks a shared embedding.
        counts = axis is not None or self.is_expert
        set_tensor_model_parallel_attributes(parameter, counts, -1 if axis is None else axis, 1)
        if self.is_expert and axis is None:
            parameter.shared = dist.get_rank(self.group) > 0  # type: ignore[attr-defined]
        parameter.allreduce = allreduce  # type: ignore[attr-defined]
        # Each rank saw its own tokens: the engine sums such gradients over tensor parallel ranks.
        parameter.sequence_parallel = self.is_sequence_parallel and axis is None  # type: ignore[attr-defined]

    def exchange(self, inner: Tensor) -> Tensor:
        """What ``lora_A`` made of the input, over the tokens that the layer's own output has: [tokens, rank]."""
        if self.size == 1 or self.is_expert:
            return inner
        if self.is_column:
            if self.is_sequence_parallel:
                return gather_from_sequence_parallel_region(inner, group=self.group)
            return copy_to_tensor_model_parallel_region(inner, group=self.group)
        if self.is_sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.group)

    def use(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter as it goes into the computation. Each rank of an expert has a part of the gradient of what all
        of them hold: here they are summed."""
        if self.is_expert and self.size > 1 and self.axis_of(name) is None:
            return copy_to_tensor_model_parallel_region(parameter, group=self.group)
        return parameter

    def sum_over_inputs(self, values: Tensor) -> Tensor:
        """Sum over ranks that each have a part of the layer's input width, in place."""
        if self.size > 1 and not self.is_column:
            dist.all_reduce(values, group=self.group)
        return values

    def random_stream(self) -> AbstractContextManager[Any]:
        """Where masks of the input are drawn from: the same on ranks that hold the same input, else each its own.

        The engine's default stream is the same on tensor parallel ranks, but each rank's own inside layers under
        sequence parallelism.
        """
        if self.size == 1 or self.is_sequence_parallel:
            return nullcontext()
        if self.is_column:
            # Under sequence parallelism the ranks of an expert hold the same tokens and stand in different streams.
            return self._fork(get_data_parallel_rng_tracker_name()) if self.is_expert else nullcontext()
        return self._fork() if not self.is_expert else nullcontext()

    def _fork(self, *name: str) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = get_cuda_rng_tracker().fork(*name)
        return stream
