"""Digests of files are those of their content: computed once, remembered, and doubted where samples do not hold."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.store import content
from megatron_grit.store.content import check_once, content_digest, content_part, forget_opened, thoroughly
from megatron_grit.store.digest import hashed_bytes

BLOCK, NUM_BLOCKS = 100, 50


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(content, "NUM_SAMPLES", 3)
    forget_opened()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(np.random.default_rng(0).bytes(BLOCK * NUM_BLOCKS - 7))
    return tmp_path / "data"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def opened_anew(path: Path) -> tuple[str, int]:
    """The digest as another process finds it, and the bytes that it hashed."""
    forget_opened()
    before = hashed_bytes()
    return content_digest(path), hashed_bytes() - before


def flip(path: Path, byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a bit as a failing disk does: all that is known of the file stays."""
    real, stamp = path.resolve(), content._stamp(path)
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)
    other = content._stamp
    monkeypatch.setattr(content, "_stamp", lambda given: stamp if given == real else other(given))


def test_a_file_is_hashed_once(path: Path) -> None:
    digest, num_bytes = opened_anew(path)
    assert (digest, num_bytes) == (sha256(path), path.stat().st_size)
    before = hashed_bytes()
    assert content_digest(path) == digest and hashed_bytes() == before
    digest, num_bytes = opened_anew(path)
    assert digest == sha256(path) and 0 < num_bytes <= 5 * BLOCK
    # Through a link it is the same file, and samples are others each time.
    link = path.with_name("link")
    link.symlink_to(path)
    assert opened_anew(link)[1] <= 5 * BLOCK


def test_a_small_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"a" * 5 * BLOCK)
    for _ in range(2):
        assert opened_anew(tmp_path / "small") == (sha256(tmp_path / "small"), 5 * BLOCK)
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_change_is_seen(path: Path, keep_times: bool) -> None:
    opened_anew(path)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(20 * BLOCK)
        file.write(b"other")
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    digest, num_bytes = opened_anew(path)
    assert (digest, num_bytes) == (sha256(path), before.st_size)
    assert len(list((path.parent / ".digests" / "data").glob("file-*.cache"))) == 1, "those of earlier contents stay"


@pytest.mark.parametrize("byte", [0, BLOCK - 1, BLOCK * (NUM_BLOCKS - 1), BLOCK * NUM_BLOCKS - 8])
def test_damage_at_the_ends_is_always_seen(path: Path, byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_anew(path)
    flip(path, byte, monkeypatch)
    assert opened_anew(path)[0] == sha256(path)


def test_damage_between_is_seen_by_samples_in_the_end_and_thoroughly_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = opened_anew(path)
    flip(path, 20 * BLOCK + 5, monkeypatch)
    forget_opened()
    with thoroughly():
        before = hashed_bytes()
        assert content_digest(path) == content_digest(path) == sha256(path) != whole
        assert hashed_bytes() - before == path.stat().st_size
    flip(path, 20 * BLOCK + 5, monkeypatch)  # and back
    with thoroughly():
        assert content_digest(path) == whole
    flip(path, 20 * BLOCK + 5, monkeypatch)
    assert any(opened_anew(path)[0] == sha256(path) for _ in range(500)), "3 of 48 blocks each time"


def test_parts_are_of_a_content(path: Path) -> None:
    computed = []

    def head() -> str:
        computed.append(path.read_bytes()[:10])
        return hashlib.sha256(computed[-1]).hexdigest()

    for _ in range(2):
        forget_opened()
        assert content_part(path, "head", head) == hashlib.sha256(path.read_bytes()[:10]).hexdigest()
    assert len(computed) == 1
    os.utime(path, ns=(1, 1))
    forget_opened()
    content_part(path, "head", head)
    assert len(computed) == 1, "the same content at another time"
    path.write_bytes(b"x" + path.read_bytes())
    assert content_part(path, "head", head) == hashlib.sha256(path.read_bytes()[:10]).hexdigest()
    assert len(computed) == 2


def test_damaged_memory_is_made_again(path: Path) -> None:
    digest, _ = opened_anew(path)
    (memory,) = (path.parent / ".digests" / "data").glob("*.cache")
    for place in range(0, memory.stat().st_size, 97):
        damaged = bytearray(memory.read_bytes())
        damaged[place] ^= 1
        memory.write_bytes(damaged)
        assert opened_anew(path) == (digest, path.stat().st_size)
        assert opened_anew(path)[1] <= 5 * BLOCK


def test_a_folder_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(content.os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    opened_anew(path)
    assert opened_anew(path)[1] <= 5 * BLOCK
    assert not (path.parent / ".digests").exists() and (tmp_path / "home" / "megatron_grit" / "digests").is_dir()


def test_one_hashes_and_the_others_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, hash_file = [], content._hash
    monkeypatch.setattr(content, "_hash", lambda given: (calls.append(given), hash_file(given))[1])
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(content_digest(path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sha256(path)] * 6 and len(calls) == 1


def test_a_check_is_made_once(path: Path) -> None:
    checks: list[int] = []
    for _ in range(2):
        check_once(path, lambda: checks.append(1))
    assert len(checks) == 1
    with thoroughly():
        for _ in range(2):
            check_once(path, lambda: checks.append(1))
    assert len(checks) == 2
    path.write_bytes(b"another")
    check_once(path, lambda: checks.append(1))
    assert len(checks) == 3
    forget_opened()
    with pytest.raises(ZeroDivisionError):
        check_once(path, lambda: 1 / 0)
    check_once(path, lambda: checks.append(1))
    assert len(checks) == 4, "what failed was not checked"
