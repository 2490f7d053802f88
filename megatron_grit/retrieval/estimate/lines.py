"""The estimate of a build as a dry run says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_grit.data.chunks.project import Project
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import check_index
from megatron_grit.retrieval.estimate.rates import Rates, measure
from megatron_grit.retrieval.estimate.stages import Estimate, Sizes, StageCost

FEWEST_CHUNKS = 50_000
"""Of a smaller corpus nothing is said: it is built in about the time that is measured in."""


def num_tokens_of(project: Project) -> int:
    """Tokens of the files of a project's configuration."""
    files = [project.open(prefix) for prefix in project.config.data_paths]
    return sum(file.bin_bytes // file.dtype.itemsize for file in files)


def is_worth_it(project: Project) -> bool:
    """Whether a corpus is large enough for an estimate."""
    return num_tokens_of(project) >= FEWEST_CHUNKS * project.config.chunk_length


def estimate_build(project: Project, embedder: Embedder, tasks: Sequence[str], num_processes: int) -> Estimate:
    """Measure rates on a project's corpus, and the sizes of what is built of it.

    Args:
        project: with the files of the corpus; nothing of it needs to be built.
        embedder: of its vectors.
        tasks: that will run.
        num_processes: that will run them.

    Raises:
        ConfigError: no index can be made of so many chunks.
        DataError: a file is damaged.
    """
    config, num_tokens = project.config, num_tokens_of(project)
    most = max(1, num_tokens // config.chunk_length)
    guess, num_train = check_index(config, embedder.dim, most)
    rates = measure(project, embedder, guess, num_train, most)
    num_chunks = max(1, round(rates.chunks_per_token * num_tokens))
    factory, num_train = check_index(config, embedder.dim, num_chunks)
    sizes = Sizes(
        num_chunks=num_chunks,
        num_places=round(rates.places_per_token * num_tokens),
        num_documents=round(rates.documents_per_token * num_tokens),
        dim=embedder.dim,
        factory=factory,
        num_train=num_train,
        num_processes=num_processes,
        stored="embed" in tasks or any((project.folder / "embeddings").glob("*.hdf5")),
    )
    return Estimate(config, sizes, rates)


def lines_of(estimate: Estimate, tasks: Sequence[str]) -> Iterator[str]:
    """The costs of tasks, a line each, and of all of them."""
    sizes, config, rates = estimate.sizes, estimate.config, estimate.rates
    count = sizes.num_processes
    yield (
        f"estimate, from rates measured here: {sizes.num_chunks:,} chunks, index {sizes.factory}, "
        f"{1 / max(rates.embed.wall, 1e-9):,.0f} embedded a second, {count} process{'es' * (count > 1)}"
    )
    costs = [cost for task in tasks if (cost := estimate.of(task)) is not None]
    for cost in costs:
        yield f"  {cost.task:16s}{_line(cost, count)}"
    if not costs:
        return
    seconds, cpu = sum(cost.seconds(count) for cost in costs), sum(cost.spent.cpu for cost in costs)
    disk, memory = sum(cost.disk for cost in costs), max(cost.memory for cost in costs)
    most = max(
        sum(other.disk for other in costs[:number]) + cost.disk + cost.passing for number, cost in enumerate(costs)
    )
    yield (
        f"  {'all':16s}{_time(seconds)}, {_time(cpu)} of CPU, {_bytes(disk)} on disk, {_bytes(most)} while it is "
        f"built, {_bytes(memory)} of memory in a process"
    )
    if estimate.lists and config.nprobe is None:
        yield f"  {estimate.nprobe:,} of {estimate.lists:,} lists are taken to be visited; index-add chooses how many"
    yield "  repeated chunks are counted as far as a sample of the corpus shows them"


def _line(cost: StageCost, num_processes: int) -> str:
    passing = f" and {_bytes(cost.passing)} for a time" if cost.passing else ""
    alone = f" ({_time(cost.alone.wall)} of it in one process)" if cost.alone.wall > 1 and num_processes > 1 else ""
    return (
        f"{_time(cost.seconds(num_processes))}{alone}, {_time(cost.spent.cpu)} of CPU, {_bytes(cost.disk)} on disk"
        f"{passing}, {_bytes(cost.memory)} of memory"
    )


def _time(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:.3g} days"


def _bytes(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.0f} kB"


__all__ = ["Rates", "estimate_build", "is_worth_it", "lines_of"]
