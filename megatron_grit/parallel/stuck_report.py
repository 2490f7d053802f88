"""The report of a job that is stuck: every rank's position and stack, ranks that stand alike on one line."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from megatron_grit.parallel.positions import Position

_FRAMES = 12
_T = TypeVar("_T")


class Answer(NamedTuple):
    """What is known of a rank."""

    rank: int
    record: dict[str, Any] | None
    """The position that it published last, with host, pid and time. None: it never did."""
    stacks: str | None
    """Of its Python threads. None: it did not answer."""


def stuck_report(reason: str, answers: list[Answer]) -> str:
    """Lines for standard error.

    Args:
        reason: why it is printed.
        answers: one for each rank of the job.
    """
    lines = [f"megatron-grit: {reason}. Where the ranks are, those furthest behind first:"]
    by_place = _grouped(answers, lambda answer: _place(answer.record))
    for place, group in sorted(by_place.items(), key=lambda item: _progress(item[1][0].record)):
        seconds = [_seconds_there(answer.record) for answer in group if answer.record]
        there = f", for {min(seconds):.0f} to {max(seconds):.0f} s" if len(seconds) > 1 else ""
        there = f", for {seconds[0]:.0f} s" if len(seconds) == 1 else there
        lines.append(f"  {ranks_text(answer.rank for answer in group)}: {place}{there}")
    silent = [answer for answer in answers if answer.stacks is None]
    for answer in silent:
        where = f" (process {answer.record['pid']} on {answer.record['host'].split()[0]})" if answer.record else ""
        lines.append(f"  rank {answer.rank}{where} does not answer: it is stopped, gone, or in native code")
    answered = [answer for answer in answers if answer.stacks is not None]
    for stacks, group in _grouped(answered, lambda answer: answer.stacks or "").items():
        lines += [f"Stacks of {ranks_text(answer.rank for answer in group)}:", stacks.rstrip()]
    return "\n".join(lines)


def stacks_of_this_process() -> str:
    """The innermost frames of every Python thread but the one that asks, and of torch's helpers, the main one last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    texts = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "")
        if name == "MainThread" or (name.startswith("grit-") and ident != threading.get_ident()):
            stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_FRAMES)
            stack.reverse()
            texts.append((name == "MainThread", f"  thread {name}\n" + "".join(stack.format())))
    return "".join(text for _, text in sorted(texts))


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-6, 8"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"ranks {text}"


def _place(record: dict[str, Any] | None) -> str:
    return "never heard of" if record is None else str(Position.from_record(record))


def _progress(record: dict[str, Any] | None) -> tuple[int, int]:
    return (-1, -1) if record is None else (record["step"] or 0, record["count"])


def _seconds_there(record: dict[str, Any]) -> float:
    return float(record["seconds"] + max(0.0, time.time() - record["time"]))


def _grouped(items: Iterable[_T], key: Callable[[_T], str]) -> dict[str, list[_T]]:
    groups: dict[str, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
