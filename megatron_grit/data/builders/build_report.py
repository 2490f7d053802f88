"""The report of a build: how many records were kept, dropped, truncated and split, and how long the texts are.

Lengths are read from the finished file and counts from the build's journal, so a resumed build gives the same report.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_grit.compat import install_command
from megatron_grit.data.indexed.reader import IndexedMeta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import POOLED, Role, RowKind
from megatron_grit.store.files import replacing, write_json

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_TRUNCATED = "truncated."
_BINS = 60
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BuildReport:
    """Counts of a build."""

    prefix: str
    kind: str = ""
    template: str = ""
    num_read: int = 0
    num_kept: int = 0
    """Records in the file. A record that was split counts as often as it has pieces."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records by the reason for which they were dropped."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Truncated texts by kind of text."""
    num_split: int = 0
    """Records that were split."""
    num_split_pieces: int = 0
    """Records that they were split into."""
    num_unanswered: int = 0
    """Records that were read without the turns behind their last answer."""
    token_quantiles: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tokens, template included: count, mean and quantiles by kind of text."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0

    def lines(self) -> list[str]:
        """The report as text."""
        num_dropped = sum(self.dropped.values())
        lines = [f"{self.prefix}: {self.num_kept} {self.kind} records of {self.num_read} read, {num_dropped} dropped"]
        lines += [f"  dropped, {reason:22s} {count:10d}" for reason, count in sorted(self.dropped.items())]
        lines += [f"  truncated, {name:20s} {count:10d}" for name, count in sorted(self.truncated.items())]
        if self.num_split:
            lines.append(f"  split, {'records':24s} {self.num_split:10d}, into {self.num_split_pieces}")
        if self.num_unanswered:
            lines.append(f"  cut, turns without an answer {self.num_unanswered:5d}")
        supervised = f", supervised {self.num_supervised_tokens}" if self.kind != RowKind.EMBEDDING.value else ""
        lines.append(f"  tokens {self.num_tokens}{supervised}")
        header = "".join(f"{name:>9s}" for name in ("texts", "mean", "min", "median", "90 %", "99 %", "max"))
        lines.append(f"  {'tokens of a':14s}{header}")
        for name, values in self.token_quantiles.items():
            count, mean, *quantiles = values.values()
            lines.append(f"  {name:14s}{count:9.0f}{mean:9.1f}" + "".join(f"{quantile:9.0f}" for quantile in quantiles))
        return lines


def make_report(
    prefix: str | Path, meta: IndexedMeta, num_read: int, dropped: Mapping[str, int], counters: Mapping[str, int]
) -> tuple[BuildReport, dict[str, np.ndarray]]:
    """The report of a finished file.

    Args:
        prefix: path without extension.
        meta: its metadata.
        num_read: records of the input.
        dropped: records by reason.
        counters: of the encoder.

    Returns:
        The report, and the tokens of each text by what the texts are.
    """
    lengths = text_lengths(prefix)
    report = BuildReport(
        prefix=str(prefix),
        kind=meta.kind,
        template=meta.template,
        num_read=num_read,
        num_kept=meta.num_records,
        dropped=dict(dropped),
        truncated={
            name.removeprefix(_TRUNCATED): count
            for name, count in sorted(counters.items())
            if name.startswith(_TRUNCATED) and count
        },
        num_split=counters.get("split.records", 0),
        num_split_pieces=counters.get("split.pieces", 0),
        num_unanswered=counters.get("unanswered", 0),
        token_quantiles={name: _quantiles(values) for name, values in lengths.items()},
        num_tokens=meta.num_tokens,
        num_supervised_tokens=meta.num_supervised_tokens if meta.kind != RowKind.EMBEDDING.value else 0,
    )
    return report, lengths


def text_lengths(prefix: str | Path) -> dict[str, np.ndarray]:
    """Tokens of each text of a file, template included, int64, by kind of text: query, positive and negative, or text
    and conversation. Prompts with completions count as conversations."""
    records = IndexedRecords(prefix)
    try:
        file = records.file
        if records.kind is RowKind.GENERATIVE:
            totals = records.lengths()
            if file.modes is None:
                return {"text": totals}
            plain = file.modes[file.documents[:-1]] == Role.TEXT
            groups = {"text": totals[plain], "conversation": totals[~plain]}
        else:
            modes = np.asarray(file.modes)
            ends, ending = _text_ends(records, modes)
            totals = np.diff(np.cumsum(file.lengths, dtype=np.int64)[ends], prepend=0)
            groups = {role.name.lower(): totals[modes[ends] == role] for role in sorted(ending)}
        return {name: values for name, values in groups.items() if len(values)}
    finally:
        records.close()


def _text_ends(records: IndexedRecords, modes: np.ndarray) -> tuple[np.ndarray, frozenset[Role]]:
    """Last span of each text of a file with several in a record, and the roles that these have."""
    if records.kind is RowKind.EMBEDDING:
        return np.flatnonzero(np.isin(modes, sorted(POOLED))), POOLED
    rated = np.array([Role.CHOSEN, Role.REJECTED])
    ends = np.flatnonzero(np.isin(modes, rated))
    of_record = np.searchsorted(records.file.documents, ends, side="right")
    last = np.append((np.diff(of_record) > 0) | (np.diff(modes[ends]) != 0), True)
    return ends[last], frozenset({Role.CHOSEN, Role.REJECTED})


def _quantiles(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, _QUANTILES, method="inverted_cdf").tolist()
    table = {"count": len(values), "mean": float(values.mean())}
    return table | {f"p{100 * quantile:g}": value for quantile, value in zip(_QUANTILES, quantiles, strict=True)}


def write_report(report: BuildReport, lengths: Mapping[str, np.ndarray]) -> None:
    """Write ``<prefix>.report.json`` and, where matplotlib is installed, the histogram ``<prefix>.report.png``."""
    path = Path(f"{report.prefix}.report.json")
    write_json(path, asdict(report))
    draw_histogram(path.with_suffix(".png"), lengths)


def draw_histogram(path: str | Path, lengths: Mapping[str, np.ndarray], unit: str = "tokens") -> None:
    """Counts of texts by length, one panel for each kind of text, on a logarithmic axis. Where matplotlib is not
    installed an earlier picture is removed, and the log says so.

    Args:
        path: PNG to write.
        lengths: of the texts of each kind, int64; one of 0 is drawn as 1.
        unit: what lengths count.
    """
    path = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        path.unlink(missing_ok=True)  # of an earlier build
        _logger.warning("no %s: matplotlib is not installed (%s)", path, install_command("eval"))
        return
    figure = Figure(figsize=(6.4, 2.4 * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, values) in enumerate(lengths.items(), 1):
        axes = figure.add_subplot(len(lengths), 1, place)
        values = np.maximum(values, 1)
        low, high = int(values.min()), int(values.max()) + 1
        edges = np.unique(np.geomspace(low, max(high, low + 1), _BINS + 1).astype(np.int64))
        axes.hist(values, bins=edges.tolist(), color="tab:blue")
        axes.set_xscale("log")
        axes.set_xlabel(unit)
        axes.set_ylabel("texts")
        axes.set_title(f"{name}: {len(values)}, mean {values.mean():.1f}, longest {high - 1}")
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
