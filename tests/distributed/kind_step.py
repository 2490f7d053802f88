"""A step of one kind of row at a layout, from given weights, and its gradient against that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.rows import VOCAB


class StubTokenizer:
    """What a loader asks of a tokenizer, for files of random tokens."""

    fingerprint, path, vocab_size, pad_id = "of the test", Path("tokenizer"), VOCAB, 0


def loader_at(config: Any, context: Any) -> Any:
    """The loader of a run at its layout."""
    from megatron_grit.data.rows.loader import GritDataLoader

    return GritDataLoader(
        config,
        StubTokenizer(),  # type: ignore[arg-type]
        context.data_rank,
        context.data_size,
        context.row_multiple,
        equal_rows=context.pipeline_size > 1,
    )


def fill(chunks: Any, context: Any, values: dict[str, torch.Tensor]) -> None:
    """Give the chunks these weights, as :func:`whole` has them."""
    from tests.distributed.grid_run import parts_of

    with torch.no_grad():
        for part in parts_of(chunks, context):
            part.fill(values)


def start_from(path: Path, chunks: Any, context: Any) -> dict[str, torch.Tensor]:
    """Give the chunks the weights of a file, which one process has written from its own if it was not there."""
    import safetensors.torch

    from tests.distributed.grid_run import parts_of

    if not path.exists():
        safetensors.torch.save_file(whole("weight", parts_of(chunks, context)), path)
    start = safetensors.torch.load_file(path)
    fill(chunks, context, start)
    return start


def accumulate(step: Any, batch: Any) -> dict[str, float]:
    """Metrics of a step whose gradients are accumulated, without an update."""
    for chunk in step.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return dict(step.accumulate_gradients(batch))


def compare_gradients(path: Path, step: Any, chunks: Any, context: Any) -> list[dict[str, Any]] | None:
    """Each part of the gradient against the whole one of a file. None: one process has written its own there, and its
    weights are gone."""
    import safetensors.torch

    from tests.distributed.grid_run import _compare_gradients, parts_of

    if path.exists():
        return _compare_gradients(chunks, step.chunks, context, safetensors.torch.load_file(path))
    for parameter in chunks[0].parameters():
        parameter.data.copy_(parameter.main_grad)
    safetensors.torch.save_file(whole("gradient", parts_of(chunks, context)), path)
    return None


def whole(what: str, parts: Any) -> dict[str, torch.Tensor]:
    """Each parameter as one process holds it, those of layers stacked, without what pads the vocabulary."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        sizes = [number + 1 for number in part.place]
        rows = [VOCAB if size > VOCAB and "embedding" in part.key else size for size in part.shape]
        key = f"{what} {part.key}"
        before = whole.get(key)
        shape = [max(2 if sizes else 1, *sizes)] if sizes else []
        held = torch.zeros(*shape, *rows) if before is None else before
        place = tuple(slice(start, start + size) for start, size in zip(part.offset, part.tensor.shape, strict=True))
        target = held[part.place][place]
        target.copy_(part.tensor.detach()[tuple(slice(0, size) for size in target.shape)])
        whole[key] = held
    return whole


def gradient_error(ranks: list[dict[str, Any]]) -> float:
    """Largest relative error of a parameter's gradient, over the parts that the ranks hold."""
    errors: dict[str, dict[str, list[float]]] = {}
    for rank in ranks:
        for part in rank["parts"]:
            errors.setdefault(part["name"], {})[str(part["offset"])] = [part["error"], part["norm"]]
    found = {}
    for name, parts in errors.items():
        error, norm = np.sum(list(parts.values()), axis=0)
        found[name] = (error / max(norm, 1e-20)) ** 0.5
    return max(found.values())
