"""Evaluate a model on tasks of MTEB, by the package mteb: pip install 'megatron-grit[eval]'.

TASKS are mteb's names, or suites: quick has 12 tasks, english the 56 of the first English leaderboard. Results stand in
OUTPUT_DIR in mteb's own format, with their means in scores.json; what is there is not computed again, so a killed run
resumes, and further tasks can be added.

With --data-folder nothing is fetched: DATA_FOLDER/TASK/ holds a task's data set, in the layout of its repository at
Hugging Face, or for retrieval in that of BEIR (corpus.jsonl, queries.jsonl, qrels/test.tsv).

Example:
    megatron-grit evaluate mteb --checkpoint runs/grit --tasks quick --output-dir results/grit
    megatron-grit evaluate mteb --checkpoint runs/grit --tasks STSBenchmark SciFact --data-folder data --output-dir out
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TextLength
from megatron_grit.evaluation.mteb.options import MtebOptions


@dataclass(kw_only=True)
class EvaluateMtebOptions(MtebOptions, BatchSize, TextLength, ModelOptions):
    """What is evaluated."""

    output_dir: str = knob(path=True)
    """Folder for the results of this model with these options."""


def run(options: EvaluateMtebOptions) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.mteb.run import evaluate_mteb, format_scores
    from megatron_grit.evaluation.tasks.task import Lengths

    lengths = Lengths(max_length=options.max_length, batch_tokens=options.batch_tokens)
    chosen = MtebOptions(**{each.name: getattr(options, each.name) for each in fields(MtebOptions)})
    print(format_scores(evaluate_mteb(options.checkpoint, options.output_dir, chosen, lengths, device=options.device)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and evaluate. Returns the exit status."""
    return command(EvaluateMtebOptions, run, argv, prog="megatron-grit evaluate mteb", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
