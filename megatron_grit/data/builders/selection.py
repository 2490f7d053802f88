"""Parts of instruction data: without duplicates, nearest to a ratio of instruction and answer, or so much of each
source. Lines stay as they are and in their order.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_grit.data.builders.filters import fingerprint
from megatron_grit.data.builders.options import SftSelection
from megatron_grit.data.builders.statistics import measured, ratio_of
from megatron_grit.data.text.lines import filled_lines
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, replacing
from megatron_grit.store.progress import Progress


@dataclass
class SelectionCounts:
    """What a selection took."""

    num_read: int = 0
    num_duplicates: int = 0
    num_kept: int = 0
    ratios: tuple[float, float] | None = None
    """Lowest and highest ratio of the records taken by it."""

    def summary(self) -> str:
        """One line for a terminal."""
        ratios = f", ratios {self.ratios[0]:.3f} to {self.ratios[1]:.3f}" if self.ratios else ""
        return f"{self.num_kept} records of {self.num_read}, {self.num_duplicates} duplicates left out{ratios}"


def select_sft(options: SftSelection, *, progress: bool = False) -> SelectionCounts:
    """Write the records that the options select.

    Raises:
        DataError: a line that is no record, or fewer records than asked for.
        OutputError: the output cannot be written.
    """
    check_output(options.output, options.input)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    counts, seen = SelectionCounts(), set[bytes]()
    places: list[int] = []
    ratios: list[float] = []
    datasets: list[str] = []
    with Progress(None, "select_sft", "record", enabled=progress) as bar:
        for place, one in enumerate(measured(options.input, tokenizer)):
            bar.update(1)
            counts.num_read += 1
            if options.deduplicate:
                own = fingerprint(one.record)
                if own in seen:
                    counts.num_duplicates += 1
                    continue
                seen.add(own)
            places.append(place)
            ratios.append(ratio_of(one))
            datasets.append(one.dataset)
    kept = np.arange(len(places))
    if options.ratio is not None and options.num_records is not None:
        kept = _nearest(np.array(ratios), options.ratio, options.num_records)
        counts.ratios = float(min(ratios[k] for k in kept)), float(max(ratios[k] for k in kept))
    if options.fraction is not None:
        kept = kept[_stratified([datasets[k] for k in kept], options.fraction, options.seed)]
    taken = {places[k] for k in kept.tolist()}
    counts.num_kept = len(taken)
    if not taken:
        raise DataError(f"nothing is left of {', '.join(options.input)}: {counts.summary()}")
    with replacing(options.output) as output:
        lines = (line for path in options.input for line in filled_lines(path))
        for place, line in enumerate(lines):
            if place in taken:
                output.write(line.text() + "\n")
    return counts


def _nearest(ratios: np.ndarray, ratio: float, count: int) -> np.ndarray:
    """Places of the ``count`` records nearest to a ratio, of equals the first; records without an answer never."""
    usable = np.flatnonzero(np.isfinite(ratios))
    if len(usable) < count:
        raise DataError(f"{count} records are asked for, and {len(usable)} have an answer; lower num_records")
    order = np.argsort(np.abs(ratios[usable] - ratio), kind="stable")
    return np.sort(usable[order[:count]])


def _stratified(datasets: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Places of a fraction of each data set's records; what is left of whole ones goes to those that lack most."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(datasets):
        groups[name].append(place)
    exact = {name: fraction * len(places) for name, places in groups.items()}
    counts = {name: int(value) for name, value in exact.items()}
    missing = int(fraction * len(datasets) + 0.5) - sum(counts.values())
    for name in sorted(groups, key=lambda name: counts[name] - exact[name])[:missing]:
        counts[name] += 1
    taken: list[int] = []
    for name, places in groups.items():
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        taken += [places[k] for k in random.permutation(len(places))[: counts[name]].tolist()]
    return np.sort(np.array(taken, dtype=np.int64))
