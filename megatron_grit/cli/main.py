"""The command ``megatron-grit VERB``: each module of megatron_grit.cli is a verb."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_grit import __version__
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.parse import TrainArguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import EXIT_STATUS
from megatron_grit.parallel.failures import tell
from megatron_grit.store.logs import configure_logging


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
    """Run ``command`` and turn an error of the user's into one line. Returns the exit status."""
    configure_logging()
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return tell(error, prog)
    return 0


def resolved(arguments: TrainArguments, *, files: bool) -> RunConfig:
    """The parsed configuration, with what ``data.retro_project`` and ``model.pretrained`` decide filled in. ``files``:
    look at directories and weights, too."""
    config = resolve_retro_project(arguments.config, arguments.origins, files=files)
    if config.model.pretrained is None:
        return config
    from megatron_grit.convert.hf_in.pretrained import resolve_pretrained

    return resolve_pretrained(config, arguments.origins, files=files)


if __name__ == "__main__":
    sys.exit(main())
