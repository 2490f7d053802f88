"""The machinery of the tests itself: what touches the engine, shards, and slots for processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.harness import engine, shards
from tests.harness.slots import FOLDER, NUM_SLOTS, slots


@pytest.mark.parametrize(
    ("module", "touches"),
    [
        ("megatron.core.parallel_state", True),
        ("megatron_grit.models.decoder", True),
        ("megatron_grit.convert.peft.merge", True),
        ("megatron_grit.config.parse", False),
        ("megatron_grit.data.rows.loader", False),
        ("tests.rows", False),
        ("megatron_grit.retrieval.work", False),
        ("tests.distributed.grid_run", True),
        ("tests.harness.ranks", True),
    ],
)
def test_which_modules_bring_the_engine(module: str, touches: bool) -> None:
    assert engine.is_engine_module(module) is touches


def test_imports_are_read_wherever_they_are() -> None:
    source = "import os\nfrom a.b import (\n    c,\n    d,\n)\n\ndef f():\n    from megatron import core\n"
    assert {"os", "a.b", "a.b.c", "a.b.d"} <= engine.modules_of(source, everywhere=False)
    assert "megatron.core" not in engine.modules_of(source, everywhere=False)
    assert "megatron.core" in engine.modules_of(source, everywhere=True)


@pytest.mark.engine
def test_an_unmarked_test_cannot_touch_the_engine() -> None:
    """The control: without the refusal the same imports pass."""
    code = "import megatron_grit.parallel.launch; from megatron.core import parallel_state"
    with engine.refused():
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert process.returncode == 70 and "mark the test" in process.stderr
        import megatron_grit.config.parse

        assert megatron_grit.config.parse
        for statement in (
            "import megatron.core",
            "from megatron_grit.models import decoder",
            "import importlib; importlib.import_module('megatron_grit.training.step')",
        ):
            with pytest.raises(pytest.fail.Exception, match="is not marked"):
                exec(statement)
    exec("from megatron_grit.models import decoder")


def test_shards_are_all_files_once(repository: Path) -> None:
    files = [path.relative_to(repository).as_posix() for path in (repository / "tests").rglob("test_*.py")]
    for count in (1, 2, 5):
        homes = [[number for number in range(1, count + 1) if shards.is_in(file, number, count)] for file in files]
        assert all(len(home) == 1 for home in homes)
        assert {number for home in homes for number in home} == set(range(1, count + 1))
    assert shards.parse("2/5") == (2, 5)
    for wrong in ("0/5", "6/5", "2", "a/b"):
        with pytest.raises(pytest.UsageError, match="give i/n"):
            shards.parse(wrong)


def _hold(wanted: int, folder: Path) -> None:
    with slots(wanted):
        (folder / f"holds-{os.getpid()}").touch()
        time.sleep(600)


def test_slots_are_shared_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs fit, a third does not while one of them runs, and a process that is killed holds none."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    half = NUM_SLOTS // 2
    jobs = [get_context("fork").Process(target=_hold, args=(size, tmp_path)) for size in (half, half, NUM_SLOTS + 5)]

    def wait_for(job: Any) -> None:
        while not (tmp_path / f"holds-{job.pid}").exists():
            assert job.is_alive()
            time.sleep(0.02)

    try:
        for job in jobs[:2]:
            job.start()
        for job in jobs[:2]:
            wait_for(job)
        jobs[2].start()
        for job in jobs[:2]:
            time.sleep(0.3)
            assert not (tmp_path / f"holds-{jobs[2].pid}").exists()
            job.kill()
        wait_for(jobs[2])
    finally:
        for job in jobs:
            job.kill()
            job.join(60)


def test_a_job_inside_a_job_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with slots(NUM_SLOTS), slots(NUM_SLOTS):
        pass
