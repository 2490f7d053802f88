"""LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) beside the engine's tensor parallel linear layers.

An adapter has a part for each of Hugging Face's projections in the layer (:mod:`layout`), with rows in Hugging Face's
order, so that a part means the same as PEFT's adapter of that projection. :mod:`split` says how a part is split over
ranks.

Shape suffix legend: T = tokens that the layer's input holds, I = input width on this rank, O = output width of a part
on this rank, R = rank of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_grit.models.adapters.layout import PartLayout
from megatron_grit.models.adapters.quantization import QuantizedWeight
from megatron_grit.models.adapters.split import Split
from megatron_grit.models.biases import TrainedBiasLinear


class LoraPart(torch.nn.Module):
    """The adapter of one projection: ``scaling * lora_B lora_A``, and DoRA's ``magnitude``.

    Args:
        lora_A: this rank's share of the fresh matrix, [R, I].
        num_rows: O.
        scaling: alpha / rank, or alpha / sqrt(rank).
        has_magnitude: DoRA. Its magnitudes are those of the base once :meth:`LoraAdapter.reset_magnitudes` was called.
        split: how the layer is split over ranks.
    """

    def __init__(self, lora_A: Tensor, num_rows: int, scaling: float, has_magnitude: bool, split: Split) -> None:
        super().__init__()
        self.scaling, self.split = scaling, split
        self.lora_A = torch.nn.Parameter(lora_A)
        self.lora_B = torch.nn.Parameter(lora_A.new_zeros(num_rows, len(lora_A)))
        self.magnitude = torch.nn.Parameter(lora_A.new_ones(num_rows)) if has_magnitude else None

    def forward(self, input_TI: Tensor) -> Tensor:
        """``scaling * lora_B lora_A x``, [tokens, O], over the tokens that the layer's own output has."""
        inner = self.split.exchange(F.linear(input_TI, self.split.use("lora_A", self.lora_A)))
        return F.linear(inner, self.split.use("lora_B", self.lora_B)) * self.scaling

    @torch.no_grad()
    def row_norms(self, base_OI: Tensor) -> Tensor:
        """Length of each row of ``base + scaling * lora_B lora_A``, fp32 [O]: a constant to the gradient, as in
        section 4.3 of the paper. Collective over the ranks that split the rows."""
        rows = torch.addmm(base_OI.float(), self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)
        return self.split.sum_over_inputs(rows.square().sum(1)).sqrt()

    def rescale(self, update: Tensor, output: Tensor, base_OI: Tensor) -> Tensor:
        """What DoRA adds to a layer's output (equation 5 of the paper).

        Args:
            update: of :meth:`forward`.
            output: of the layer without its bias; like the update.
            base_OI: the layer's weight.
        """
        assert self.magnitude is not None
        factor = self.split.use("magnitude", self.magnitude) / self.row_norms(base_OI).to(self.magnitude.dtype)
        return (factor - 1) * output + factor * update


class LoraAdapter(torch.nn.Module):
    """The adapter of one engine linear layer: a :class:`LoraPart` under the name of each adapted projection.

    Args:
        layout: the layer's projections on this rank.
        parts: those that are adapted.
        dropout: probability, on the adapter's input.
        split: how the layer is split over ranks.
        allreduce: that of the layer's weight.
    """

    def __init__(
        self, layout: PartLayout, parts: dict[str, LoraPart], dropout: float, split: Split, allreduce: bool
    ) -> None:
        super().__init__()
        self.layout, self.dropout, self.split = layout, dropout, split
        self.is_on = True
        """Off, the layer is the base's."""
        for name, part in parts.items():
            self.add_module(name, part)
            for key, parameter in part.named_parameters():
                split.mark(key, parameter, allreduce)

    @property
    def parts(self) -> dict[str, LoraPart]:
        """Adapted projections by their names, in the order of the layer's rows."""
        return {name: self.get_submodule(name) for name in self.layout.names if name in self._modules}  # type: ignore

    def forward(self, input_TI: Tensor, output: Tensor, linear: Any) -> Tensor:
        """The layer's output with the adapter's in it.

        Args:
            input_TI: [T, ..., I], what the layer got.
            output: [tokens, ..., rows], what it made of it.
            linear: the layer.
        """
        dropped, last = self._drop(input_TI), output.dim() - 1
        parts, weights, biases = self.parts, None, None
        if any(part.magnitude is not None for part in parts.values()):
            weights = self.layout.split(base_weight(linear), 0)
            if linear.bias is not None and not linear.skip_bias_add:
                biases = self.layout.split(linear.bias, 0)
        outputs = list(self.layout.split(output, last))
        for number, name in enumerate(self.layout.names):
            if name not in parts:
                continue
            part = parts[name]
            update = part(dropped)
            if weights is not None:
                plain = outputs[number] if biases is None else outputs[number] - biases[number]
                update = part.rescale(update, plain, weights[number])
            outputs[number] = outputs[number] + update
        return self.layout.join(outputs, last)

    def _drop(self, input_TI: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return input_TI
        with self.split.random_stream():
            return F.dropout(input_TI, self.dropout)

    @torch.no_grad()
    def reset_magnitudes(self, linear: torch.nn.Module) -> None:
        """Start DoRA's magnitudes at the lengths of the rows, once the base's weights are there. Collective over the
        ranks that split the layer."""
        weights = self.layout.split(base_weight(linear), 0)
        for name, part in self.parts.items():
            if part.magnitude is not None:
                part.magnitude.copy_(part.row_norms(weights[self.layout.names.index(name)]))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Checkpoint names and shards; a part is the same on disk whatever the layout."""
        assert metadata is not None
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: self.split.axis_of(name.rpartition(".")[2]) for name in state}
        axes = {name: axis for name, axis in axes.items() if axis is not None}
        groups: dict[str, Any] = {"tp_group": self.split.group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
        return sharded


class AdaptedLinear(torch.nn.Module):
    """Mixin of an engine's linear layer with a :class:`LoraAdapter` under the name ``adapter``."""

    adapter: LoraAdapter

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the engine's: output and the bias that the caller is to add."""
        output, bias = super().forward(input_, *args, **kwargs)
        return self.adapter(input_, output, self) if self.adapter.is_on else output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As the engine's, with the adapter's parameters split as they are."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = {name: entry for name, entry in state.items() if not name.startswith(f"{prefix}adapter.")}
        return own | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


class AdaptedColumnParallelLinear(AdaptedLinear, TrainedBiasLinear):  # type: ignore[misc]
    """The engine's column parallel layer with an adapter."""


class AdaptedRowParallelLinear(AdaptedLinear, RowParallelLinear):  # type: ignore[misc]
    """The engine's row parallel layer with an adapter."""


def attach(linear: torch.nn.Module, adapter: LoraAdapter) -> None:
    """Give an engine's layer an adapter. It stays the object it was, under the names that its weights had."""
    linear.__class__ = AdaptedColumnParallelLinear if adapter.split.is_column else AdaptedRowParallelLinear
    linear.adapter = adapter


def base_weight(linear: torch.nn.Module) -> Tensor:
    """The weight that an adapter stands beside, [rows, I]; made anew where the layer holds it in 4 bits."""
    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        return weight.dequantize()
    assert isinstance(weight, Tensor)
    return weight
