from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.builders.block_join import find_duplicates
from megatron_grit.data.builders.build_folder import PLACE_DTYPE
from megatron_grit.data.builders.work_pool import map_ordered
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.errors import ConfigError, DataError, OutputError
from megatron_grit.store.lock import locked
from tests.unit.data.line_encoder import FACTS, build_lines, contents


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines: what was written is there, and thousands of syncs take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """The test ends the processes it starts. Those of earlier tests are not its own: the engine's writer of checkpoints
    keeps one for as long as the process lives."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def write_inputs(folder: Path, num_lines: int = 600) -> list[Path]:
    """Three files, one compressed, with repeated, blank and bad lines."""
    draw = random.Random(1)
    lines = [f"line {draw.randrange(num_lines // 2)} " + "x" * draw.randrange(30) for _ in range(num_lines)]
    for number in range(5, num_lines, 41):
        lines[number] = f"bad {number}"
    for number in range(9, num_lines, 53):
        lines[number] = ""
    cuts = [0, num_lines // 2, 2 * num_lines // 3, num_lines]
    paths = [folder / "a.txt", folder / "b.txt.gz", folder / "c.txt"]
    for path, start, stop in zip(paths, cuts, cuts[1:], strict=False):
        content = ("\n".join(lines[start:stop]) + "\n" * (path.name != "c.txt")).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return paths


def all_lines(paths: list[Path]) -> list[tuple[Path, int, str]]:
    """Path, number and text of every line."""
    found = []
    for path in paths:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found += [(path, number, line) for number, line in enumerate(content.decode().splitlines(), 1)]
    return found


def documents(prefix: Path) -> list[str]:
    with_file = IndexedFile(prefix)
    text = [with_file.read(number, number + 1).astype(np.uint8).tobytes().decode() for number in range(len_of(prefix))]
    with_file.close()
    return text


def len_of(prefix: Path) -> int:
    return IndexedFile(prefix).num_sequences


def run_killed(action: Callable[[], Any], point: int) -> bool:
    """Run ``action`` in a forked process that ends, as by SIGKILL, before its ``point``-th renaming, syncing or
    deletion. Returns whether it came that far."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == point:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for name in ("replace", "fsync", "truncate", "unlink", "rmdir"):
            setattr(os, name, before(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("deduplicate", [False, True])
def test_documents_and_rejections_are_those_of_a_plain_loop(tmp_path, deduplicate):
    paths = write_inputs(tmp_path)
    totals = build_lines(paths, tmp_path / "out", block_bytes=100, deduplicate=deduplicate)
    kept, rejected, first = [], [], {}
    for path, number, line in all_lines(paths):
        if line.startswith("bad"):
            rejected.append((str(path), number, "bad"))
        elif deduplicate and line in first:
            rejected.append((str(path), number, "duplicate"))
        elif line:
            kept.append(line)
            first[line] = f"{path}:{number}"
    assert documents(tmp_path / "out") == kept
    listed = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [(item["path"], item["line"], item["reason"]) for item in listed] == rejected
    texts = {(str(path), number): line for path, number, line in all_lines(paths)}
    for item in listed:
        what = "the line is bad"
        if item["reason"] == "duplicate":
            what = f"the same as {first[texts[item['path'], item['line']]]}"
        assert item["message"] == f"{item['path']}:{item['line']}: {what}"
    num_blank = sum(not line for _, _, line in all_lines(paths))
    assert totals.num_lines == len(all_lines(paths))
    assert totals.num_records == totals.num_lines - num_blank
    assert totals.rejected == dict(Counter(reason for _, _, reason in rejected))
    assert totals.num_documents == {"lines": len(kept)}
    assert totals.first_rejection == listed[0]["message"] or deduplicate
    if not deduplicate:
        assert totals.counters == {"bytes": sum(map(len, kept))}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_output_depends_on_nothing_but_the_input(tmp_path, deduplicate):
    paths = write_inputs(tmp_path)
    results = []
    for partitions, block_bytes, workers in [(1, 1 << 20, 1), (1, 64, 1), (3, 64, 1), (40, 300, 1), (1, 64, 2)]:
        prefix = tmp_path / "out"
        options = {"partitions": partitions, "block_bytes": block_bytes, "workers": workers}
        totals = build_lines(paths, prefix, deduplicate=deduplicate, overwrite=True, **options)
        results.append((contents(prefix), totals))
    assert set(results[0][0]) == {".bin", ".idx", ".json", ".rejected.jsonl"}
    for result in results[1:]:
        assert result == results[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"deduplicate": True, "partitions": 2}], ids=str)
