"""Tests for a GPU are no dead letter without one: each takes its device from tests/gpu/conftest.py, which gives it the
CPU where there is no GPU and tells why the other was skipped."""

from __future__ import annotations

import ast
from pathlib import Path

GIVE_A_DEVICE = {"device", "context"}


def without_device(text: str) -> list[str]:
    """Names of the tests that take no device, or are skipped as a whole."""
    tree = ast.parse(text)
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    bad = [test.name for test in tests if not GIVE_A_DEVICE & {argument.arg for argument in test.args.args}]
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    return bad + ["pytestmark" for mark in marks if mark.startswith("pytestmark") and "skipif" in mark]


def test_every_gpu_test_takes_its_device(repository: Path) -> None:
    files = sorted((repository / "tests" / "gpu").glob("test_*.py"))
    assert files
    for file in files:
        assert without_device(file.read_text(encoding="utf-8")) == [], file.name


def test_one_that_does_not_is_found() -> None:
    assert without_device("def test_a(device):\n    pass\ndef test_b(tmp_path):\n    pass") == ["test_b"]
    assert without_device("pytestmark = pytest.mark.skipif(not cuda(), reason='')") == ["pytestmark"]
