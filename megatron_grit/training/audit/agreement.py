"""One verdict for all ranks: whoever finds a problem, every rank raises it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_grit.errors import AuditError
from megatron_grit.parallel.context import ParallelContext

WAY_AROUND = "repair it, or start without this check: --training.audit off"


def raise_if_any(problem: str | None, context: ParallelContext) -> None:
    """End the run on every rank if one has a problem. Collective over the whole job.

    Args:
        problem: what this rank found. None: nothing.
        context: this process's place in the mesh.

    Raises:
        AuditError: the problem of the lowest rank that has one.
    """
    text = b""
    if problem is not None:
        text = f"start-up audit, {context.describe()}: {problem}; {WAY_AROUND}".encode()
    size = torch.tensor([len(text)], device=context.device)
    sizes = [torch.empty_like(size) for _ in range(context.world_size)]
    dist.all_gather(sizes, size)
    first = next((rank for rank, size in enumerate(sizes) if size.item()), None)
    if first is None:
        return
    message = torch.zeros(int(sizes[first].item()), dtype=torch.uint8, device=context.device)
    if first == context.rank:
        message.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(message, src=first)
    raise AuditError(bytes(message.tolist()).decode())