def test_a_build_goes_on_after_a_kill_at_any_point(tmp_path, options):
    paths = write_inputs(tmp_path, 24)
    options |= {"block_bytes": 300, "journal_seconds": 0.0, "overwrite": True}
    build_lines(paths, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    point, killed = 0, True
    while killed:
        point += 1
        folder = tmp_path / str(point)
        folder.mkdir()
        killed = run_killed(lambda prefix=folder / "whole": build_lines(paths, prefix, **options), point)
        build_lines(paths, folder / "whole", **options)
        assert contents(folder / "whole") == expected, f"killed before call {point}"
        assert not list(folder.glob(".*"))
    assert point > 30


def test_finished_work_is_not_done_again(tmp_path):
    paths = write_inputs(tmp_path, 200)
    options = {"block_bytes": 300, "journal_seconds": 0.0, "partitions": 3}
    build_lines(paths, tmp_path / "whole", log=tmp_path / "once", **options)
    once = Counter((tmp_path / "once").read_bytes().splitlines())
    for point in (5, 20, 60, 90):
        folder = tmp_path / str(point)
        folder.mkdir()
        log = folder / "log"
        assert run_killed(lambda out=folder / "whole", log=log: build_lines(paths, out, log=log, **options), point)
        build_lines(paths, folder / "whole", log=log, **options)
        again = Counter(log.read_bytes().splitlines()) - once
        assert again.total() <= 1, "the block in hand when the kill came, and no other"
        assert contents(folder / "whole") == contents(tmp_path / "whole")


def test_a_journal_of_other_inputs_or_options_is_not_used(tmp_path, caplog):
    paths = write_inputs(tmp_path, 100)
    options: dict[str, Any] = {"block_bytes": 100, "journal_seconds": 0.0}
    build_lines(paths, tmp_path / "whole", **options)
    assert run_killed(lambda: build_lines(paths, tmp_path / "out", **options), 40)
    with paths[2].open("ab") as file:
        file.write(b"one more")
    build_lines(paths, tmp_path / "out", **options)
    assert "differs in inputs: starting afresh" in caplog.text
    assert documents(tmp_path / "out")[-1].endswith("one more")
    assert run_killed(lambda: build_lines(paths, tmp_path / "other", **options), 40)
    build_lines(paths, tmp_path / "other", **{**options, "signature": {"version": 2}})
    assert "differs in version: starting afresh" in caplog.text
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_damaged_working_folders_are_built_afresh(tmp_path):
    paths = write_inputs(tmp_path, 100)
    options: dict[str, Any] = {"block_bytes": 100, "journal_seconds": 0.0}
    build_lines(paths, tmp_path / "whole", **options)
    damages = [("journal.json", b"{"), ("journal.json", b"[]"), ("journal.json", "digit"), ("lines.bin", b"")]
    for name, damage in [*damages, ("places.bin", None)]:
        folder = tmp_path / ".out.build" / "piece-00000-of-00001"
        assert run_killed(lambda: build_lines(paths, tmp_path / "out", overwrite=True, **options), 60)
        if damage is None:
            (folder / name).unlink()
        elif damage == "digit":  # a size that is a little too small would cut documents in two
            journal = json.loads((folder / name).read_bytes())
            journal["sizes"]["lines"]["bin"] -= 2
            (folder / name).write_text(json.dumps(journal))
        else:
            (folder / name).write_bytes(damage)
        build_lines(paths, tmp_path / "out", overwrite=True, **options)
        assert contents(tmp_path / "out") == {**contents(tmp_path / "whole")}, name


def test_one_partition_at_a_time(tmp_path):
    paths = write_inputs(tmp_path)
    build_lines(paths, tmp_path / "whole")
    log = tmp_path / "log"
    options: dict[str, Any] = {"partitions": 3, "log": log, "block_bytes": 1000}
    counts = [build_lines(paths, tmp_path / "out", partition=index, **options).num_documents for index in (2, 0)]
    assert not (tmp_path / "out.idx").exists()
    done = log.read_bytes()
    assert build_lines(paths, tmp_path / "out", partition=0, **options).num_documents == counts[1]
    assert log.read_bytes() == done, "a finished partition is not built again"
    totals = build_lines(paths, tmp_path / "out", **options)
    assert log.read_bytes().startswith(done)
    assert not set(log.read_bytes()[len(done) :].splitlines()) & set(done.splitlines())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert totals.num_documents["lines"] > sum(count["lines"] for count in counts)


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("stop", ["option", "fatal"])
def test_a_line_that_stops_the_build_is_named(tmp_path, partitions, stop):
    paths = write_inputs(tmp_path)
    word = "bad" if stop == "option" else "fatal"
    place = next((path, number) for path, number, line in all_lines(paths)[-100:] if line.startswith("bad"))
    content = paths[2].read_bytes().splitlines()
    content = [line.replace(b"bad", b"ugly") for line in content]
    content[place[1] - 1] = f"{word} line".encode()
    paths[2].write_bytes(b"\n".join(content))
    options: dict[str, Any] = {
        "partitions": partitions,
        "block_bytes": 200,
        "stop_on": {"bad"} if word == "bad" else (),
    }
    for path in paths[:2]:  # no bad line before the one in question
        text = "\n".join(line.replace("bad", "ugly") for _, _, line in all_lines([path])) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    with pytest.raises(DataError, match=f"the line is {word}") as caught:
        build_lines(paths, tmp_path / "out", **options)
    assert (caught.value.path, caught.value.line) == place
    assert not (tmp_path / "out.idx").exists()


def test_a_build_that_stopped_at_a_line_goes_on_without_it(tmp_path):
    path, log = tmp_path / "a.txt", tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50)) + "bad\nlast\n")
    with pytest.raises(DataError, match=r"a\.txt:51: the line is bad"):
        build_lines([path], tmp_path / "out", log=log, block_bytes=20, stop_on={"bad"})
    before = log.read_bytes().splitlines()
    build_lines([path], tmp_path / "out", log=log, block_bytes=20)
    assert len(before) > 10
    assert log.read_bytes().splitlines()[len(before) :] == [before[-1], b"last"], "from the block with the line on"
    assert documents(tmp_path / "out")[-1] == "last"


