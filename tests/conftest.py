"""Fixtures and settings for all tests."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from megatron_grit.config.commands import note_command
from tests.harness import cost, engine, engine_calls, shards

ROOT = Path(__file__).resolve().parents[1]

# Subprocesses of the tests import the checkout as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Started in the background of a script, this process ignores Ctrl-C, and those that tests start would as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a failure that nobody can repeat helps nobody.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


pytest_plugins = ["tests.harness.slots", "tests.harness.tiny_model"]

# Files with jobs of several processes take longest: begun last, they would keep one worker busy while others are idle.
DEAR_FOLDERS = ("tests/distributed/", "tests/e2e/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="print CPU seconds of folders, dearest files and tests")
    parser.addoption("--engine-calls", action="store_true", help="compare the mark of the engine with what tests call")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu"):
        config.pluginmanager.register(cost.Cost(config), "cost")
    if config.getoption("--engine-calls"):
        config.pluginmanager.register(engine_calls.plugin(), "engine_calls")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what is in another shard."""
    if not os.environ.get("SHARD") or not collection_path.name.startswith("test_"):
        return None
    number, count = shards.parse(os.environ["SHARD"])
    return None if shards.is_in(collection_path.relative_to(ROOT).as_posix(), number, count) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    engine.mark(items)
    items.sort(key=lambda item: not item.nodeid.startswith(DEAR_FOLDERS))


def pytest_collection_finish() -> None:
    """Each mesh that is taken down is followed by a garbage collection, which need not look at what is imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Nor at what a module's tests have imported and left, which took a third of the processor time of all tests."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    """What is not marked touches no engine, nor do its fixtures."""
    with nullcontext() if item.get_closest_marker("engine") else engine.refused():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """See :func:`pytest_runtest_setup`."""
    with nullcontext() if item.get_closest_marker("engine") else engine.refused():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Any:
    """Commands that run in this process are not remembered by what is written after them."""
    note_command("", ())
    result = yield
    note_command("", ())
    return result


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public text that lies beside the checkout on the machines of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the public data set folder {folder} is not on this machine")
    return folder
