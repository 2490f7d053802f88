"""What is installed is what is in the checkout."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path, PurePath

from tests.repo import laws


def test_every_folder_of_the_package_is_a_package(repository: Path) -> None:
    """A folder without a tracked ``__init__.py`` works in a checkout and is missing from an installation."""
    files = [PurePath(name) for name in laws.tracked_files(repository) if name.startswith(f"{laws.PACKAGE}/")]
    folders = {path.parent for path in files if path.suffix == ".py"}
    assert len(folders) > 10
    assert not [str(folder) for folder in folders if folder / "__init__.py" not in files]


def test_a_missing_package_is_in_the_extra_that_is_named(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {re.split(r"[<>=\[;]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    calls = []
    for name in laws.tracked_files(repository):
        if name.startswith(laws.PACKAGE) and name.endswith(".py"):
            for node in ast.walk(ast.parse((repository / name).read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needed":
                    calls.append([ast.literal_eval(argument) for argument in node.args[1:]])
    assert len(calls) > 10
    for package, extra in calls:
        assert package.replace("faiss", "faiss-cpu") in extras[extra], f"{extra} lacks {package}"
