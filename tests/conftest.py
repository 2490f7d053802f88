"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Subprocesses of the tests import the checkout as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# The same examples in every run: a failure that nobody can repeat helps nobody.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before the workers read the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests go to the same worker: those of a file, and all that start several processes, one after another.

    Two jobs of eight gloo processes at a time spend most of it switching between threads.
    """
    for item in items:
        folder, _, name = item.nodeid.partition("::")[0].rpartition("/")
        starts_processes = item.get_closest_marker("distributed") or folder in ("tests/distributed", "tests/e2e")
        item.add_marker(pytest.mark.xdist_group("processes" if starts_processes else f"{folder}/{name}"))


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
