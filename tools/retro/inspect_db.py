"""Show what a retrieval database holds: counts, versions, index and recall; chunks, documents, neighbors; or search it.

Example:
  python tools/retro/inspect_db.py --project-dir db
  python tools/retro/inspect_db.py --project-dir db --chunk 12 --document corpus_text_document:3
  python tools/retro/inspect_db.py --project-dir db --neighbors corpus_text_document:3:64
  python tools/retro/inspect_db.py --project-dir db --search "who wrote it" --num 5 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_grit.cli.main import guarded


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project-dir", type=Path, required=True, help="directory of the database")
    parser.add_argument("--version", type=int, help="which state of it (default: that of config.json, or the newest)")
    parser.add_argument("--chunk", type=int, nargs="+", default=[], help="ids of chunks to show, with what follows")
    parser.add_argument("--document", nargs="+", default=[], metavar="DATASET:DOCUMENT", help="documents to show")
    parser.add_argument(
        "--neighbors", nargs="+", default=[], metavar="PREFIX:DOCUMENT:OFFSET", help="chunks whose neighbors to show"
    )
    parser.add_argument("--search", nargs="+", default=[], metavar="TEXT", help="texts to search for")
    parser.add_argument("--num", type=int, default=3, help="neighbors and hits to show")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> int:
    """Parse the command line and print. Returns the exit status."""
    return guarded(_run, "inspect_db")


def _run() -> None:
    arguments = _arguments()
    from megatron_grit.retrieval.stages.inspect import Questions, inspect_database, report_lines

    questions = Questions(
        chunks=arguments.chunk,
        documents=arguments.document,
        neighbors=arguments.neighbors,
        searches=arguments.search,
        k=arguments.num,
    )
    report = inspect_database(arguments.project_dir, questions, version=arguments.version, verify=arguments.verify)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    raise SystemExit(main())
