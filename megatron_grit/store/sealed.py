"""JSON that says by itself whether it was changed: beside its keys stands the SHA-256 of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import write_json

CHECKSUM = "checksum"
"""The key, which files of earlier versions lack."""


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and their checksum."""
    return {**values, CHECKSUM: digest_of_settings(values)}


def unseal(values: Any) -> dict[str, Any]:
    """The values without their checksum; as they are where there is none.

    Raises:
        ValueError: they are no object, or are not what the checksum is of.
    """
    if not isinstance(values, dict):
        raise ValueError("is no object")
    content = {key: value for key, value in values.items() if key != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != digest_of_settings(content):
        raise ValueError("does not match its own checksum")
    return content


def write_sealed(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write values with their checksum as JSON, atomically.

    Raises:
        ValueError: a number that is not finite.
    """
    write_json(path, seal(values))


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or was changed.
    """
    return unseal(json.loads(path.read_text(encoding="utf-8")))
