"""``SHARD=i/n``: the i-th of n parts of the test files, counted from 1; all parts together are all files.

A file goes where a hash of its name sends it, so that a file that comes or goes moves no other.
"""

from __future__ import annotations

import hashlib
import re

import pytest


def parse(text: str) -> tuple[int, int]:
    """ "2/5" as (2, 5)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise pytest.UsageError(f"SHARD={text}: give i/n, such as 1/4, with i from 1 to n")
    return number, count


def is_in(path: str, number: int, count: int) -> bool:
    """Whether a file is in a part."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % count == number - 1
