"""How far long work is: lines of a log, their numbers, and when there are none."""

from __future__ import annotations

import logging
import time

import pytest

from megatron_grit.store import progress
from megatron_grit.store.progress import Progress, still_at_work


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO)
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def work(clock: Clock, steps: int, seconds: float, **options: bool) -> None:
    with Progress(1000 * steps, "codes", "chunk", **options) as shown:
        for _ in range(steps):
            clock.now += seconds
            shown.update(1000)


def test_a_log_has_a_line_every_half_minute_and_one_at_the_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    work(clock, 10, 12.5)
    assert caplog.messages == [
        "codes: 3,000 of 10,000 chunks (30%), 80 chunks/s, 0:01:28 left",
        "codes: 6,000 of 10,000 chunks (60%), 80 chunks/s, 0:00:50 left",
        "codes: 9,000 of 10,000 chunks (90%), 80 chunks/s, 0:00:12 left",
        "codes: 10,000 chunks in 0:02:05, 80 chunks/s",
    ]


def test_what_an_earlier_run_did_is_no_speed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress(100, "blocks", "block") as shown:
        shown.skip(80)
        clock.now += 40
        shown.update(2)
        assert caplog.messages == ["blocks: 82 of 100 blocks (82%), 0.05 blocks/s, 0:06:00 left"]


def test_short_work_and_that_of_other_processes_say_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    work(clock, 10, 1)
    work(clock, 10, 100, enabled=False)
    work(clock, 0, 0)
    assert not caplog.messages


def test_work_that_fails_does_not_end_with_a_line(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), Progress(10, "codes", "chunk"):
        clock.now += 100
        raise KeyError
    assert not caplog.messages


def test_a_terminal_has_a_bar(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    work(clock, 4, 50)
    assert not caplog.messages
    assert "codes: 100%" in capsys.readouterr().err


def test_a_build_logs_by_documents(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress(10_000_000, "c4", "B", also="document", log_each=500) as shown:
        for _ in range(4):
            clock.now += 100
            shown.update(1_000_000, also=300)
        assert caplog.messages == [
            "c4: 2.00MB of 10.0MB (20%), 10.0kB/s, 0:13:20 left; 600 documents, 3 documents/s",
            "c4: 4.00MB of 10.0MB (40%), 10.0kB/s, 0:10:00 left; 1,200 documents, 3 documents/s",
        ]


def test_a_second_count_is_told_by_the_clock(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress(100_000_000, "c4", "B", also="query") as shown:
        clock.now += 40
        shown.update(1_000_000, also=300)
        clock.now += 10
        shown.update(1_000_000, also=300)
    assert caplog.messages == [
        "c4: 1.00MB of 100MB (1%), 25.0kB/s, 1:06:00 left; 300 queries, 7.5 queries/s",
        "c4: 2.00MB in 0:00:50, 40.0kB/s; 600 queries, 12 queries/s",
    ]


def test_an_unknown_total_has_no_share(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress(None, "lines", "line") as shown:
        for _ in range(2):
            clock.now += 20
            shown.update(2000)
    assert caplog.messages == ["lines: 4,000 lines, 100 lines/s", "lines: 4,000 lines in 0:00:40, 100 lines/s"]


def test_work_of_no_known_length_is_said_to_go_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with still_at_work("training", first=0.05):
        time.sleep(0.5)
    assert 2 <= len(caplog.messages) <= 4, "each wait is as long as all before it"
    assert caplog.messages[0] == "training: 0:00:00 so far"
    caplog.clear()
    with still_at_work("training"):
        pass
    assert not caplog.messages
