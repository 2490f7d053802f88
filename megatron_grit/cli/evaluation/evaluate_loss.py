"""Write the next-token loss of each record of a file, a line of JSON for each.

Example:
    megatron-grit build-sft --input chats.jsonl --output-prefix chats --tokenizer tokenizer.model --template tulu
    megatron-grit evaluate loss --checkpoint runs/sft --input chats --output losses.jsonl

A line has record, loss_sum (nats), num_tokens (supervised tokens) and loss, their quotient; null where nothing is
supervised. Records that build-sft dropped are in chats.rejected.jsonl.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions


@dataclass(kw_only=True)
class EvaluateLossOptions(BatchSize, ModelOptions):
    """What is measured."""

    input: str = knob(path=True)
    """Prefix of a generative indexed file, of texts or conversations."""
    output: str = knob(path=True)
    """JSONL file for the losses."""


def run(options: EvaluateLossOptions) -> None:
    """Measure, write, and print the mean."""
    from megatron_grit.evaluation.losses import write_losses

    settings = vars(options).copy()
    report = write_losses(settings.pop("checkpoint"), settings.pop("input"), settings.pop("output"), **settings)
    print(f"{options.output}: {report.num_records} records with {report.num_tokens} supervised tokens")
    print(f"loss {report.loss.value:.4f} nats a token   95 % interval {report.loss.low:.4f} to {report.loss.high:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure. Returns the exit status."""
    return command(EvaluateLossOptions, run, argv, prog="megatron-grit evaluate loss", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
