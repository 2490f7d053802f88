"""What contradicts itself in how many samples, or full rows, of a kind a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import MeshError


def packing_problems(config: RunConfig, multiple: int, *, batch: str, rows: str, what: str) -> Iterator[Problem]:
    """Problems of a kind whose rows are filled from a stream with ``data.packing window``.

    Args:
        config: the run.
        multiple: the rows of a step are a multiple of it, so a step needs as many samples.
        batch: key of the samples of a step.
        rows: key of the full rows of a step.
        what: the rows in words: "generative rows".
    """
    size, full_rows = attrgetter(batch)(config), attrgetter(rows)(config)
    if config.data.packing == "step":
        if size < multiple:
            yield Problem(batch, f"{batch} {size} is below the {multiple} rows of a step", MeshError)
        if full_rows is not None:
            yield Problem(rows, f"{rows} has an effect only with data.packing window")
    elif full_rows is None:
        yield Problem("data.packing", f"data.packing window needs {rows}: the {what} of a step")
    elif full_rows % multiple:
        yield Problem(
            rows,
            f"{rows} {full_rows} is no multiple of {multiple}, the data parallel size or data.num_rows_multiple",
            MeshError,
        )
