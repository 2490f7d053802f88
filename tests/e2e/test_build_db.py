"""Databases built as users build them: killed and gone on with, by several processes, and with a process that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss")
pytest.importorskip("transformers")

from benchmarks.retro_kill_campaign import digests, free_port, write_inputs  # noqa: E402
from tests.harness.command import environment, python  # noqa: E402

SECONDS = 600


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_documents=60)


def options(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()]


def build(repository: Path, *arguments: str, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = [python()]
    if num_ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", f"--master-port={free_port()}"]
    return subprocess.run(
        [*launch, "tools/retro/build_db.py", *arguments],
        cwd=repository,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.slow
def test_killed_builds_end_as_one_that_was_not(repository: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.retro_kill_campaign", "--kills", "8"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 kills" in result.stdout
    assert "each equal to the uninterrupted one" in result.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_builds_the_same_without_a_warning(repository: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    alone = build(repository, f"--project-dir={tmp_path / 'one'}", *options(settings))
    assert alone.returncode == 0, alone.stderr
    several = build(repository, f"--project-dir={tmp_path / 'two'}", *options(settings), num_ranks=2)
    assert several.returncode == 0, several.stderr
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert "Warning" not in several.stderr
    assert several.stderr.count("task db-build") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_fails_ends_all(repository: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The second process cannot write its block; the first one waits for it."""
    project = tmp_path / "db"
    assert build(repository, f"--project-dir={project}", "--tasks=db-build", *options(settings)).returncode == 0
    blocked = sorted(project.glob("db/individual/*/*.hdf5"))[1]
    blocked.unlink()
    (blocked.parent / blocked.name).mkdir()
    (blocked.parent / blocked.name / "in_the_way").touch()
    result = build(repository, f"--project-dir={project}", "--tasks=db-build", num_ranks=2)
    assert result.returncode != 0
    assert (
        result.stderr.count(f"build_db: error: {blocked}: cannot be written")
        + result.stderr.count(f"build_db: error: [rank 1] {blocked}: cannot be written")
        == 1
    ), result.stderr
    assert "Traceback" not in result.stderr.partition("ChildFailedError")[0].replace(
        'Traceback (most recent call last):\n  File "<frozen', ""
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    repository: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, '.');"
        "import runpy; runpy.run_path('tools/retro/build_db.py', run_name='__main__')"
    )
    arguments = [f"--project-dir={tmp_path / 'db'}", "--tasks=db-build", *options(settings)]
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, "build_db", *arguments],  # -B: modules that are compiled would be cut off
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert "cannot be written" in line and "File too large" in line and "when there is room" in line
    assert not list((tmp_path / "db").rglob(".*.tmp"))
    result = build(repository, *arguments)
    assert result.returncode == 0, result.stderr


def test_help_teaches(repository: Path) -> None:
    result = build(repository, "--help")
    assert result.returncode == 0
    for words in ("db-build         cut documents", "--overwrite", "--validate", "Tokens of a chunk", "torchrun"):
        assert words in result.stdout
