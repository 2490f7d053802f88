"""Starts the scripts of examples/ that do a whole job and resume it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.harness import command


def start(repository: Path, script: str, output: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a script of examples/ on a folder, in a group of processes of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("QUICKSTART")}
    return subprocess.Popen(
        ["bash", str(repository / "examples" / script), str(output)],
        cwd=output.parent,
        env=clean | command.environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(repository: Path, script: str, output: Path, timeout: float, **environment: str) -> str:
    """Run it to its end. Returns what it printed."""
    process = start(repository, script, output, **environment)
    try:
        printed, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    return printed


def refused(repository: Path, script: str, output: str, cwd: Path, **environment: str) -> str:
    """Run it where it has to refuse. Returns the one line that it says."""
    result = subprocess.run(
        ["bash", str(repository / "examples" / script), output],
        cwd=cwd,
        env=os.environ | command.environment() | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"{script}: error: ")
    return result.stderr
