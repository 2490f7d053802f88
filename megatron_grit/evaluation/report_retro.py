"""The report of Retro's path: losses of a decoder alone, with neighbors and with those of other chunks, and answers to
questions; report.md, report.json, loss.png and overlap.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.data.text.lines import parse_json, read_lines
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.report import (
    draw_curves,
    plot,
    read_metrics,
    read_timings,
    sample_section,
    stage_table,
)
from megatron_grit.store.files import check_output, replacing, write_json

ARMS = {"gpt": "GPT", "retro": "Retro", "retro_shuffled": "Retro, neighbors of other chunks"}
"""What is compared, and its name in tables."""
FILES = ("report.md", "report.json", "loss.png", "overlap.png")
_LOSS = "valid_loss"
_OVERLAP = f"{_LOSS}_overlap/"
_SAME_LOSS = 1e-4
"""Nats between two measurements of the same weights: on other numbers of processes, with and without a closed gate."""


def read_validation(run: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines of a run's metrics.jsonl, and the last of them with a loss on held-out texts.

    Raises:
        DataError: it cannot be read, or has no such loss.
    """
    path = Path(run) / "metrics.jsonl"
    lines = read_metrics(path)
    measured = [line for line in lines if _LOSS in line]
    if not measured:
        raise DataError(f"has no {_LOSS}; train with data.valid", path=path)
    return lines, measured[-1]


