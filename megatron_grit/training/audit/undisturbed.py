"""A model under audit goes back into the run as it came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState


@contextmanager
def undisturbed(wrapped: Sequence[DistributedDataParallel]) -> Iterator[list[GritDecoder]]:
    """The chunks with dropout off and weights that take no gradient; afterwards all is as before.

    Weights without gradients spare the backward pass of the audit their computation, and no gradient buffer is
    touched. Random states are put back, should anything have drawn.

    Args:
        wrapped: the chunks as the optimizer knows them. Weights that are gathered while the forward pass goes on are
            whole before the first step, so the hooks that wait for them are taken off for the time.
    """
    chunks = [chunk.module for chunk in wrapped]
    waiting = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
    inputs = [chunk.decoder.input_tensor for chunk in chunks]
    random = RandomState.capture()
    for chunk in waiting:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        for chunk in chunks:
            chunk.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield chunks
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for chunk, states in zip(chunks, inputs, strict=True):
            chunk.set_input_tensor(states)
        for chunk in waiting:
            chunk.enable_forward_pre_hook()
        random.restore()


def held_tokens(length: int, index_L: Tensor | None, context: ParallelContext) -> Tensor:
    """Positions in the row of the states that this rank holds between two layers.

    Args:
        length: of the row.
        index_L: the context parallel rank's part of it. None: all.
        context: under sequence parallelism tensor parallel ranks hold a part of that part each.
    """
    held = torch.arange(length, device=context.device) if index_L is None else index_L
    if context.sequence_parallel:
        held = held.chunk(context.tensor_size)[context.tensor_rank]
    return held


def gather_tokens(values_LD: Tensor, held_L: Tensor, length: int, context: ParallelContext) -> Tensor:
    """Values beside each token of the row, from the ranks that hold it: [L, ...] to [T, ...] on every rank of a stage.

    Ranks that hold the same token must have the same value; the largest is taken, and lowest() for no token at all.
    """
    lowest = torch.finfo(values_LD.dtype).min
    full_TD = values_LD.new_full((length, *values_LD.shape[1:]), lowest)
    full_TD[held_L] = values_LD.detach()
    for size, group in (
        (context.tensor_size, context.tensor_group),
        (context.context_size, context.context_group),
    ):
        if size > 1:
            torch.distributed.all_reduce(full_TD, op=torch.distributed.ReduceOp.MAX, group=group)
    return full_TD