def test_nothing_kept_is_an_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("bad\n\nbad\n")
    with pytest.raises(DataError, match=r"2 of 2 records were dropped as bad; the first: .*a\.txt:1: the line is bad"):
        build_lines([path], tmp_path / "out")
    path.write_text("\n")
    with pytest.raises(DataError, match="no records"):
        build_lines([path], tmp_path / "out")
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out.idx").exists()


def test_output_that_was_removed_before_the_build_could_end_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    point = 1
    while not (tmp_path / "out.idx").exists() or not (tmp_path / ".out.build").exists():
        assert run_killed(lambda: build_lines([path], tmp_path / "out", overwrite=True), point)
        point += 1
    (tmp_path / "out.idx").unlink()
    with pytest.raises(DataError, match=r"out\.bin: was removed or replaced .* remove that folder"):
        build_lines([path], tmp_path / "out", overwrite=True)


def test_existing_output_is_kept_unless_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("bad\none\n")
    build_lines([path], tmp_path / "out")
    before = contents(tmp_path / "out")
    path.write_text("two\n")
    with pytest.raises(DataError, match="exists already"):
        build_lines([path], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    build_lines([path], tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == ["two"]
    assert not (tmp_path / "out.rejected.jsonl").exists(), "that of the earlier build"


def test_two_builds_of_one_output_exclude_each_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    work = tmp_path / ".out.build"
    with locked(work / "lock", work), pytest.raises(OutputError, match="out: another process is writing it"):
        build_lines([path], tmp_path / "out")
    with locked(work / "lock", work, shared=True):
        with pytest.raises(OutputError, match="out: another process"):
            build_lines([path], tmp_path / "out", partitions=2)
        build_lines([path], tmp_path / "out", partitions=2, partition=0)  # those of several nodes may
        taken = locked(work / "piece-00001-of-00002.lock", work)
        with taken, pytest.raises(OutputError, match="piece-00001-of-00002: another process"):
            build_lines([path], tmp_path / "out", partitions=2, partition=1)
    build_lines([path], tmp_path / "out", partitions=2)
    assert documents(tmp_path / "out") == ["one"]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("die", DataError, "a worker process ended by signal 9"),
        ("refuse", ConfigError, "the encoder refuses"),
        ("raise", RuntimeError, r"ValueError: as told[\s\S]*while encoding .*a\.txt, bytes 0 to"),
    ],
)
@pytest.mark.usefixtures("no_worker_left")
def test_a_worker_that_fails_is_an_error(tmp_path, line, error, message):
    path = tmp_path / "a.txt"
    path.write_text(f"{line}\n")
    with pytest.raises(error, match=message):
        build_lines([path], tmp_path / "out", workers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "at least 1"),
        ({"partitions": 0}, "at least 1"),
        ({"partitions": 2, "partition": 2}, "no partition 2"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build_lines([], tmp_path / "out", **options)


def test_variables_of_the_process_are_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    build_lines([path], tmp_path / "out")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "TOKENIZERS_PARALLELISM" not in os.environ


class _Places:
    def __init__(self, keys: list[int]) -> None:
        self._places = np.zeros(len(keys), dtype=PLACE_DTYPE)
        self._places["fingerprint"] = np.frombuffer(b"".join(key.to_bytes(16, "little") for key in keys), dtype="V16")

    def places(self) -> np.ndarray:
        return self._places


def test_duplicates_are_found_across_pieces():
    # 1 << 64 and 0 differ in one half of the fingerprint only.
    pieces: Any = [_Places([5, 1, 5, 1 << 64]), _Places([]), _Places([1, 5, 9, 0, 1 << 64])]
    assert find_duplicates(pieces).tolist() == [[2, 0], [4, 1], [5, 0], [8, 3]]
    assert find_duplicates(pieces[1:2]).shape == (0, 2)


@pytest.mark.usefixtures("no_worker_left")
def test_results_come_in_order_and_few_tasks_are_read_ahead():
    read = []

    def tasks():
        for number in range(30):
            read.append(number)
            yield number

    results = map_ordered(tasks(), _Double, 2)
    for expected, (task, result) in enumerate(results):
        assert (task, result) == (expected, 2 * expected)
        assert len(read) <= expected + 8
    assert len(read) == 30


class _Double:
    def __call__(self, number: int) -> int:
        return 2 * number


def test_facts_can_depend_on_the_counters(tmp_path):
    from megatron_grit.data.builders.block_build import BuildRun, BuildSpec, OutputSpec, build_blocks
    from megatron_grit.data.indexed.reader import read_meta
    from tests.unit.data.line_encoder import LineEncoder

    path = tmp_path / "a.txt"
    path.write_text("one\nthree\n")
    seen = []

    def facts(counters: dict[str, int]):
        seen.append(counters)
        return FACTS

    output = OutputSpec(prefix=tmp_path / "out", dtype=np.uint16, with_modes=False, facts=facts)
    spec = BuildSpec(outputs={"lines": output}, factory=LineEncoder, signature={}, work_prefix=tmp_path / "out")
    build_blocks([path], spec, BuildRun())
    assert seen == [{"bytes": 8}]
    assert read_meta(tmp_path / "out").num_tokens == 8
