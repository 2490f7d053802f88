"""The command ``megatron-grit VERB``: each module of megatron_grit.cli and of its folders is a verb."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_grit import __version__
from megatron_grit.config.commands import parse_command, suggestion
from megatron_grit.errors import EXIT_STATUS
from megatron_grit.parallel.failures import guarded

_HERE = Path(__file__).parent


def verbs() -> dict[str, Path]:
    """File of each verb, in groups. One is of two words, ``evaluate qa``, where its name begins with that of a file
    beside it, evaluate.py, or where those of all files in a folder begin with the folder's, as rag/rag_ask.py."""
    paths = [*sorted(_HERE.glob("*.py")), *sorted(_HERE.glob("*/*.py"))]
    return {_verb(path): path for path in paths if path.stem not in ("__init__", "main")}


def _verb(path: Path) -> str:
    first, _, rest = path.stem.partition("_")
    beside, folder = {each.stem for each in path.parent.glob("[!_]*.py")}, f"{path.parent.name}_"
    space = " " if rest and (first in beside or all(stem.startswith(folder) for stem in beside)) else "-"
    return space.join(filter(None, [first, rest.replace("_", "-")]))


def summary(path: Path) -> str:
    """First line of a module's docstring, without importing it."""
    return str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).partition("\n")[0]


def _print_verbs() -> None:
    known = verbs()
    print("usage: megatron-grit VERB [OPTION ...]     (megatron-grit VERB --help explains one)")
    for folder in dict.fromkeys(path.parent for path in known.values()):
        print(f"\n{summary(folder / '__init__.py')}")
        print("\n".join(f"  {verb:16s} {summary(path)}" for verb, path in known.items() if path.parent == folder))


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status."""
    argv, known = sys.argv[1:] if argv is None else argv, verbs()
    if not argv or argv[0] in ("-h", "--help"):
        status = guarded(_print_verbs, joins_job=True)
        return status if argv else EXIT_STATUS
    if argv[0] == "--version":
        print(f"megatron-grit {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in known else 1
    path = known.get(" ".join(argv[:words]).replace("_", "-"))
    if path is None:
        hint = suggestion(argv[0], known) or "; megatron-grit --help lists them"
        print(f"megatron-grit: error: unknown verb {argv[0]!r}{hint}", file=sys.stderr)
        return EXIT_STATUS
    module = ".".join(path.relative_to(_HERE.parents[1]).with_suffix("").parts)
    return int(importlib.import_module(module).main(argv[words:]))


def command(
    options: type[Any],
    run: Callable[[Any], object],
    argv: list[str] | None,
    prog: str,
    about: str,
    resumes: bool = False,
    joins_job: bool = False,
) -> int:  # many: what a verb says of itself
    """Read a command line into a dataclass and run a function on it. Returns the exit status."""
    return guarded(lambda: run(parse_command(options, argv, prog=prog, description=about)), prog, resumes, joins_job)


if __name__ == "__main__":
    sys.exit(main())
