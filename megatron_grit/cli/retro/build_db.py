"""Build a retrieval database: chunks, embeddings, index and neighbors.

Tasks, as a comma list:
  db-build         cut documents into chunks, leave out empty and repeated ones; needs no embedder
  embed            embed all chunks, 4 bytes a channel on disk (2 with --embedding_dtype float16)
  index-train      train the index on a random sample of the chunks, and say whether its codes are too coarse
  index-add        add all chunks to it and measure its recall against exact search
  query-neighbors  find the neighbors of every chunk that is trained on
  build            all of these; index-build: index-train and index-add
  add              add documents appended to a dataset, and datasets appended to data_paths, without training again
  tombstone        remove the documents that --tombstone names; earlier versions of the database keep them
  compact          join the index files that additions made into one
  recall           measure what a search finds for the questions of --recall_queries FILE, and choose how to search
Without embed the later tasks embed what they need themselves: chunks twice, and nothing is kept on disk.

After a kill the same command resumes. Settings are kept in DIR/config.json. One that something was built with is
changed only together with --overwrite TASK. With --dry-run it is checked, in one process, and nothing is changed.

Example:
  megatron-grit build-db --project-dir db --tasks build --data_paths '[data/corpus_text_document]' \\
      --tokenizer tokenizer.model --embedder all-MiniLM-L6-v2
  torchrun --nproc-per-node 8 tools/retro/build_db.py --project-dir db --tasks embed,index-build,query-neighbors
  megatron-grit build-db --project-dir db --tasks build --validate 0.01
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.cli.main import command
from megatron_grit.config.database.megatron_names import MEGATRON_NAMES
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class BuildDbOptions:
    """What is done to a database."""

    FOREIGN = MEGATRON_NAMES
    project_dir: Path = knob(path=True)
    """Directory of the database."""
    tasks: str = "build"
    """Comma list of tasks."""
    overwrite: str = ""
    """Comma list of tasks to do again from nothing, with what follows from them."""
    validate: float | None = knob(None, above=0, at_most=1)
    """Compute this share of the blocks again and compare bit for bit, instead of building."""
    tombstone: str = ""
    """Documents that the task tombstone removes: DATASET:DOCUMENT[,...], or a file with one of them a line; a dataset
    is its prefix, the last part of it, or its number."""
    dry_run: bool = False
    """Check settings, data, tokenizer, embedder and index in this process, say what would be done, change nothing."""
    given: dict[str, Any] = knob({}, settings=RetroDbConfig)


def run(options: BuildDbOptions) -> None:
    """Build, or say what would be done."""
    from megatron_grit.retrieval.stages.preparation import Preparation
    from megatron_grit.retrieval.stages.run import dry_run, run_tasks

    settings = vars(options).copy()
    is_dry = settings.pop("dry_run")
    prepared = Preparation(**settings)
    if is_dry:
        print("\n".join(dry_run(prepared)))
    else:
        run_tasks(prepared)


def main(argv: list[str] | None = None, prog: str = "megatron-grit build-db") -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(BuildDbOptions, run, argv, prog=prog, about=__doc__, resumes=True, joins_job=True)


if __name__ == "__main__":
    sys.exit(main())
