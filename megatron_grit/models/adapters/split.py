"""How an adapter is sharded over the tensor parallel ranks of its layer, and what they communicate.

    linear_qkv, linear_fc1 (column parallel)   lora_A replicated; lora_B and magnitude sharded by rows
    linear_proj, linear_fc2 (row parallel)     lora_A sharded by columns; lora_B and magnitude replicated

Experts are sharded over the expert tensor parallel ranks. The engine's dispatcher gathers their tokens before and sums
their outputs after, so an expert's adapter communicates nothing.
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
    """How a linear layer and its adapter are sharded."""

    is_column: bool
    is_expert: bool
    is_sequence_parallel: bool
    """Ranks hold different tokens before a column parallel and after a row parallel layer."""
    group: dist.ProcessGroup

    @staticmethod
    def of_linear(linear: Any) -> Split:
        """The one of an engine's linear layer."""
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
        """Axis along which lora_A, lora_B or magnitude is sharded; None: it is replicated."""
        if name == "lora_A":
            return None if self.is_column else 1
        return 0 if self.is_column else None

    def mark(self, name: str, parameter: torch.nn.Parameter, allreduce: bool) -> None:
        """Tell the engine how a parameter is sharded and over which ranks its gradient is reduced.

        Args:
            name: lora_A, lora_B or magnitude.
            parameter: gets the engine's attributes.
            allreduce: that of the layer's weight: whether it belongs to the dense or the expert mesh.
        """
        axis = self.axis_of(name)
        # One replica's gradient counts towards the norm. The engine takes that of tensor parallel rank 0, which is
        # another rank in the experts' own mesh: there the other replicas are marked as it marks a shared embedding.
        counts = axis is not None or self.is_expert
        set_tensor_model_parallel_attributes(parameter, counts, -1 if axis is None else axis, 1)
        if self.is_expert and axis is None:
            parameter.shared = dist.get_rank(self.group) > 0  # type: ignore[attr-defined]
        parameter.allreduce = allreduce  # type: ignore[attr-defined]
        # Each rank saw other tokens: the engine sums such gradients over tensor parallel ranks.
        parameter.sequence_parallel = self.is_sequence_parallel and axis is None  # type: ignore[attr-defined]

    def exchange(self, inner: Tensor) -> Tensor:
        """The output of ``lora_A`` for the tokens of the layer's own output: [tokens, rank]."""
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
        """The parameter to compute with. Each rank of an expert has a part of a replicated parameter's gradient; the
        backward pass sums them."""
        if self.is_expert and self.size > 1 and self.axis_of(name) is None:
            return copy_to_tensor_model_parallel_region(parameter, group=self.group)
        return parameter

    def sum_over_inputs(self, values: Tensor) -> Tensor:
        """Sum over ranks that each hold a part of the layer's input width, in place."""
        if self.size > 1 and not self.is_column:
            dist.all_reduce(values, group=self.group)
        return values

    def random_stream(self) -> AbstractContextManager[Any]:
        """Random stream of dropout masks of the input: shared by ranks that hold the same input, else each its own.

        The engine's default stream is shared by tensor parallel ranks, but inside layers under sequence parallelism
        each rank has its own.
        """
        if self.size == 1 or self.is_sequence_parallel:
            return nullcontext()
        if self.is_column:
            # Under sequence parallelism the ranks of an expert hold the same tokens but have different streams.
            return self._fork(get_data_parallel_rng_tracker_name()) if self.is_expert else nullcontext()
        return self._fork() if not self.is_expert else nullcontext()

    def _fork(self, *name: str) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = get_cuda_rng_tracker().fork(*name)
        return stream