def read_scores(path: str | Path) -> dict[str, Any]:
    """Read a file of ``megatron-grit evaluate qa``.

    Raises:
        DataError: it cannot be read, or lacks a figure of the report.
    """
    try:
        figures = parse_json(Path(path).read_bytes())
        return {name: figures[name] for name in ("em", "f1", "num_questions")} | {
            "intervals": {name: figures["intervals"][name] for name in ("em", "f1")}
        }
    except (OSError, DataError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read: {error!r}; run megatron-grit evaluate qa again", path=path) from error


def compare_runs(
    *, gpt: str | Path, gpt_by_overlap: str | Path, retro: str | Path, retro_shuffled: str | Path
) -> tuple[dict[str, Any], dict[str, tuple[list[dict[str, Any]], str]]]:
    """Losses on held-out texts, and what :func:`draw_curves` draws of the training. Arguments and errors as for
    :func:`write_retro_report`."""
    found = {name: read_validation(run) for name, run in zip(ARMS, (gpt, retro, retro_shuffled), strict=True)}
    curves = {ARMS[name]: (lines, "loss") for name, (lines, _) in found.items()}
    losses = {name: last[_LOSS] for name, (_, last) in found.items()}
    sides = {"gpt": read_validation(gpt_by_overlap)[1], "retro": found["retro"][1]}
    for run, side in zip((gpt_by_overlap, retro), sides.values(), strict=True):
        if f"{_LOSS}_without_copies" not in side:
            raise DataError("has no losses by overlap; the run has to read neighbors", path=Path(run) / "metrics.jsonl")
    if abs(sides["gpt"][_LOSS] - losses["gpt"]) > _SAME_LOSS:
        raise DataError(
            f"says a loss of {sides['gpt'][_LOSS]:.4f} and not {losses['gpt']:.4f}; measure the weights of {gpt} again",
            path=Path(gpt_by_overlap) / "metrics.jsonl",
        )
    lines, last = found["retro"]
    buckets = [key.removeprefix(_OVERLAP) for key in last if key.startswith(_OVERLAP)]
    figures = {
        "arms": losses,
        "without_copies": {name: side[f"{_LOSS}_without_copies"] for name, side in sides.items()},
        "by_overlap": {name: {bucket: side[_OVERLAP + bucket] for bucket in buckets} for name, side in sides.items()},
        "tokens_by_overlap": {bucket: last[f"valid_tokens_overlap/{bucket}"] for bucket in buckets},
        "valid_tokens": last["valid_tokens"],
        "tokens": sum(line.get("tokens", 0) for line in lines),
    }
    return figures, curves


def write_retro_report(  # many: what the path leaves
    output_dir: str | Path,
    *,
    gpt: str | Path,
    gpt_by_overlap: str | Path,
    retro: str | Path,
    retro_shuffled: str | Path,
    scores: str | Path,
    timings: str | Path,
    samples: str | Path | None = None,
) -> str:
    """Write report.md, report.json, loss.png and overlap.png into ``output_dir``.

    Args:
        output_dir: folder of the report.
        gpt: output directory of the run without neighbors.
        gpt_by_overlap: of the run that measured its weights beside the neighbors, behind a closed gate.
        retro: of the run with neighbors.
        retro_shuffled: of the run with ``data.retro_shuffle``.
        scores: file of ``megatron-grit evaluate qa``.
        timings: stages and seconds; the stage ``setup`` is not part of the job.
        samples: text file shown at the end of report.md.

    Returns:
        The tables, for a terminal.

    Raises:
        DataError: an input that is missing or malformed, or ``gpt_by_overlap`` is of other weights than ``gpt``.
        ConfigError: a file of the report would take the place of an input, or matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    output_dir = Path(output_dir)
    for name in FILES:
        check_output(output_dir / name, [path for path in (scores, timings, samples) if path])
    figures, curves = compare_runs(gpt=gpt, gpt_by_overlap=gpt_by_overlap, retro=retro, retro_shuffled=retro_shuffled)
    stages = read_timings(timings)
    setup, state = stages.pop("setup", 0.0), parse_json((resolve_checkpoint(retro) / "state.json").read_bytes())
    report: dict[str, Any] = {
        **figures,
        **read_scores(scores),
        "seconds": sum(stages.values()),
        "setup_seconds": setup,
        "stage_seconds": stages,
        "world_size": state["world_size"],
        "steps": state["step"],
    }
    table = format_tables(report)
    sample_text = None if samples is None else "".join(f"{line.text()}\n" for line in read_lines(samples))
    output_dir.mkdir(parents=True, exist_ok=True)
    with plot(output_dir / "loss.png", xlabel="step", ylabel="loss (nats)") as axes:
        draw_curves(axes, curves)
    with plot(
        output_dir / "overlap.png", xlabel="longest run in common with what is read, of a chunk", ylabel="loss (nats)"
    ) as axes:
        for name, of_arm in report["by_overlap"].items():
            axes.plot(list(of_arm), list(of_arm.values()), marker="o", label=ARMS[name])
    with replacing(output_dir / "report.md") as file:
        file.write(_markdown(report, table, sample_text))
    write_json(output_dir / "report.json", report)
    return table


def format_tables(report: dict[str, Any]) -> str:
    """Markdown tables of the losses, by overlap too, and of the answers."""
    buckets = list(report["tokens_by_overlap"])
    heads = ["held-out loss (nats)", "all", *(_overlap_words(bucket) for bucket in buckets)]
    rows = [heads, ["---"] * len(heads)]
    for name, loss in report["arms"].items():
        of_arm = report["by_overlap"].get(name, {})
        rows.append([ARMS[name], f"{loss:.3f}", *(f"{of_arm[key]:.3f}" if key in of_arm else "" for key in buckets)])
    rows.append(["tokens", f"{report['valid_tokens']:,}", *(f"{n:,}" for n in report["tokens_by_overlap"].values())])
    rows += [[], ["held-out questions", "exact match", "F1"], ["---"] * 3]
    scored = (_interval(report, name) for name in ("em", "f1"))
    rows.append([f"{report['num_questions']}", *map(str, scored)])
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows)


def _interval(figures: dict[str, Any], name: str) -> Interval:
    low, high = figures["intervals"][name]
    return Interval(value=figures[name], low=low, high=high)


def _overlap_words(bucket: str) -> str:
    return "nothing read" if bucket == "none" else f"overlap up to {bucket.removeprefix('to_')}"


def _markdown(report: dict[str, Any], table: str, samples: str | None) -> str:
    arms = report["arms"]
    text = f"""# Report

Three decoders begin with the same weights and see the same samples in the same order: one alone, one that reads the
neighbors of each chunk, and one that reads those of other chunks. Overlap is the longest run of tokens that a chunk has
in common with a neighbor that is read while it is predicted, as a share of the chunk: what is gained where it is large
is copied.

Neighbors take {arms["gpt"] - arms["retro"]:+.3f} nats off the loss, those of other chunks
{arms["gpt"] - arms["retro_shuffled"]:+.3f}; where overlap is at most 0.25, the loss is
{report["without_copies"]["gpt"]:.3f} without neighbors and {report["without_copies"]["retro"]:.3f} with them.
This is one seed: smaller differences than between seeds say nothing.

{table}

Brackets are 95 % bootstrap intervals over questions. {report["steps"]} steps and {report["tokens"]:,} tokens for each
decoder, {report["world_size"]} processes, {report["seconds"]:.0f} seconds without {report["setup_seconds"]:.0f} seconds
of package set-up.

{stage_table(report["stage_seconds"])}

![Training losses](loss.png)

![Loss by overlap](overlap.png)
"""
    return text + sample_section(samples)
