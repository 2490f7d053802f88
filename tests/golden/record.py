"""Record what the commands of a checkout make of fixed inputs, or compare it with what was recorded.

Examples:
    python -m tests.golden.record                                    # compare this checkout with the recorded results
    python -m tests.golden.record --parts indexed flags
    python -m tests.golden.record --tree ../older --write            # record another checkout
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden.parts import FLOATS, PARTS, arithmetic, record, versions

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def recorded_path() -> Path:
    """Results of this version of Python, each of which stands for one version of the engine."""
    return HERE / f"py{sys.version_info[0]}{sys.version_info[1]}.json"


def differences(wanted: Any, found: Any, where: str = "") -> Iterator[str]:
    """A line for each place in which two results differ. Options may be added, but not lost."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            place = f"{where}: {key}" if where else str(key)
            if key not in found:
                yield f"{place}: is missing"
            elif key not in wanted:
                yield f"{place}: is new"
            else:
                yield from differences(wanted[key], found[key], place)
    elif isinstance(wanted, list) and isinstance(found, list):
        if where.startswith("flags: "):
            yield from (f"{where}: --{name} is gone" for name in wanted if name not in found)
        elif len(wanted) != len(found) and all(isinstance(item, str) for item in [*wanted, *found]):
            yield from (f"{where}: is missing: {item}" for item in wanted if item not in found)
            yield from (f"{where}: is new: {item}" for item in found if item not in wanted)
        else:
            for number, pair in enumerate(zip(wanted, found, strict=False)):
                yield from differences(*pair, f"{where}[{number}]")
            if len(wanted) != len(found):
                yield f"{where}: {len(wanted)} entries recorded, {len(found)} found"
    elif wanted != found:
        yield f"{where}: recorded {wanted!r}, found {found!r}"


def compare(found: dict[str, Any]) -> list[str]:
    """Lines of :func:`differences` to what is recorded for this version of Python, of what can be compared here."""
    recorded = json.loads(recorded_path().read_text())["parts"]
    names = [name for name in found if reason_to_skip(name) is None]
    lines = list(differences({name: recorded[name] for name in names}, {name: found[name] for name in names}))
    if "database" in found and "database" not in names:
        lines += differences(*({"database": _chunks(part["database"])} for part in (recorded, found)))
    return lines


def _chunks(database: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The files of a database that follow from its texts alone, without vectors."""
    return {
        state: {file: digest for file, digest in files.items() if "/db/" in file and "/versions/" not in file}
        for state, files in database.items()
    }


def reason_to_skip(name: str) -> str | None:
    """Why a part cannot be compared as a whole: it holds floating-point numbers of other versions or of another
    processor."""
    if name not in FLOATS:
        return None
    recorded = json.loads(recorded_path().read_text())
    if recorded["versions"] != versions():
        return f"{name} was recorded with {recorded['versions']}"
    if recorded["arithmetic"].get(name) != arithmetic():
        return (
            f"{name} was recorded on a processor whose floating-point results differ from this one's in the last bits"
        )
    return None


def write(found: dict[str, Any]) -> None:
    """Put parts in the place of those that are recorded."""
    path = recorded_path()
    before = json.loads(path.read_text()) if path.exists() else {"parts": {}, "arithmetic": {}}
    parts = before["parts"] | found
    content = {
        "versions": versions(),
        "arithmetic": before["arithmetic"] | {name: arithmetic() for name in found if name in FLOATS},
        "parts": {name: parts[name] for name in PARTS if name in parts},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Parse the command line, and record or compare. Returns the exit status: 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose commands are run (default: this one)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--write", action="store_true", help="write what is found in place of comparing it")
    parser.add_argument("--folder", type=Path, help="work here and keep the files (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines = 0
        for name, part in record(arguments.tree, folder, arguments.parts):
            if arguments.write:
                write({name: part})
                continue
            if (reason := reason_to_skip(name)) is not None:
                print(f"not compared as a whole: {reason}", flush=True)
            for line in compare({name: part}):
                print(line, flush=True)
                lines += 1
    if not arguments.write:
        print(f"{lines} differences" if lines else "all as recorded")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
