"""Say what a run needs before it is run: parameters, memory, step time, and which meshes are possible.

Example:
    megatron-grit plan --config run.yaml --world-size 64 --memory-gb 80 --parallel.tensor 2

Takes the options of megatron-grit train as well. Needs neither a GPU nor the data; the vocabulary's size comes from
model.vocab_size or from the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_grit.cli.main import guarded, resolved
from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.planning.operations import Machine
from megatron_grit.planning.plan import TextLengths, make_plan
from megatron_grit.planning.text import format_plan


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, plan and print. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    machine, lengths = Machine(), TextLengths()
    option = parser.add_argument
    option("--world-size", type=int, default=1, help="number of processes (default: 1)")
    option("--memory-gb", type=float, default=80.0, help="memory of a device in GiB (default: 80)")
    option("--peak-tflops", type=float, default=machine.peak_tflops, help="of a device (default: %(default)s, an H100)")
    option("--efficiency", type=float, default=machine.efficiency, help="share of it reached (default: %(default)s)")
    option("--link-gbs", type=float, default=machine.link_gbs, help="GB/s in a node (default: %(default)s)")
    option("--network-gbs", type=float, default=machine.network_gbs, help="GB/s between nodes (default: %(default)s)")
    option("--devices-per-node", type=int, default=machine.devices_per_node, help="default: %(default)s")
    option("--text-tokens", type=int, default=lengths.text_tokens, help="mean of a text (default: %(default)s)")
    option("--sequence-tokens", type=int, default=lengths.sequence_tokens, help="mean (default: %(default)s)")
    option("--supervised-share", type=float, default=lengths.supervised_share, help="labels (default: %(default)s)")
    option("--json", action="store_true", help="print bytes, seconds and operations as JSON")
    arguments, rest = parser.parse_known_args(argv)
    return guarded(lambda: _run(arguments, rest), "megatron-grit plan")


def _run(arguments: argparse.Namespace, rest: list[str]) -> None:
    for name in ("world_size", "memory_gb", "peak_tflops", "efficiency", "link_gbs", "network_gbs", "devices_per_node"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {getattr(arguments, name)}")
    config = resolved(parse_train_arguments(rest), files=False)
    plan = make_plan(
        config,
        arguments.world_size,
        _vocab_size(config),
        lengths=TextLengths(**{name: getattr(arguments, name) for name in vars(TextLengths())}),
        machine=Machine(**{name: getattr(arguments, name) for name in vars(Machine())}),
        memory_gib=arguments.memory_gb,
        device="cpu" if config.parallel.device == "cpu" else "cuda",
    )
    print(json.dumps(plan.as_dict(), indent=2) if arguments.json else format_plan(plan))
    if plan.problems:
        raise ConfigError(plan.problems[0])


def _vocab_size(config: RunConfig) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer is None:
        raise ConfigError("model.vocab_size is null and data.tokenizer is not set; give one of them")
    from megatron_grit.data.text.tokenizer import load_tokenizer

    return load_tokenizer(config.data.tokenizer).vocab_size


if __name__ == "__main__":
    sys.exit(main())
