"""What benchmarks share: the command line and its exit status, sides that take turns, and memory of a process."""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_grit.errors import EXIT_STATUS, DataError, GritError

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student's distribution with one degree of freedom less: half a 95% interval in standard errors."""
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def parser(description: str | None, *, data: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--json``.

    Args:
        description: of the benchmark, as it stands in its docstring.
        data: what is read from the folder ``--data``; None: there is no such option.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data is not None:
        made.add_argument("--data", type=Path, default=DATA, help=f"folder with {data}")
    made.add_argument("--json", type=Path, help="also write the numbers here")
    return made


def run(name: str, arguments: argparse.Namespace, measure: Callable[[Path], tuple[Any, bool]]) -> int:
    """Measure and write ``--json``. Returns the exit status: 1 where a target is missed.

    Args:
        name: of the benchmark, in front of an error.
        arguments: of :func:`parser`.
        measure: gets a temporary folder and prints; returns the numbers, and whether all targets are met.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            numbers, met = measure(Path(folder))
    except GritError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


def data_file(folder: Path, name: str) -> Path:
    """A file of ``--data``.

    Raises:
        DataError: it is missing.
    """
    if not (folder / name).is_file():
        raise DataError("missing; give the folder that holds it with --data", path=folder / name)
    return folder / name


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side returns in each round; the sides take turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    return found


def t_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of seeds and half its 95% interval, which is infinite for one."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": statistics.fmean(values), "half_interval": half}


def growth(function: Callable[[], Any], sizes: Callable[[], list[float]]) -> list[float]:
    """By how much ``sizes`` grow at most during a call, looked at every millisecond."""
    before, done = sizes(), threading.Event()
    peaks = list(before)

    def look() -> None:
        peaks[:] = map(max, peaks, sizes())

    def watch() -> None:
        while not done.wait(0.001):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    look()
    return [peak - start for peak, start in zip(peaks, before, strict=True)]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
