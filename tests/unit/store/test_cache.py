"""Index caches: right or rebuilt, never trusted; built once; no lock outlives its process."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_grit.store import cache as index_cache
from megatron_grit.store.cache import cache_path, cached, load, store

KEY = {"sources": ["a" * 64], "seed": 3, "what": "test"}
ARRAYS = {
    "records": np.arange(1000, dtype=np.int64) * 7,
    "bytes": np.arange(13, dtype=np.uint8),
    "table": np.arange(12, dtype=np.float32).reshape(3, 4),
    "none": np.empty(0, dtype=np.int32),
}


def same(found: dict[str, np.ndarray] | None, arrays: dict[str, np.ndarray] = ARRAYS) -> bool:
    assert found is not None
    return found.keys() == arrays.keys() and all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in arrays.items()
    )


def never() -> dict[str, np.ndarray]:
    raise AssertionError("it is in the cache")


def test_built_once(tmp_path: Path) -> None:
    assert same(cached(tmp_path / "new" / "folder", "x", KEY, lambda: ARRAYS))
    again = cached(tmp_path / "new" / "folder", "x", KEY, never)
    assert same(again) and not again["records"].flags.writeable
    assert [path.name for path in (tmp_path / "new" / "folder").glob("*.tmp")] == []


@pytest.mark.parametrize("arrays", [{}, {"none": np.empty((0, 3))}, {"one": np.array(5)}, {"b": np.zeros(1, bool)}])
def test_small_arrays(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    assert same(cached(tmp_path, "x", KEY, lambda: arrays), arrays)
    assert same(cached(tmp_path, "x", KEY, never), arrays)


@pytest.mark.parametrize("change", [{"sources": ["b" * 64]}, {"seed": 4}, {"more": None}])
def test_another_key_is_another_file(tmp_path: Path, change: dict) -> None:
    cached(tmp_path, "x", KEY, lambda: ARRAYS)
    other = {"records": np.zeros(3)}
    assert same(cached(tmp_path, "x", KEY | change, lambda: other), other)
    assert same(cached(tmp_path, "x", KEY, never))


def test_another_version_of_the_format_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, "x", KEY, lambda: ARRAYS)
    monkeypatch.setattr(index_cache, "FORMAT_VERSION", 2)
    assert load(cache_path(tmp_path, "x", KEY), KEY) is None


def test_the_layout(tmp_path: Path) -> None:
    """As docs/data_formats.md has it, read without this package."""
    cached(tmp_path, "x", KEY, lambda: ARRAYS)
    content = cache_path(tmp_path, "x", KEY).read_bytes()
    magic, _, length = struct.unpack_from("<8s32sQ", content)
    assert magic == b"GRITCACH"
    description = json.loads(content[48 : 48 + length])
    assert description["key"] == {"version": 1, **KEY}
    assert (48 + length) % 64 == 0
    for entry in description["arrays"]:
        array = ARRAYS[entry["name"]]
        place = 48 + length + entry["offset"]
        assert place % 64 == 0
        assert content[place : place + array.nbytes] == array.tobytes()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_damage_is_built_again(tmp_path: Path, data: st.DataObject) -> None:
    path = cache_path(tmp_path, "x", KEY)
    store(path, KEY, ARRAYS)
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["flip", "cut", "empty", "longer", "zeros"]))
    if how == "flip":
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
    else:
        cut = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes({"cut": content[:cut], "empty": b"", "longer": content + b"x", "zeros": bytes(cut)}[how])
    assert load(path, KEY) is None
    assert same(cached(tmp_path, "x", KEY, lambda: ARRAYS))
    assert path.read_bytes() == content


def test_a_file_in_the_place_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = KEY | {"seed": 4}
    store(cache_path(tmp_path, "x", other), other, {"records": np.zeros(3)})
    os.replace(cache_path(tmp_path, "x", other), cache_path(tmp_path, "x", KEY))
    logging.getLogger("megatron_grit").propagate = True
    with caplog.at_level(logging.WARNING):
        assert same(cached(tmp_path, "x", KEY, lambda: ARRAYS))
    assert "is of other sources or options; it is built again" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index_cache, "store", refuse)
    assert same(cached(tmp_path, "x", KEY, lambda: ARRAYS))


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", KEY, fail)
    assert same(cached(tmp_path, "x", KEY, lambda: ARRAYS))


def test_several_at_once_build_once(tmp_path: Path) -> None:
    built: list[int] = []

    def build() -> dict[str, np.ndarray]:
        built.append(1)
        time.sleep(0.2)
        return ARRAYS

    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(same(cached(tmp_path, "x", KEY, build)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and built == [1]


BUILDER = """
import sys, time
import numpy as np
from megatron_grit.store.cache import cached

def build():
    print("building", flush=True)
    time.sleep(60)
    return {}

cached(sys.argv[1], "x", {"seed": 1}, build)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    waiting = threading.Thread(target=lambda: cached(tmp_path, "x", {"seed": 1}, lambda: ARRAYS), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()  # the other process has the lock
    process.send_signal(signal.SIGKILL)
    process.wait()
    waiting.join(10)
    assert not waiting.is_alive()
    assert same(cached(tmp_path, "x", {"seed": 1}, never))


def test_without_locks_everyone_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert same(cached(tmp_path, "x", KEY, lambda: ARRAYS))
    assert same(cached(tmp_path, "x", KEY, never))
