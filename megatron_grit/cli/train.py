"""Train a model with the GRIT objectives.

Example:
    torchrun --nproc-per-node 8 -m megatron_grit.cli.train --config run.yaml --parallel.tensor 2
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import guarded
from megatron_grit.config.checks.checkpoint import finished_lines
from megatron_grit.config.checks.evaluation import evaluation_lines
from megatron_grit.config.checks.run import as_errors, find_problems, mesh_summary
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.parse import TrainArguments, dump_config, parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import GritError, raise_all
from megatron_grit.store.environment import check_job, planned_size
from megatron_grit.store.logs import get_logger, say_loading


def resolved(arguments: TrainArguments, *, files: bool) -> RunConfig:
    """The parsed configuration, with what ``data.retro_project`` and ``model.pretrained`` decide filled in. ``files``:
    look at directories and weights, too."""
    config = resolve_retro_project(arguments.config, arguments.origins, files=files)
    if config.model.pretrained is None:
        return config
    from megatron_grit.convert.hf_in.pretrained import resolve_pretrained

    return resolve_pretrained(config, arguments.origins, files=files)


def _run(argv: list[str] | None) -> None:
    arguments = parse_train_arguments(argv)
    is_dry = arguments.dry_run or arguments.print_config
    if not is_dry:
        check_job()
    world_size = planned_size()
    config = resolved(arguments, files=not arguments.print_config)
    problems = list(find_problems(config, world_size, files=not arguments.print_config))
    errors: list[GritError] = [*as_errors(problems, arguments.origins)]
    prospects: list[str] = []
    if arguments.dry_run and not arguments.print_config:
        from megatron_grit.evaluation.in_training import look_ahead_of_run

        more, prospects = look_ahead_of_run(config, problems)
        errors += more
    if errors:
        raise_all(errors if is_dry else errors[:1])
    if is_dry:
        lines = [mesh_summary(config, world_size), *evaluation_lines(config), *prospects]
        print("".join(f"# {line}\n" for line in lines) + dump_config(config), end="")
        return
    if finished := finished_lines(config):
        return get_logger("megatron_grit.cli.train").info(*finished)  # this file is run as __main__
    say_loading()
    from megatron_grit.convert.hf_in.pretrained import pretrained_teacher, pretrained_weights
    from megatron_grit.convert.peft.runtime import peft_adapters
    from megatron_grit.evaluation.in_training import training_evaluator
    from megatron_grit.training.trainer import train

    evaluator = training_evaluator(config)
    train(config, pretrained_weights(config), peft_adapters(config), pretrained_teacher(config), evaluator)


def main(argv: list[str] | None = None) -> int:
    """Parse, check and train, or only print the configuration. Returns the exit status."""
    return guarded(lambda: _run(argv), joins_job=True)


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    sys.exit(main())
