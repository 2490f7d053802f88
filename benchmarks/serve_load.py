"""Many clients of one server: it answers all of them, keeps its memory, and neither kind of request starves.

A server in a process of its own is asked by so many clients at once, each with one connection and its next request as
soon as the last one is answered: half of them embed or rerank, the others chat or continue texts, half of these with a
stream. Responses are looked at as OpenAI's client reads them. Meanwhile others do what servers are not asked for:
bodies that are no JSON, too large, or come slowly and never end, a wrong key, and clients that leave in the middle.

1. Every request of a client is answered with status 200 and whole; every other one as it has to be.
2. Memory of the server: at the end at most 5 % more than after a third of the time.
3. Device time: each kind has at least 40 % of it, and in every 5 seconds but the first some requests of each are done.
4. The server that is stopped meanwhile answers what it has accepted and exits with its status.

Example:
    python -m benchmarks.serve_load --checkpoint runs/quickstart --json serve_load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks import harness
from megatron_grit.errors import DataError

MOST_MORE, LEAST_SHARE, WINDOW = 0.05, 0.4, 5
WORDS = "the parser opens a file and the queue sorts every byte of two lists before it ends".split()


def check(right: bool, what: str) -> None:
    """Refuse what is not as it has to be."""
    if not right:
        raise DataError(what)


class Clients:
    """All clients, and what became of their requests."""

    def __init__(self, url: str, key: str, until: float) -> None:
        self.url, self.key, self.until = url, key, until
        self.done: list[tuple[str, float, float]] = []
        """Kind, end and seconds of each request."""
        self.others: Counter[str] = Counter()
        self.errors: list[str] = []

    async def embed(self, client: httpx2.AsyncClient, number: int) -> None:
        """Vectors of a few texts, or their order."""
        texts = [" ".join(WORDS[(number + shift) % 7 :]) for shift in range(1 + number % 4)]
        if number % 3:
            body = {"input": texts, "encoding_format": "float", "model": "load"}
            answer = (await self.posted(client, "/v1/embeddings", body)).json()
            check([one["index"] for one in answer["data"]] == list(range(len(texts))), "not every text has a vector")
            check(all(isinstance(value, float) for one in answer["data"] for value in one["embedding"]), "no vector")
            check(answer["usage"]["total_tokens"] > 0, "no usage")
        else:
            body = {"query": WORDS[number % 9], "documents": texts, "top_n": 2}
            answer = (await self.posted(client, "/v1/rerank", body)).json()
            scores = [one["relevance_score"] for one in answer["results"]]
            check(scores == sorted(scores, reverse=True) and len(scores) == min(2, len(texts)), "no order")

    async def generate(self, client: httpx2.AsyncClient, number: int) -> None:
        """An answer or a continuation, half of them as streams."""
        asked = {"max_tokens": 4 + number % 9, "temperature": 1.0, "seed": number, "stop": ["never there"]}
        prompt = " ".join(WORDS[number % 11 :])
        chat = number % 4 < 3
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = asked | ({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt})
        if number % 2:
            answer = (await self.posted(client, path, body)).json()
            (choice,) = answer["choices"]
            text, reason = (choice["message"]["content"] if chat else choice["text"]), choice["finish_reason"]
            usage = answer["usage"]
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            text, reason, usage = await self.streamed(client, path, body, chat)
        check(isinstance(text, str) and reason in ("stop", "length"), "no answer")
        check(0 <= usage["completion_tokens"] <= asked["max_tokens"], "no usage")

    async def posted(self, client: httpx2.AsyncClient, path: str, body: Any) -> httpx2.Response:
        answer = await client.post(path, json=body)
        check(answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:200]}")
        return answer

    async def streamed(self, client: httpx2.AsyncClient, path: str, body: Any, chat: bool) -> tuple[str, Any, Any]:
        """The text of all chunks, and why and with which usage they end."""
        text, reason, usage, ended = "", None, None, False
        async with client.stream("POST", path, json=body) as answer:
            check(answer.status_code == 200, f"{path}: {answer.status_code}")
            async for line in answer.aiter_lines():
                check(not ended or not line, "something comes after the end")
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    chunk = json.loads(line.removeprefix("data: "))
                    check("error" not in chunk, line)
                    for choice in chunk["choices"]:
                        text += choice["delta"]["content"] if chat else choice["text"]
                        reason = choice["finish_reason"] or reason
                    usage = chunk["usage"] or usage
        check(ended, "a stream has no end")
        return text, reason, usage

    async def client(self, kind: str, number: int) -> None:
        """One client, until the time is over."""
        ask = self.embed if kind == "embed" else self.generate
        headers = {"Authorization": f"Bearer {self.key}"}
        # Without verify=False each would read the certificates of this machine.
        async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=120, verify=False) as client:
            await asyncio.sleep(0)
            while time.monotonic() < self.until:
                began = time.monotonic()
                try:
                    await ask(client, number)
                except Exception as error:
                    self.errors.append(f"{kind}: {error!r}")
                self.done.append((kind, time.monotonic(), time.monotonic() - began))
                number += 1

    async def other(self, what: Callable[[], Awaitable[str]]) -> None:
        """One that does again and again what servers are not asked for."""
        while time.monotonic() < self.until:
            try:
                self.others[await what()] += 1
            except Exception as error:
                self.errors.append(f"{what.__name__}: {error!r}")
            await asyncio.sleep(0.3)

    async def raw(self, head: str, body: bytes, status: int | None) -> None:
        """Send something over a connection of its own, and read the status of the answer, if it has to have one."""
        host, port = re.fullmatch(r"http://(.+):(\d+)", self.url).groups()  # type: ignore[union-attr]
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + body)
        await writer.drain()
        if status is None:
            await asyncio.sleep(1)
        else:
            line = await asyncio.wait_for(reader.readline(), 60)
            check(line.split()[1] == str(status).encode(), f"{line!r} in place of {status}")
        writer.close()

    async def malformed(self) -> str:
        """A body that is no JSON."""
        await self.raw(f"Authorization: Bearer {self.key}\r\nContent-Length: 5", b"{{{{{", 400)
        return "malformed"

    async def oversized(self) -> str:
        """A body that is announced to be too large."""
        await self.raw(f"Authorization: Bearer {self.key}\r\nContent-Length: 99999999999", b"{", 413)
        return "oversized"

    async def unending(self) -> str:
        """A body that stops in the middle, and a client that leaves a second later."""
        await self.raw(f"Authorization: Bearer {self.key}\r\nContent-Length: 100", b'{"messages"', None)
        return "slow"

    async def intruder(self) -> str:
        """A key that is wrong by its last character."""
        await self.raw(f"Authorization: Bearer {self.key[:-1]}\r\nContent-Length: 2", b"{}", 401)
        return "wrong key"

    async def leaving(self) -> str:
        """A client that leaves while its answer is made, or while it waits for it."""
        body = json.dumps(
            {"messages": [{"role": "user", "content": "why?"}], "max_tokens": 400, "stream": True}
        ).encode()
        await self.raw(f"Authorization: Bearer {self.key}\r\nContent-Length: {len(body)}", body, None)
        return "left"


async def load(url: str, key: str, num_clients: int, seconds: float, look: Callable[[], None]) -> Clients:
    """All clients at once; ``look`` is called every second."""
    clients = Clients(url, key, time.monotonic() + seconds)
    works = [clients.client(("embed", "generate")[number % 2], number) for number in range(num_clients)]
    kinds = (clients.malformed, clients.oversized, clients.unending, clients.intruder, clients.leaving)
    works += [clients.other(what) for what in kinds]

    async def looking() -> None:
        while time.monotonic() < clients.until:
            look()
            await asyncio.sleep(1)

    await asyncio.gather(looking(), *works)
    return clients


async def stop(process: subprocess.Popen[bytes], url: str, key: str) -> tuple[int, list[int]]:
    """End the server while it has requests. Returns its exit status, and those of the requests."""
    body = {"messages": [{"role": "user", "content": "why?"}], "max_tokens": 200, "temperature": 1.0}
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        works = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(3)]
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        statuses = [(await work).status_code for work in works]
    return await asyncio.to_thread(process.wait, 60), statuses


def start(checkpoint: str, folder: Path, key: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server, and its address."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "megatron_grit.cli.serve", f"--checkpoint={checkpoint}"]
    command += ["--port=0", "--name=load", "--log-json"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"MEGATRON_GRIT_API_KEY": key})
    while process.poll() is None:
        if found := re.search(r"serving load on (http://\S+)", log.read_text(encoding="utf-8")):
            return process, found[1]
        time.sleep(0.2)
    raise DataError(f"the server has ended: {log.read_text(encoding='utf-8')}")


def device_seconds(url: str, key: str) -> dict[str, float]:
    """Of the server's metrics, by kind."""
    text = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    found = re.findall(r'device_seconds_total\{kind="(\w+)"\} (\S+)', text)
    return {kind: float(value) for kind, value in found}


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Start a server, load it, and stop it."""
    key, sizes = secrets.token_urlsafe(24), list[int]()
    process, url = start(arguments.checkpoint, folder, key)
    try:
        process_of = psutil.Process(process.pid)
        began = time.monotonic()
        clients = asyncio.run(
            load(url, key, arguments.clients, arguments.seconds, lambda: sizes.append(process_of.memory_info().rss))
        )
        used = device_seconds(url, key)
        status, statuses = asyncio.run(stop(process, url, key))
    finally:
        process.kill()
    windows: dict[int, Counter[str]] = defaultdict(Counter)
    for kind, end, _ in clients.done:
        windows[int((end - began) / WINDOW)][kind] += 1
    whole = range(1, int(arguments.seconds / WINDOW))  # in the first one clients begin
    third = len(sizes) // 3
    before, after = (statistics.fmean(part) for part in (sizes[third : third + 5], sizes[-5:]))
    numbers: dict[str, Any] = {"errors": clients.errors[:20], "others": dict(clients.others)}
    numbers |= {"memory_mib": [round(size / 2**20, 1) for size in (before, after)], "growth": after / before - 1}
    for kind in ("embed", "generate"):
        times = sorted(taken for other, _, taken in clients.done if other == kind)
        numbers[kind] = {
            "requests": len(times),
            "device_seconds": used[kind],
            "median_seconds": statistics.median(times),
            "p95_seconds": times[int(0.95 * len(times))],
            "share_of_device": used[kind] / sum(used.values()),
            "fewest_in_5_s": min(windows[number][kind] for number in whole),
        }
    numbers |= {"exit_status": status, "requests_at_the_end": statuses}
    print(json.dumps(numbers, indent=1))
    fair = all(
        numbers[kind]["share_of_device"] >= LEAST_SHARE and numbers[kind]["fewest_in_5_s"] > 0
        for kind in ("embed", "generate")
    )
    ended = status in (-signal.SIGTERM, 128 + signal.SIGTERM) and statuses == [200] * 3
    return numbers, not clients.errors and len(clients.others) == 5 and numbers[
        "growth"
    ] <= MOST_MORE and fair and ended


def main() -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="of a model to serve; a small one")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    return harness.run("serve_load", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
