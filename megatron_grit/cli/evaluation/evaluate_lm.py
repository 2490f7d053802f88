"""Evaluate a model with lm-eval's tasks: multiple choice, perplexity, generation.

TASKS are tasks and groups of lm-eval, YAML files of tasks, or suites of this package: open-instruct, instruction-
modelling, gritlm. Data are read from this machine alone unless --allow-downloads is given.

Example:
    megatron-grit evaluate lm --checkpoint runs/sft --tasks arc_easy,gsm8k --output-dir results/sft --allow-downloads
    megatron-grit evaluate lm --checkpoint runs/sft --tasks my_task --include-path tasks/ --output-dir results/sft
    torchrun --nproc-per-node 4 -m megatron_grit.cli.main evaluate lm --tensor 2 --checkpoint runs/sft --tasks \
instruction-modelling --output-dir results/sft

OUTPUT_DIR gets results_TIME.json as lm-eval writes it, summary.json, and the answers to all requests, from which
the same command resumes, and which other tasks with the same prompts take over.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.options import HarnessModel, HarnessTasks


@dataclass(kw_only=True)
class EvaluateLmOptions(HarnessTasks, HarnessModel):
    """What is evaluated, and what it is asked."""


def run(options: EvaluateLmOptions) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.lm.run import evaluate_lm

    report = evaluate_lm(options, options)
    if report is not None:
        print("\n".join(report.lines()))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    return command(
        EvaluateLmOptions,
        run,
        argv,
        prog="megatron-grit evaluate lm",
        about=__doc__,
        resumes=True,
        joins_job=True,
    )


if __name__ == "__main__":
    sys.exit(main())
