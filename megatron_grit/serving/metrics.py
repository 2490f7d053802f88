"""Counts of requests in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

from megatron_grit.serving.scheduler import KINDS, Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends of the intervals of the histogram, in seconds."""
_PREFIX = "megatron_grit"


class Metrics:
    """What the server has done.

    Args:
        routes: paths that are counted by themselves; others are one, so that a client cannot make up series.
    """

    def __init__(self, routes: set[str]) -> None:
        self._routes = routes
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._counts: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()  # type: ignore[assignment]

    def count(self, path: str, status: int, seconds: float, usage: Mapping[str, int]) -> None:
        """Count a request that is done.

        Args:
            path: of the request.
            status: of the response.
            seconds: that it took.
            usage: its tokens; empty where nothing was computed.
        """
        route = path if path in self._routes else "other"
        self._requests[route, status] += 1
        self._tokens["prompt"] += usage.get("prompt_tokens", 0)
        self._tokens["generated"] += usage.get("completion_tokens", 0)
        self._counts.setdefault(route, [0] * (len(BOUNDS) + 1))[bisect_left(BOUNDS, seconds)] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]

    def text(self, scheduler: Scheduler) -> str:
        """All of it, with what waits and is computed now."""
        return "\n".join(self._lines(scheduler)) + "\n"

    def _lines(self, scheduler: Scheduler) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests that are done.")
        for (route, status), count in sorted(self._requests.items()):
            yield _line("requests_total", count, route=route, status=status)
        yield from _head("tokens_total", "counter", "Tokens that were read and generated.")
        for kind in ("prompt", "generated"):
            yield _line("tokens_total", self._tokens[kind], kind=kind)
        yield from _head("request_seconds", "histogram", "Time from a request to the end of its response.")
        for route, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
                total += count
                yield _line("request_seconds_bucket", total, route=route, le=bound)
            yield _line("request_seconds_sum", self._seconds[route], route=route)
            yield _line("request_seconds_count", total, route=route)
        for number, (name, about) in enumerate((("waiting", "that wait"), ("running", "that are computed"))):
            yield from _head(f"requests_{name}", "gauge", f"Requests {about}.")
            for each in KINDS:
                yield _line(f"requests_{name}", scheduler.count(each)[number], kind=each)
        yield from _head("device_seconds_total", "counter", "Time that each kind of request has had the device.")
        for each in KINDS:
            yield _line("device_seconds_total", scheduler.turns.seconds[each], kind=each)


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {_PREFIX}_{name} {about}", f"# TYPE {_PREFIX}_{name} {kind}"]


def _line(name: str, value: float, **labels: object) -> str:
    # No value of a label is a client's, so none needs escaping.
    told = ",".join(f'{label}="{text}"' for label, text in labels.items())
    return f"{_PREFIX}_{name}{{{told}}} {value}"
