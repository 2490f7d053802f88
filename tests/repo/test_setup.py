"""The set-up of examples/common.sh: which Python it takes, and that it replaces nothing that is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest


def bash(repository: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source examples/common.sh; {script}"],
        cwd=repository,
        env={key: value for key, value in os.environ.items() if key != "PYTHON"} | environment,
        capture_output=True,
        text=True,
    )


def fake_python(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def python_of_version(folder: Path, name: str, version: str) -> Path:
    """Answers the two questions that find_python asks."""
    major, minor = version.split(".")
    old = int((int(major), int(minor)) < (3, 11))
    return fake_python(folder, name, f'case "$2" in *print*) echo {version} ;; *) exit {old} ;; esac')


def test_python_is_chosen_by_running_it(repository: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    fake_python(commands, "python3.12", "echo 'command not found' >&2; exit 127")
    found = python_of_version(commands, "python3.11", "3.11")
    path = {"PATH": f"{commands}:/usr/bin:/bin", "PYENV_ROOT": str(tmp_path / "none")}
    assert bash(repository, "find_python 3.12 3.11", **path).stdout.strip() == str(found)
    # A shim that fails, and the real thing where pyenv keeps it.
    pyenv = tmp_path / "pyenv" / "versions" / "3.12.9" / "bin"
    pyenv.mkdir(parents=True)
    real = python_of_version(pyenv, "python", "3.12")
    path["PYENV_ROOT"] = str(tmp_path / "pyenv")
    assert bash(repository, "find_python 3.12 3.11", **path).stdout.strip() == str(real)


def test_an_old_python_is_named(repository: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    python_of_version(commands, "python3", "3.9")
    result = bash(repository, "find_python 3", PATH=f"{commands}:/usr/bin:/bin", PYENV_ROOT=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("bash: error: needs Python 3.11 or newer; ")
    assert "python3 is 3.9" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.fixture
def watched_python(tmp_path: Path) -> Path:
    """This interpreter, with a pip that only prints what it is asked."""
    return fake_python(
        tmp_path / "watched",
        "python",
        f'if [[ "$1 $2" == "-m pip" ]]; then echo "pip $*"; grep "^torch==" "$6"; else exec {sys.executable} "$@"; fi',
    )


def test_a_complete_environment_is_used_as_it_is(repository: Path, watched_python: Path) -> None:
    result = bash(repository, "setup_python dev; echo $PYTHON", PYTHON=str(watched_python))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{watched_python}\n"


def test_only_what_is_missing_is_added(repository: Path, tmp_path: Path, watched_python: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    # torch is there, in whatever version, and never asked for.
    text = text.replace('"torch>=2.6"', '"torch>=999"').replace('"psutil"', '"psutil", "no-such-package>=1"')
    (tmp_path / "pyproject.toml").write_text(text)
    result = bash(repository, f"ROOT={tmp_path}; setup_python", PYTHON=str(watched_python))
    assert result.returncode == 0, result.stderr
    asked, held = result.stdout.splitlines()
    assert re.fullmatch(r"pip -m pip install -q --constraint \S+ no-such-package>=1", asked)
    assert held == f"torch=={metadata.version('torch')}", "the constraints do not hold torch at its version"


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_cover_and_satisfy_the_requirements(repository: Path, name: str) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (repository / "constraints" / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins), (
        "a pin is not exact, or has a local label"
    )
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{name} pins {requirement.name} to {version}, outside {text}"
