"""Command line of the tools that build indexed files from records."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_grit.data.builders.build_report import BuildReport
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.builders.record_encoder import Limits
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.chat_format import TOKENIZER
from megatron_grit.data.text.chat_templates import TEMPLATES
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.store.logs import configure_logging


def add_build_flags(parser: argparse.ArgumentParser, *, template: str, embeds: bool) -> None:
    """Add the flags.

    Args:
        parser: the parser.
        template: default of ``--template``.
        embeds: whether embedding records are taken as well.
    """
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="JSONL files or patterns, plain, .gz or .zst, read in this order")
    add("--output-prefix", required=True, help="PREFIX.bin, .idx, .json, .report.json and .report.png are written")
    add("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or their folder")
    add("--template", default=template, help=f"of conversations: {', '.join(TEMPLATES)}, {TOKENIZER}, or a .yaml file")
    if embeds:
        add("--query-max-len", type=int, default=Limits.query, help="tokens of a query, template included")
        add("--passage-max-len", type=int, default=Limits.passage, help="tokens of a passage, template included")
    add("--generative-max-len", type=int, default=Limits.generative, help="tokens of a text or conversation")
    add(
        "--over-long",
        choices=("drop", "truncate", "split"),
        default="truncate",
        help="a text or conversation beyond that; split: into several, conversations between turns",
    )
    add("--min-len", type=int, default=0, help="drop records with a text of fewer tokens, template included")
    add("--max-len", type=int, help="drop records with a text of more tokens before any cut")
    add("--deduplicate", action="store_true", help="keep the first of records that say the same but for white space")
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help="drop records that share an n-gram with these")
    add("--ngram", type=int, default=13, help="words of an n-gram")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenise; default: all cores")
    add("--partitions", type=int, default=1, help="parts of the input, each of which is done once")
    add("--partition", type=int, help="build only this one, counted from 0; run once more without it to join them")
    add("--on-error", choices=("stop", "skip"), default="stop", help="a line that is not a record")
    add("--on-filtered", choices=("drop", "stop"), default="drop", help="an empty text, an instruction too long ...")
    add("--overwrite", action="store_true", help="replace the files of an earlier build")
    add("--no-checksum", dest="checksum", action="store_false", help="write no checksums into PREFIX.json")


def build_from_flags(arguments: argparse.Namespace, *, description: str) -> BuildReport:
    """Build as the flags say.

    Args:
        arguments: what a parser with :func:`add_build_flags` read.
        description: name on the progress bar.

    Raises:
        GritError: see :func:`~megatron_grit.data.builders.grit_builder.build_grit`.
    """
    embeds = hasattr(arguments, "query_max_len")
    sizes = {"query": arguments.query_max_len, "passage": arguments.passage_max_len} if embeds else {}
    return build_grit(
        arguments.input,
        arguments.output_prefix,
        arguments.tokenizer,
        Limits(generative=arguments.generative_max_len, **sizes),
        kind=None if embeds else RowKind.GENERATIVE,
        on_error=arguments.on_error,
        on_filtered=arguments.on_filtered,
        workers=arguments.workers,
        partitions=arguments.partitions,
        partition=arguments.partition,
        overwrite=arguments.overwrite,
        checksum=arguments.checksum,
        progress=True,
        description=description,
        template=arguments.template,
        over_long=arguments.over_long,
        min_tokens=arguments.min_len,
        max_tokens=arguments.max_len,
        held_out=tuple(arguments.decontaminate),
        ngram=arguments.ngram,
        deduplicate=arguments.deduplicate,
    )


def run_build(name: str, description: str | None, *, template: str, embeds: bool) -> int:
    """Parse the command line of a tool, build, and print the report. Returns the exit status.

    Args:
        name: of the tool, on the bar and in messages.
        description: of the tool, for ``--help``.
        template: default of ``--template``.
        embeds: whether embedding records are taken as well.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_flags(parser, template=template, embeds=embeds)
    arguments = parser.parse_args()
    configure_logging()
    try:
        report = build_from_flags(arguments, description=name)
    except (GritError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(report.lines()))
    return 0
