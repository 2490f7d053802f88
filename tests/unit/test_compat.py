"""What is missing is named with the command that installs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_grit import compat
from megatron_grit.compat import install_command, needed
from megatron_grit.errors import ConfigError


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with (
        pytest.raises(ConfigError, match=rf"^rewards need math-verify: {re.escape(install_command('rl'))}$"),
        needed("rewards need", "math-verify", "rl"),
    ):
        import math_verify  # noqa: F401


def test_a_package_that_is_there_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"^plots need half-there, which fails to import \(No module named 'no_such"),
        needed("plots need", "half-there", "eval"),
    ):
        import half_there  # noqa: F401


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    def missing(name: str) -> None:
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "distribution", missing)
    assert install_command("eval") == f"pip install -e '{repository}[eval]'"
