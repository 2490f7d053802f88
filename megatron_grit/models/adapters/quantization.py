"""A frozen base in 4 bits beside trained adapters (QLoRA, arXiv 2305.14314).

NF4: blocks of 64 weights, each divided by its largest magnitude and rounded to the nearest of 16 values, which are
quantiles of a normal distribution. Double quantisation stores the blocks' largest magnitudes, less their mean, in 8
bits: blocks of 256 of them, dynamic code. 4.127 bits a weight. Codes, order and arithmetic are those of bitsandbytes,
except that its CPU library rounds some 8-bit codes within 2e-5 of a midpoint the other way.

Blocks are taken from the whole projection in Hugging Face's order at every tensor parallel size, so all layouts compute
with the same base, which is also the one that bitsandbytes makes of the projection in transformers.

Shape suffix legend: R = rows and C = columns of a projection's share on this rank, K = blocks, T = tokens, I = input
width and O = output width of a layer on this rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_grit.models.adapters.layout import PartLayout

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Appendix E of the paper."""
BLOCK, STATISTICS_BLOCK = 64, 256
SMALLEST = 1e-38  # what a block of zeros is divided by


@functools.cache
def bitsandbytes_kernel() -> Callable[..., Tensor] | None:
    """bitsandbytes' dequantisation, for CUDA; None where it is not installed or finds no library for the GPU."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return None
    kernel: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit
    return kernel


@functools.cache
def nf4_codebook(device: torch.device) -> Tensor:
    """The 16 values, fp32."""
    return torch.tensor(NF4_VALUES, device=device)


@functools.cache
def dynamic_codebook(device: torch.device) -> Tensor:
    """256 values, fp32, ascending: sign, a decimal exponent in unary, and a fraction in the bits that are left
    (8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        fractions = (edges[:-1] + edges[1:]) / 2
        scale = 10.0 ** (exponent - 6)
        values += (scale * fractions).tolist() + (-scale * fractions).tolist()
    return torch.tensor(sorted(values), device=device)


@dataclass(frozen=True)
class Statistics:
    """The largest magnitude of each block, as it is stored."""

    codes_K: Tensor
    """uint8 under double quantisation, else the fp32 magnitudes."""
    scales: Tensor
    """fp32, one for 256 codes; empty without double quantisation."""
    mean: Tensor
    """fp32 scalar."""


def quantize_nf4(weight: Tensor, double: bool = True) -> tuple[Tensor, Statistics]:
    """Codes of a whole tensor, row after row.

    Args:
        weight: of any shape and floating type.
        double: quantise the blocks' magnitudes as well.

    Returns:
        (codes, uint8 of the tensor's shape, 0..15 and not packed yet; the blocks' magnitudes).
    """
    flat = weight.detach().reshape(-1).float()
    num_whole = len(flat) // BLOCK * BLOCK
    blocks = flat[:num_whole].view(-1, BLOCK)
    magnitudes = blocks.abs().amax(1)
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the last, shorter one.
    scaled = (blocks * (1.0 / magnitudes.clamp(min=SMALLEST))[:, None]).clamp(-1, 1).reshape(-1)
    if num_whole < len(flat):
        last = flat[num_whole:].abs().max().clamp(min=SMALLEST)
        magnitudes = torch.cat([magnitudes, last[None]])
        scaled = torch.cat([scaled, (flat[num_whole:] / last).clamp(-1, 1)])
    book = nf4_codebook(flat.device)
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(weight.shape), _quantize_statistics(magnitudes, double)


def _quantize_statistics(magnitudes_K: Tensor, double: bool) -> Statistics:
    if not double:
        return Statistics(magnitudes_K, magnitudes_K.new_empty(0), magnitudes_K.new_zeros(()))
    mean = magnitudes_K.mean()
    centred = magnitudes_K - mean
    num_scales = math.ceil(len(centred) / STATISTICS_BLOCK)
    padded = centred.new_zeros(num_scales * STATISTICS_BLOCK)
    padded[: len(centred)] = centred
    blocks = padded.view(-1, STATISTICS_BLOCK)
    scales = blocks.abs().amax(1)
    book = dynamic_codebook(centred.device)
    scaled = (blocks * (1.0 / scales.clamp(min=SMALLEST))[:, None]).clamp(-1, 1).reshape(-1)[: len(centred)]
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
    return Statistics(codes, scales, mean)


def magnitudes_of(statistics: Statistics, numbers: Tensor, codes: Tensor) -> Tensor:
    """fp32 magnitudes of blocks.

    Args:
        statistics: of the whole tensor.
        numbers: int64, which of its blocks.
        codes: what is stored of each of them.
    """
    if not len(statistics.scales):
        return codes
    values = dynamic_codebook(codes.device)[codes.int()] * statistics.scales[numbers // STATISTICS_BLOCK]
    return values + statistics.mean


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half; uint8 [ceil(numel / 2)]."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        # bitsandbytes pads with the value 0, not with code 0.
        flat = torch.cat([flat, flat.new_full((1,), NF4_VALUES.index(0.0))])
    return flat[::2] << 4 | flat[1::2]


def round_trip(weight: Tensor, double: bool = True) -> Tensor:
    """What a whole tensor is after quantisation, in its own type."""
    return QuantizedProjection.of_whole(weight, double).dequantize()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class QuantizedProjection(torch.nn.Module):
    """A rank's rectangle of a projection, in 4 bits. Buffers only, none of them in a state dict: a base is loaded from
    its own checkpoint and quantised again.

    Args:
        codes_RC: of :func:`quantize_nf4`, this rank's.
        statistics: of the whole projection.
        shape: the whole projection's.
        origin: first row and column of this rank.
        dtype: of the weight when it is dequantised.
    """

    def __init__(
        self,
        codes_RC: Tensor,
        statistics: Statistics,
        shape: Sequence[int],
        origin: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape = torch.Size(codes_RC.shape)
        self.whole_shape, self.origin, self.dtype = tuple(shape), origin, dtype
        # Whole blocks in each row, as in every real model; else a block is looked up for each element.
        self.is_aligned = not (shape[1] % BLOCK or origin[1] % BLOCK or self.shape[1] % BLOCK)
        self.codes: Tensor
        self.block_codes: Tensor
        self.scales: Tensor
        self.mean: Tensor
        self.register_buffer("codes", pack(codes_RC), persistent=False)
        block_codes = statistics.codes_K
        if self.is_aligned:
            block_codes = block_codes[self._block_numbers(block_codes.device)]
        self.register_buffer("block_codes", block_codes.contiguous(), persistent=False)
        self.register_buffer("scales", statistics.scales.clone(), persistent=False)
        self.register_buffer("mean", statistics.mean.clone(), persistent=False)

    @classmethod
    def of_whole(cls, weight: Tensor, double: bool = True) -> QuantizedProjection:
        """A projection [rows, columns] that one rank holds."""
        codes, statistics = quantize_nf4(weight, double)
        return cls(codes, statistics, weight.shape, (0, 0), weight.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dequantize(self) -> Tensor:
        """[R, C] in the type of the weight that it was."""
        numbers = self._block_numbers(self.codes.device)
        block_codes = self.block_codes if self.is_aligned else self.block_codes[numbers]
        statistics = Statistics(self.block_codes, self.scales, self.mean)
        magnitudes = magnitudes_of(statistics, numbers, block_codes)
        if self.is_aligned and _is_on_gpu(self.codes):
            kernel = bitsandbytes_kernel()
            if kernel is not None:
                return kernel(self.codes, magnitudes.view(-1), BLOCK, "nf4", list(self.shape), self.dtype)
        halves = torch.stack([self.codes >> 4, self.codes & 15], 1).view(-1)[: self.shape.numel()]
        values = nf4_codebook(halves.device)[halves.int()]
        if self.is_aligned:
            values = values.view(-1, BLOCK) * magnitudes.view(-1, 1)
        else:
            values = values.view(self.shape) * magnitudes
        return values.view(self.shape).to(self.dtype)

    def _block_numbers(self, device: torch.device) -> Tensor:
        """Blocks of the whole projection: of each of this rank's blocks, or of each of its elements."""
        width = BLOCK if self.is_aligned else 1
        rows = torch.arange(self.origin[0], self.origin[0] + self.shape[0], device=device) * self.whole_shape[1]
        columns = torch.arange(self.origin[1], self.origin[1] + self.shape[1], width, device=device)
        return (rows[:, None] + columns) // BLOCK

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedProjection:
        """Moves go through; casts of a model do not, since statistics stay fp32."""
        device = fn(self.codes).device
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)
        return self


class QuantizedWeight(torch.nn.Module):
    """Replaces a linear layer's weight by its projections in 4 bits.

    Args:
        projections: in the order of the layer's rows.
        layout: how their rows lie in the layer.
    """

    def __init__(self, projections: Sequence[QuantizedProjection], layout: PartLayout) -> None:
        super().__init__()
        self.projections = torch.nn.ModuleList(projections)
        self._projections = list(projections)
        self.layout = layout
        self.requires_grad = False

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and statistics."""
        return sum(projection.num_bytes for projection in self._projections)

    def dequantize(self) -> Tensor:
        """The layer's weight [O, I], computed at each call."""
        return self.layout.join([projection.dequantize() for projection in self._projections], 0)


class _QuantizedProduct(torch.autograd.Function):
    """input_TI x weight_OI^T; saves the 4-bit weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, weight: QuantizedWeight, group: dist.ProcessGroup | None) -> Tensor:
        ctx.weight, ctx.group = weight, group
        return input_TI.matmul(weight.dequantize().t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].matmul(ctx.weight.dequantize())
        if ctx.group is not None:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


def _forward_quantized(  # many: the engine passes them
    input: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    gtp_remat_size: int = 1,
    **_: Any,
) -> Tensor:
    """Replaces the matrix product of the engine's column and row parallel layers and takes its arguments. Those that
    concern the weight's gradient are ignored: there is none."""
    assert gtp_remat_size == 1
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    output: Tensor = _QuantizedProduct.apply(input, weight, tp_group if allreduce_dgrad else None)
    # Added outside of the product, so that a trained bias gets its gradient.
    return output if bias is None else output + bias


def quantize_linear_(linear: torch.nn.Module, double: bool = True) -> None:
    """Quantise the frozen weight of an engine's linear layer, in place. Collective over the ranks that split it.

    ``linear.weight`` becomes a :class:`QuantizedWeight`. Call it after the base's weights were loaded.

    Args:
        linear: a column or row parallel layer with an ``adapter``, whose layout says which projections it holds.
        double: quantise the blocks' magnitudes as well.
    """
    layer: Any = linear
    assert not layer.weight.requires_grad, "only frozen weights are quantised"
    layout, split = layer.adapter.layout, layer.adapter.split
    dim = 0 if split.is_column else 1
    projections = []
    with torch.no_grad():
        for share in layout.split(layer.weight.detach(), 0):
            whole = _gather(share.contiguous(), dim, split.group)
            codes, statistics = quantize_nf4(whole, double)
            first = dist.get_rank(split.group) * share.shape[dim]
            origin = (first, 0) if dim == 0 else (0, first)
            own = codes.narrow(dim, first, share.shape[dim])
            projections.append(QuantizedProjection(own, statistics, whole.shape, origin, share.dtype))
    del layer.weight
    layer.weight = QuantizedWeight(projections, layout)
    layer._forward_impl = _forward_quantized


def _gather(share: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, share, group=group)
    return torch.cat(shares, dim)
