"""Work of several threads, with results in the order of what was to be done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(items: Sequence[Item], work: Callable[[Item], Result], num_threads: int) -> Iterator[Result]:
    """The result of each item, in the order of the items. What one raises is raised in its place.

    The threads die with the process and are not waited for, so that an interrupt need not wait for answers. They are
    ahead by at most four items each.

    Args:
        items: what is to be done.
        work: does it; called in threads.
        num_threads: at once.
    """
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: dict[int, Result | BaseException] = {}
    changed = threading.Condition()

    def take() -> None:
        while (number := waiting.get()) is not None:
            try:
                result: Result | BaseException = work(items[number])
            except BaseException as error:  # raised again where it is asked for
                result = error
            with changed:
                done[number] = result
                changed.notify_all()

    num_threads = min(num_threads, len(items))
    for _ in range(num_threads):
        threading.Thread(target=take, daemon=True, name="in-order").start()
    ahead = min(4 * num_threads, len(items))
    for number in range(ahead):
        waiting.put(number)
    try:
        for number in range(len(items)):
            with changed:
                changed.wait_for(lambda place=number: place in done)  # type: ignore[misc]
                result = done.pop(number)
            if isinstance(result, BaseException):
                raise result
            if number + ahead < len(items):
                waiting.put(number + ahead)
            yield result
    finally:
        for _ in range(num_threads):
            waiting.put(None)
