"""``pytest --engine-calls``: which tests call functions of megatron-core in this process, compared with their mark.

Printed are the marked files none of whose tests does, apart from those that start ranks or forked commands; and
unmarked tests that do: none where :func:`tests.harness.engine.refused` works. Calls of a fixture that
several tests share count for the first of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.harness import engine

TOOL = 4  # of sys.monitoring; the lower ones are those of debuggers and profilers
INSIDE = str(Path("megatron") / "core")


class EngineCalls:
    """Watches the first call of each function during each test."""

    def __init__(self) -> None:
        self.called = False
        self.calling: dict[Path, int] = {}
        self.marked: set[Path] = set()
        self.unmarked: list[str] = []
        events = sys.monitoring.events  # type: ignore[attr-defined,unused-ignore]
        sys.monitoring.use_tool_id(TOOL, "engine calls")  # type: ignore[attr-defined,unused-ignore]
        sys.monitoring.register_callback(TOOL, events.PY_START, self._begins)  # type: ignore[attr-defined,unused-ignore]
        sys.monitoring.set_events(TOOL, events.PY_START)  # type: ignore[attr-defined,unused-ignore]

    def _begins(self, code: CodeType, offset: int) -> Any:
        self.called |= INSIDE in code.co_filename and code.co_name != "<module>"
        return sys.monitoring.DISABLE  # type: ignore[attr-defined,unused-ignore]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.called = False
        sys.monitoring.restart_events()  # type: ignore[attr-defined,unused-ignore]
        result = yield
        self.calling[item.path] = self.calling.get(item.path, 0) + self.called
        if item.get_closest_marker("engine"):
            self.marked.add(item.path)
        elif self.called:
            self.unmarked.append(item.nodeid)
        return result

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("calls of megatron-core")
        for path in sorted(self.marked):
            if not self.calling[path] and not engine.starts_processes(path):
                terminalreporter.write_line(f"marked, and calls nothing: {path.relative_to(engine.ROOT)}")
        for name in self.unmarked:
            terminalreporter.write_line(f"not marked, and calls it: {name}")
        terminalreporter.write_line(f"{sum(map(bool, self.calling.values()))} of {len(self.calling)} files call it")


def plugin() -> EngineCalls:
    """What the option registers.

    Raises:
        pytest.UsageError: Python is older than 3.12, which has no cheap way of noting calls.
    """
    if sys.version_info < (3, 12):
        raise pytest.UsageError("--engine-calls takes Python 3.12 or newer")
    return EngineCalls()
