"""The command ``megatron-grit VERB``: each module of megatron_grit.cli is a verb."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_grit import __version__
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.parallel.logs import configure_logging

_SECONDS_FOR_RANK_0 = 5.0


def verbs() -> dict[str, str]:
    """First line of each verb's docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__init__", "main"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = docstring.partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    known = verbs()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megatron-grit VERB [OPTIONS]     (megatron-grit VERB --help for the options of one)\n")
        print("\n".join(f"  {name:10s} {summary}" for name, summary in known.items()))
        return 0 if argv else EXIT_STATUS
    if argv[0] == "--version":
        print(f"megatron-grit {__version__}")
        return 0
    if argv[0] not in known:
        near = difflib.get_close_matches(argv[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"megatron-grit: error: unknown verb {argv[0]!r}; {hint}", file=sys.stderr)
        return EXIT_STATUS
    return int(importlib.import_module(f"megatron_grit.cli.{argv[0]}").main(argv[1:]))


def guarded(command: Callable[[], object], prog: str = "megatron-grit") -> int:
    """Run ``command`` and turn an error of the user's into one line. Returns the exit status.

    In a job of several processes rank 0 speaks at once. Another rank waits: if the error is everybody's, the launcher
    ends it meanwhile, after rank 0 spoke; if the error is its own, it speaks.
    """
    configure_logging()
    try:
        command()
    except GritError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"{prog}: error: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return EXIT_STATUS
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
