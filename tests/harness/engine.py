"""Which tests touch the engine: they are run with each megatron-core that is supported, the others with one.

A test file touches it that imports a module whose import brings megatron-core, or that starts ranks or forked commands;
helpers of the tests that it imports are looked at too. What a function of the package imports when it is called is not
seen in its text, nor what a process does that a test starts: while an unmarked test runs, such an import fails, there
and here, and says that the test, or its file, is to be marked with ``pytest.mark.engine``.
"""

from __future__ import annotations

import builtins
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "megatron"
FOLDERS = ("distributed", "e2e", "gpu")
"""Whose tests count, whatever they import."""
OURS = ("megatron_grit", "tests", "benchmarks", "examples", "tools")
_IMPORT = re.compile(
    r"^([ \t]*)(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([\w.]+))", re.MULTILINE
)
STARTED = ("tests.harness.ranks", "tests.harness.command")
"""Modules that count because processes with the engine are forked by them."""
REFUSING = Path(__file__).with_name("refusing")


def modules_of(text: str, *, everywhere: bool) -> set[str]:
    """Names that imports of a source mention; those inside functions only if ``everywhere``."""
    found = set()
    for indent, source, names, module in _IMPORT.findall(text):
        if indent and not everywhere:
            continue
        found.add(source or module)
        found |= {f"{source}.{name}" for name in re.findall(r"\w+", names.partition("#")[0])}
    return found


def path_of(module: str) -> Path | None:
    """The file of one of our modules."""
    stem = ROOT.joinpath(*module.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _with_packages(names: set[str]) -> set[str]:
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)}


@cache
def _needs(path: Path, everywhere: bool) -> frozenset[str]:
    names = modules_of(path.read_text(encoding="utf-8"), everywhere=everywhere)
    return frozenset(_with_packages({name for name in names if name.partition(".")[0] in (ENGINE, *OURS)}))


@cache
def is_engine_module(module: str) -> bool:
    """Whether importing it brings the engine, or processes that have it."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        parts = name.split(".")
        if parts[0] == ENGINE or name in STARTED:
            return True
        path = path_of(name)
        if path is not None and parts[0] in OURS:
            todo += _needs(path, parts[0] != "megatron_grit")
    return False


@cache
def starts_processes(path: Path) -> bool:
    """Whether the tests of a file start ranks or forked commands, or are of a folder that counts."""
    return path.relative_to(ROOT).parts[1] in FOLDERS or any(name in STARTED for name in _needs(path, True))


@cache
def touches(path: Path) -> bool:
    """Whether the tests of a file touch the engine."""
    if starts_processes(path):
        return True
    conftests = [folder / "conftest.py" for folder in path.parents if folder.is_relative_to(ROOT / "tests" / "unit")]
    files = (path, *filter(Path.is_file, conftests))
    return any(is_engine_module(module) for file in files for module in _needs(file, True))


def mark(items: list[pytest.Item]) -> None:
    """Mark what touches the engine."""
    for item in items:
        if touches(item.path):
            item.add_marker("engine")


@contextmanager
def _processes_refuse() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH", "")
    path = os.environ["PYTHONPATH"] = f"{REFUSING}{os.pathsep}{before}"
    try:
        yield
    finally:
        if os.environ.get("PYTHONPATH") == path:  # else a fixture has set it
            os.environ["PYTHONPATH"] = before


@contextmanager
def refused() -> Iterator[None]:
    """No import of the engine's modules, not even of loaded ones, in this process and in those that it starts."""
    find, import_module = builtins.__import__, importlib.import_module

    def look_at(name: str) -> None:
        if name.partition(".")[0] in (ENGINE, "megatron_grit") and is_engine_module(name):
            pytest.fail(f"the test imports {name} and is not marked: mark it, or its file, with pytest.mark.engine")

    def guarded(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name.startswith(ENGINE) and not level:
            for each in (name, *(f"{name}.{part}" for part in fromlist or ())):
                look_at(each)
        return find(name, globals, locals, fromlist, level)

    def guarded_module(name: str, package: str | None = None) -> Any:
        look_at(name)
        return import_module(name, package)

    with (
        _processes_refuse(),
        mock.patch.object(builtins, "__import__", guarded),
        mock.patch.object(importlib, "import_module", guarded_module),
    ):
        yield
