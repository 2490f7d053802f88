"""Sources: checked by their metadata, a bounded number of them open, 1,000 with few descriptors."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.kinds.generative import source_rules
from megatron_grit.data.order.sources import OpenFiles, Sources
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.indexed_files import TOKENIZER, chat, pair, run_config, write, write_chats

NUM_SOURCES = 1000


def open_sources(config: RunConfig, files: OpenFiles) -> Sources:
    return Sources(config, TOKENIZER, source_rules(config), files)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """1,000 sources of two records; hard links to ten files and their metadata."""
    folder = tmp_path_factory.mktemp("thousand")
    originals = [write_chats(folder / f"original{number}", [[2, 3 + number], [4, 2]]) for number in range(10)]
    prefixes = []
    for number in range(NUM_SOURCES):
        prefixes.append(str(folder / f"source{number}"))
        for suffix in (".bin", ".idx", ".json"):
            os.link(originals[number % 10] + suffix, prefixes[-1] + suffix)
    yield prefixes


def open_descriptors(prefixes: list[str]) -> int:
    folder = os.path.dirname(prefixes[0])
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(folder) for link in links if os.path.islink(link))


def test_files_are_opened_when_they_are_read(thousand: list[str], tmp_path: Path) -> None:
    sources = open_sources(run_config(tmp_path, generative=thousand), OpenFiles(20))
    assert len(sources) == NUM_SOURCES and sources.sizes.tolist() == [2] * NUM_SOURCES
    assert open_descriptors(thousand) == 0
    for index in (0, 7, 7, 500):
        assert sources[index].tokens(0).shape == (5 + index % 10,)
    assert 0 < open_descriptors(thousand) <= 3 * 2
    for index in range(NUM_SOURCES):
        sources[index].tokens(1)
        assert open_descriptors(thousand) <= 20 * 2 if index % 100 == 0 else True
    assert open_descriptors(thousand) == 20 * 2  # a .bin and a mapped .idx each


def test_what_was_used_last_stays_open(thousand: list[str], tmp_path: Path) -> None:
    files = OpenFiles(2)
    first, second, third = (IndexedRecords(prefix) for prefix in thousand[:3])
    for source in (first, second, first, third):
        files.use(source).tokens(0)
    assert [source._file is not None for source in (first, second, third)] == [True, False, True]
    files.use(second).tokens(0)
    assert [source._file is not None for source in (first, second, third)] == [False, True, True]


LOADER = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from megatron_grit.data.rows.loader import GritDataLoader
from tests.unit.data.indexed_files import TOKENIZER, run_config
config = run_config(Path(sys.argv[1]), generative=json.loads(sys.argv[2]), training={"generative_batch_size": 500})
loader = GritDataLoader(config, TOKENIZER)
names = {name.rpartition("#")[0] for step in range(4) for row in loader.batch(step).rows_of('generative')
         for name in row.record_ids}
print(len(names))
"""


def test_a_thousand_sources_with_64_descriptors(thousand: list[str], tmp_path: Path, repository: Path) -> None:
    """Without the bound the same run ends with "too many open files"."""
    command = [sys.executable, "-c", LOADER, str(tmp_path), json.dumps(thousand)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.stdout.strip() == str(NUM_SOURCES), done.stderr[-1000:]
    unbounded = LOADER.replace(
        "loader =",
        "from megatron_grit.data.order import sources as s; s.OpenFiles.__init__.__defaults__ = (10**6,)\nloader =",
    )
    broken = subprocess.run(
        [sys.executable, "-c", unbounded, *command[3:]], capture_output=True, text=True, cwd=repository
    )
    assert broken.returncode != 0 and "Too many open files" in broken.stderr


def test_the_bound_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, expected in ((64, 16), (1024, 256), (10**6, 2048), (resource.RLIM_INFINITY, 2048), (3, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        assert OpenFiles().limit == expected


def test_lengths_of_records(tmp_path: Path) -> None:
    prefix = write_chats(tmp_path / "a", [[2, 3], [4, 2, 7, 1], [1, 1]])
    sources = open_sources(run_config(tmp_path, generative=[prefix]), OpenFiles())
    assert sources.record_lengths(0, np.array([2, 0, 1, 1])).tolist() == [2, 5, 14, 14]
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[34 + 12 * 8 + 8] ^= 64  # the first sequence of record 1
    path.write_bytes(content)
    damaged = open_sources(run_config(tmp_path, generative=[prefix]), OpenFiles())
    with pytest.raises(DataError, match=r"a\.idx \(byte \d+\): document [01] has no possible place in the .bin"):
        damaged.record_lengths(0, np.array([0, 1]))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    def identity(prefix: str) -> list[str]:
        config = run_config(tmp_path, generative=[prefix])
        return open_sources(config, OpenFiles()).identity()

    first = write_chats(tmp_path / "a", [[2, 3]])
    second = write(tmp_path / "b", [chat(1, 2, 3)], RowKind.GENERATIVE)
    third = write_chats(tmp_path / "c", [[2, 3]])
    assert identity(first) != identity(second)
    assert identity(first) == identity(third)  # a copy elsewhere is the same source


def test_checksums_are_compared_where_asked(tmp_path: Path) -> None:
    prefix = write_chats(tmp_path / "a", [[2, 3], [4, 2]])
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    open_sources(run_config(tmp_path, generative=[prefix]), OpenFiles())
    with pytest.raises(DataError, match=r"a\.bin \(byte 0\): its SHA-256 is"):
        open_sources(run_config(tmp_path, generative=[prefix], checksum=True), OpenFiles())


def test_refused(tmp_path: Path) -> None:
    chats, pairs = write_chats(tmp_path / "a", [[2, 30]]), write(tmp_path / "b", [pair(1, 2)], RowKind.EMBEDDING)

    def build(**data: object) -> Sources:
        return open_sources(run_config(tmp_path, **data), OpenFiles())

    with pytest.raises(ConfigError, match="data.generative is empty, but training.objective generative needs it"):
        build()
    with pytest.raises(DataError, match=r"b\.json: holds embedding records and stands under data.generative"):
        build(generative=[pairs])
    with pytest.raises(DataError, match=r"segment of 32 tokens, more than data.tokens_per_row 31; .* set data.over_lo"):
        build(generative=[chats], tokens_per_row=31)
    assert len(build(generative=[chats], tokens_per_row=31, over_long="split")) == 1
    with pytest.raises(ConfigError, match="no prefix follows the weight 0.5"):
        build(generative=[f"1 {chats} 0.5"])
