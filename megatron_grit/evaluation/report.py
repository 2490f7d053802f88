"""The report of a run: report.md, report.json and loss.png from two evaluations and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_grit.compat import needed
from megatron_grit.config.kinds import kind_names, loss_name, loss_words
from megatron_grit.data.text.lines import filled_lines, parse_json, read_lines
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.store.files import check_output, replacing, write_json

FIGURES = ("recall_at_1", "recall_at_10", "ndcg_at_10", "lm_loss")
"""Figures that are compared before and after training."""

_LABELS = {
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "ndcg_at_10": "nDCG@10",
    "lm_loss": "next-token loss (nats)",
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl. If a resumed run repeated a step, its last line counts; figures that it has not, such as
    those of the loss on held-out texts, are added.

    Raises:
        DataError: a missing file, a malformed line, or no lines.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in filled_lines(path):
        record = line.value()
        try:
            step = int(record["step"])
            by_step[step] = by_step.get(step, {}) | record
        except (ValueError, KeyError, TypeError) as error:
            raise line.error(f"not a line of metrics: {error!r}") from error
    if not by_step:
        raise DataError("holds no metrics; did the run train a step?", path=path)
    return [by_step[step] for step in sorted(by_step)]


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Read a file of ``megatron-grit evaluate``.

    Raises:
        DataError: it cannot be read, or lacks a figure of the report.
    """
    try:
        figures = parse_json(Path(path).read_bytes())
        intervals = figures["intervals"]
        missing = [name for name in FIGURES if name not in intervals]
    except (OSError, DataError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read: {error}; run megatron-grit evaluate again", path=path) from error
    if missing:
        raise DataError(f"has no {', '.join(missing)}; evaluate with --retrieval and --generative", path=path)
    return figures


def read_timings(path: str | Path) -> dict[str, float]:
    """Stages and their seconds, from lines ``name<TAB>seconds``. Times of a resumed stage are added.

    Raises:
        DataError: it cannot be read, or a malformed line.
    """
    timings: dict[str, float] = {}
    for line in filled_lines(path):
        name, _, seconds = line.text().rpartition("\t")
        try:
            timings[name] = timings.get(name, 0.0) + float(seconds)
        except ValueError as error:
            raise line.error("expected a stage, a tab and its seconds") from error
    return timings


def _interval(figures: dict[str, Any], name: str) -> Interval:
    low, high = figures["intervals"][name]
    return Interval(value=figures[name], low=low, high=high)


def write_report(
    output_dir: str | Path,
    *,
    before: str | Path,
    after: str | Path,
    metrics: str | Path,
    timings: str | Path,
    samples: str | Path | None = None,
) -> str:
    """Write report.md, report.json and loss.png into ``output_dir``.

    Args:
        output_dir: folder of the report.
        before: evaluation of the untrained model.
        after: evaluation of the trained model.
        metrics: metrics.jsonl of the run.
        timings: stages and seconds; the stage ``setup`` is not part of the job.
        samples: text file shown at the end of report.md.

    Returns:
        The table, for a terminal.

    Raises:
        DataError: an input that is missing or malformed.
        ConfigError: a file of the report would take the place of an input.
        OutputError: the folder cannot be written.
    """
    output_dir = Path(output_dir)
    for name in ("report.md", "report.json", "loss.png"):
        check_output(output_dir / name, [path for path in (before, after, metrics, timings, samples) if path])
    first, last = read_evaluation(before), read_evaluation(after)
    lines, stages = read_metrics(metrics), read_timings(timings)
    setup = stages.pop("setup", 0.0)
    report: dict[str, Any] = {
        "before": {name: first[name] for name in FIGURES} | {"intervals": first["intervals"]},
        "after": {name: last[name] for name in FIGURES} | {"intervals": last["intervals"]},
        "chance_recall_at_1": last["chance_recall_at_1"],
        "chance_recall_at_10": last["chance_recall_at_10"],
        "recall_at_10_intervals_overlap": _interval(first, "recall_at_10").overlaps(_interval(last, "recall_at_10")),
        "lm_loss_drop": first["lm_loss"] - last["lm_loss"],
        "seconds": sum(stages.values()),
        "setup_seconds": setup,
        "stage_seconds": stages,
        "world_size": last["world_size"],
        "steps": last["step"],
        "tokens": sum(line["tokens"] for line in lines),
        "num_queries": last["num_queries"],
        "num_passages": last["num_passages"],
    }
    table = format_table(report)
    sample_text = None if samples is None else "".join(f"{line.text()}\n" for line in read_lines(samples))
    output_dir.mkdir(parents=True, exist_ok=True)
    plot_losses(lines, output_dir / "loss.png")
    with replacing(output_dir / "report.md") as file:
        file.write(_markdown(report, table, sample_text))
    write_json(output_dir / "report.json", report)
    return table


def format_table(report: dict[str, Any]) -> str:
    """Markdown table of the figures before and after training, with intervals and chance."""
    rows = ["| held-out | chance | untrained | trained |", "|---|---|---|---|"]
    for name in FIGURES:
        chance = report.get(f"chance_{name}")
        cells = ["" if chance is None else f"{chance:.3f}"]
        cells += [str(_interval(report[side], name)) for side in ("before", "after")]
        rows.append(f"| {_LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _markdown(report: dict[str, Any], table: str, samples: str | None) -> str:
    text = f"""# Report

{report["num_queries"]} held-out queries are searched in {report["num_passages"]} held-out passages. Brackets are 95 %
percentile bootstrap intervals (2000 resamples of queries, or of documents for the loss). Chance is a random order.

{table}

{report["steps"]} steps, {report["tokens"]:,} tokens, {report["world_size"]} processes, {report["seconds"]:.0f} seconds
without {report["setup_seconds"]:.0f} seconds of package set-up.

{stage_table(report["stage_seconds"])}

![Training losses](loss.png)
"""
    return text + sample_section(samples)


def stage_table(stages: Mapping[str, float]) -> str:
    """Markdown table of the seconds of each stage."""
    return "\n".join(
        ["| stage | seconds |", "|---|---|", *(f"| {name} | {seconds:.1f} |" for name, seconds in stages.items())]
    )


def sample_section(samples: str | None) -> str:
    """Markdown section with a text as it is; nothing for None."""
    return "" if samples is None else f"\n## Samples\n\n```text\n{samples.rstrip()}\n```\n"


def plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of each kind of row against the step.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    curves = {f"{loss_words(kind)} ({loss_name(kind)})": (lines, loss_name(kind)) for kind in kind_names()}
    with plot(path, xlabel="step", ylabel="loss (nats)") as axes:
        draw_curves(axes, curves)


def draw_curves(axes: Any, curves: Mapping[str, tuple[list[dict[str, Any]], str]]) -> None:
    """Draw a figure of metrics.jsonl against the step: each step faintly, and a running mean of 10 steps.

    Args:
        axes: matplotlib's.
        curves: by label, the lines and the name of the figure; one that no line has is left out.
    """
    import numpy as np
    from matplotlib.colors import TABLEAU_COLORS

    for (label, (lines, name)), color in zip(curves.items(), cycle(TABLEAU_COLORS), strict=False):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if not points:
            continue
        steps, values = np.array(points, dtype=np.float64).T
        means = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, means, color=color, label=label)
    axes.set_ylim(bottom=0)


@contextmanager
def plot(path: Path, xlabel: str, ylabel: str) -> Iterator[Any]:
    """Axes of a plot with a legend, which is written to a .png once they are drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with needed("plots need", "matplotlib", "eval"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
