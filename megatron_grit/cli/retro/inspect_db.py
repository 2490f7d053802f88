"""Show what a retrieval database holds: counts, versions, index and recall; chunks, documents, neighbors; or search it.

Example:
  megatron-grit inspect-db --project-dir db
  megatron-grit inspect-db --project-dir db --chunk 12 --document corpus_text_document:3
  megatron-grit inspect-db --project-dir db --neighbors corpus_text_document:3:64
  megatron-grit inspect-db --project-dir db --search "who wrote it" --num 5 --json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class InspectDbOptions:
    """What is shown of a database."""

    project_dir: Path = knob(path=True)
    """Directory of the database."""
    version: int | None = knob(None, at_least=1)
    """Which state of it. null: that of config.json, or the newest."""
    chunk: list[int] = knob([], at_least=0)
    """Ids of chunks to show, with what follows."""
    document: list[str] = knob([])
    """Documents to show: DATASET:DOCUMENT."""
    neighbors: list[str] = knob([])
    """Chunks whose neighbors to show: PREFIX:DOCUMENT:OFFSET."""
    search: list[str] = knob([], verbatim=True)
    """Texts to search for."""
    num: int = knob(3, at_least=1)
    """Neighbors and hits to show."""
    verify: bool = False
    """Read all files and compare their checksums."""
    json: bool = False
    """Print JSON."""


def run(options: InspectDbOptions) -> None:
    """Print."""
    from megatron_grit.retrieval.stages.inspect import Questions, inspect_database, report_lines

    questions = Questions(
        chunks=options.chunk,
        documents=options.document,
        neighbors=options.neighbors,
        searches=options.search,
        k=options.num,
    )
    report = inspect_database(options.project_dir, questions, version=options.version, verify=options.verify)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else "\n".join(report_lines(report)))


def main(argv: list[str] | None = None, prog: str = "megatron-grit inspect-db") -> int:
    """Parse the command line and print. Returns the exit status."""
    return command(InspectDbOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
