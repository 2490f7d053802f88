"""``pytest --cpu``: CPU seconds of each folder, of the dearest files and tests, and of the processes they start.

What a test has started and not yet waited for is counted with the test during which it is waited for; what is left at
the end is in the total alone.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DEAREST = 60  # files, and tests, to print


def process_seconds(pid: int) -> float:
    """Of a process and of its children that have ended, where Linux's /proc tells."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    ticks = text.rpartition(")")[2].split()[11:15]  # utime, stime, cutime, cstime
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Of a process, now."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def seconds() -> float:
    """CPU seconds so far: of this process, of those that it started, and of those that its fork server started."""
    from multiprocessing import forkserver

    times = os.times()
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    own = times.user + times.system + times.children_user + times.children_system
    return own + (process_seconds(server) + sum(map(process_seconds, children(server))) if server else 0.0)


class Cost:
    """Notes the seconds of each phase of each test, and puts together what the workers noted."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.last = seconds()
        self.by_file: Counter[str] = Counter()
        self.by_test: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        self.others["starting and collecting"] += seconds()
        self.last = seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report = yield
        now = seconds()
        report.cpu_seconds, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        spent = getattr(report, "cpu_seconds", 0.0)
        self.by_file[report.nodeid.partition("::")[0]] += spent
        self.by_test[report.nodeid] += spent

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["cpu"] = dict(self.others), seconds()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if "cpu" in getattr(node, "workeroutput", {}):
            others, total = node.workeroutput["cpu"]
            self.others.update(others)
            self.others["total"] += total

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        total = seconds() if not self.others["total"] else self.others["total"]
        rows = [("total", total), ("starting and collecting", self.others["starting and collecting"])]
        folders: Counter[str] = Counter()
        for file, spent in self.by_file.items():
            parts = file.split("/")
            folders["/".join(parts[: 3 if parts[1:2] == ["unit"] else 2])] += spent
        rows += folders.most_common()
        terminalreporter.section("CPU seconds")
        for counted in (self.by_file, self.by_test):
            rows += counted.most_common(DEAREST)
        for name, spent in rows:
            terminalreporter.write_line(f"{spent:9.1f}  {name}")
