"""What is installed is what is in the checkout."""

from __future__ import annotations

from pathlib import Path, PurePath

from tests.repo import laws


def test_every_folder_of_the_package_is_a_package(repository: Path) -> None:
    """A folder without a tracked ``__init__.py`` works in a checkout and is missing from an installation."""
    files = [PurePath(name) for name in laws.tracked_files(repository) if name.startswith(f"{laws.PACKAGE}/")]
    folders = {path.parent for path in files if path.suffix == ".py"}
    assert len(folders) > 10
    assert not [str(folder) for folder in folders if folder / "__init__.py" not in files]
