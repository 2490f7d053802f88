"""Say what a run needs before it is run: parameters, memory, step time, and which meshes are possible.

Example:
    megatron-grit plan --config run.yaml --world-size 64 --memory-gb 80 --parallel.tensor 2

Takes the options of megatron-grit train as well. Needs neither a GPU nor the data; the vocabulary's size comes from
model.vocab_size or from the tokenizer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

from megatron_grit.cli.main import command
from megatron_grit.cli.train import resolved
from megatron_grit.config.commands import options_of
from megatron_grit.config.knob import knob
from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import TextLengths
from megatron_grit.errors import ConfigError
from megatron_grit.planning.operations import Machine
from megatron_grit.planning.plan import make_plan
from megatron_grit.planning.text import format_plan


@dataclass(kw_only=True)
class PlanOptions:
    """Where a run will run, and on what."""

    world_size: int = knob(1, at_least=1)
    """Number of processes."""
    memory_gb: float = knob(80.0, above=0)
    """Memory of a device in GiB."""
    json: bool = False
    """Print bytes, seconds and operations as JSON."""
    machine: Machine = field(default_factory=Machine)
    lengths: TextLengths = field(default_factory=TextLengths)
    run: list[str] = knob([], rest=True)


def run(options: PlanOptions) -> None:
    """Plan and print."""
    others = [option.shown for option in options_of(PlanOptions).values()]
    config = resolved(parse_train_arguments(options.run, others=others), files=False)
    plan = make_plan(
        config,
        options.world_size,
        _vocab_size(config),
        lengths=options.lengths,
        machine=options.machine,
        memory_gib=options.memory_gb,
        device="cpu" if config.parallel.device == "cpu" else "cuda",
    )
    print(json.dumps(plan.as_dict(), indent=2) if options.json else format_plan(plan))
    if plan.problems:
        raise ConfigError(plan.problems[0])


def _vocab_size(config: RunConfig) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer is None:
        raise ConfigError("model.vocab_size is null and data.tokenizer is not set; give one of them")
    from megatron_grit.data.text.tokenizer import load_tokenizer

    return load_tokenizer(config.data.tokenizer).vocab_size


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, plan and print. Returns the exit status."""
    return command(PlanOptions, run, argv, prog="megatron-grit plan", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
