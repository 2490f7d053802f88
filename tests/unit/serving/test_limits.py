"""Who may use the server and how much of it: keys, tokens, waiting requests, time, and its end."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from megatron_grit.config.options import ServingLimits
from megatron_grit.errors import ConfigError
from megatron_grit.inference.model import GritModel
from megatron_grit.serving import access, server
from megatron_grit.serving.access import read_keys
from megatron_grit.serving.app import create_app
from megatron_grit.serving.fields import RequestError
from megatron_grit.serving.scheduler import Abandoned, Run, Scheduler
from megatron_grit.serving.service import Service
from tests.unit.serving.test_server import CHAT, EMBEDDINGS, QUESTION, error_of

RERANK = "/v1/rerank"
KEYS = [b"correct-horse", b"battery-staple"]
TEXT = {"input": "a"}


@contextmanager
def client_of(model: GritModel, keys: list[bytes] | None = None, **limits: Any) -> Iterator[TestClient]:
    app = create_app(Service(model, "tiny", **limits), keys=keys or [])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def held(model: GritModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
    """What embeds stands still from its first pass on, which the semaphore counts, until the event."""
    embed, entered, go_on = model.embed_tokens, threading.Semaphore(0), threading.Event()

    def slow(*args: Any, before_pass: Callable[[], None], **options: Any) -> Any:
        entered.release()
        deadline = time.monotonic() + 20
        while not go_on.wait(0.01):
            before_pass()
            assert time.monotonic() < deadline
        return embed(*args, before_pass=before_pass, **options)

    monkeypatch.setattr(model, "embed_tokens", slow)
    yield entered, go_on
    go_on.set()


def test_a_request_needs_a_key(model: GritModel, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    compare, compared = hmac.compare_digest, list[bytes]()

    def noting(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare(given, key)

    with caplog.at_level(logging.DEBUG), client_of(model, KEYS) as client:
        for header in ("", "Bearer", "Bearer ", "Bearer correct-hors", "Bearer correct-horse2", "Basic correct-horse"):
            for path in (EMBEDDINGS, CHAT, "/metrics", "/v1/models", "/v1/nothing"):
                answer = client.request("POST", path, json=TEXT, headers={"Authorization": header} if header else {})
                assert error_of(answer, 401) == "the API key is missing or wrong"
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        twice = [("Authorization", "Bearer correct-horse"), ("Authorization", "Bearer wrong-key")]
        error_of(client.post(EMBEDDINGS, json=TEXT, headers=twice), 401)
        for key in ("correct-horse", "battery-staple"):
            assert client.post(EMBEDDINGS, json=TEXT, headers={"Authorization": f"bearer {key}"}).status_code == 200
            assert client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(hmac, "compare_digest", noting)
            # The first one is right, and the second is compared all the same.
            assert client.get("/v1/models", headers={"Authorization": "Bearer correct-horse"}).status_code == 200
    assert compared == KEYS
    assert "horse" not in caplog.text and "staple" not in caplog.text


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(access.VARIABLE, raising=False)
    assert read_keys(None) == []
    path = tmp_path / "keys"
    path.write_text("correct-horse\n\n  battery-staple \n")
    assert read_keys(path) == KEYS
    monkeypatch.setenv(access.VARIABLE, "of-the-environment")
    assert read_keys(None) == [b"of-the-environment"] and read_keys(path) == KEYS
    for content, why in (
        ("", "holds no API key"),
        ("\n \n", "holds no API key"),
        ("ok-ok-ok-ok\nshort", "API key 2 of"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=why) as caught:
            read_keys(path)
        assert "short" not in str(caught.value).replace(str(path), "")
    monkeypatch.setenv(access.VARIABLE, "")
    with pytest.raises(ConfigError, match="MEGATRON_GRIT_API_KEY holds no API key"):
        read_keys(None)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        server.serve("nowhere", port=0, api_key_file=tmp_path / "none")


def test_tokens_of_a_request(model: GritModel) -> None:
    chat = {"messages": [QUESTION], "max_tokens": 1}
    rank = {"query": "a", "documents": ["The parser opens a file."] * 9}
    with client_of(model) as client:
        one = client.post(EMBEDDINGS, json={"input": "The parser"}).json()["usage"]["total_tokens"]
        asked = client.post(CHAT, json=chat).json()["usage"]["prompt_tokens"]
        ranked = client.post(RERANK, json=rank).json()["usage"]["total_tokens"]
        likely = client.post(RERANK, json=rank | {"method": "query_likelihood"}).json()["usage"]["total_tokens"]
    for path, body, num_tokens in (
        (EMBEDDINGS, {"input": ["The parser"] * 5}, 5 * one),
        (CHAT, chat | {"n": 3}, 3 * asked),
        ("/v1/completions", {"prompt": [[5, 6, 7]] * 9, "n": 2, "max_tokens": 1}, 54),
        (RERANK, rank, ranked),
        (RERANK, rank | {"method": "query_likelihood"}, likely),
    ):
        with client_of(model, max_request_tokens=num_tokens) as client:
            assert client.post(path, json=body).status_code == 200, path
        with client_of(model, max_request_tokens=num_tokens - 1) as client:
            answer = client.post(path, json=body)
            assert "tokens to read" in error_of(answer, 413) and answer.json()["error"]["code"] == "request_too_large"


def test_only_so_many_requests_of_a_kind_wait(model: GritModel, held: Any) -> None:
    entered, go_on = held
    with client_of(model, max_waiting=2) as client, ThreadPoolExecutor() as pool:
        requests = [pool.submit(client.post, EMBEDDINGS, json=TEXT)]
        assert entered.acquire(timeout=20)
        requests += [pool.submit(client.post, EMBEDDINGS, json=TEXT) for _ in range(2)]
        for _ in range(200):
            if 'requests_waiting{kind="embed"} 2' in client.get("/metrics").text:
                break
            time.sleep(0.02)
        refused = client.post(RERANK, json={"query": "a", "documents": ["b"]})
        assert error_of(refused, 429) == "2 requests wait already; try again later"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded" and refused.headers["Retry-After"] == "1"
        # The other kind is computed between the passes that the first one waits for.
        assert client.post(CHAT, json={"messages": [QUESTION], "max_tokens": 5}).status_code == 200
        assert not any(request.done() for request in requests)
        go_on.set()
        assert [request.result(timeout=20).status_code for request in requests] == [200] * 3
    with client_of(model, max_waiting=0) as client:  # none waits, and one is computed
        assert [client.post(EMBEDDINGS, json=TEXT).status_code for _ in range(2)] == [200] * 2


def test_a_request_that_takes_too_long_or_waits_for_too_long(model: GritModel, held: Any) -> None:
    with client_of(model, max_seconds=0.3) as client, ThreadPoolExecutor() as pool:
        for request in [pool.submit(client.post, EMBEDDINGS, json=TEXT) for _ in range(2)]:
            answer = request.result(timeout=20)
            assert error_of(answer, 504) == "there was no answer within 0.3 s; ask for less, or try again later"
            assert answer.json()["error"]["code"] == "timeout"
        held[1].set()
        assert client.post(EMBEDDINGS, json=TEXT).status_code == 200


def test_who_gives_up_waits_no_more() -> None:
    """Neither its place nor its body is kept until its turn would have come."""
    go_on, computed = threading.Event(), list[int]()

    def work(number: int) -> Any:
        def pieces(before_pass: Callable[[], None]) -> Iterator[Any]:
            before_pass()
            computed.append(number)
            assert go_on.wait(20)
            yield number

        return pieces

    async def scene() -> None:
        scheduler, nobody = Scheduler(ServingLimits(max_waiting=3)), asyncio.get_running_loop().create_future()
        runs = [scheduler.start("embed", work(number)) for number in range(2)]
        await asyncio.sleep(0.05)
        runs += [scheduler.start("embed", work(number)) for number in (2, 3)]
        assert scheduler.count("embed") == (3, 1)
        with pytest.raises(RequestError, match="3 requests wait already"):
            scheduler.start("embed", work(9))
        for run in runs[1:3]:
            scheduler.abandon("embed", run)
        gone = asyncio.get_running_loop().create_future()
        gone.set_result(None)
        with pytest.raises(Abandoned):
            await runs[2].next(gone)
        await asyncio.sleep(0.05)
        assert scheduler.count("embed") == (1, 1) and scheduler.count("generate") == (0, 0)
        go_on.set()
        assert await runs[3].next(nobody) == (True, 3)
        assert await runs[3].next(nobody) == (False, None)
        await asyncio.sleep(0.05)
        assert not scheduler.busy and computed == [0, 3]

    asyncio.run(scene())


def test_an_end_that_waits_for_requests(model: GritModel, held: Any) -> None:
    """What was accepted is answered, waiting requests included; what comes then is refused, on new connections too."""
    entered, go_on = held
    service = Service(model, "tiny")
    scheduler = None

    def post(port: int) -> tuple[int, bytes]:
        body = json.dumps(TEXT).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            with connection.makefile("rb") as answer:
                return int(answer.readline().split()[1]), answer.read()

    started, found = threading.Event(), list[Any]()

    def run(listener: socket.socket) -> None:
        nonlocal scheduler
        scheduler = Scheduler(service.limits)
        app = create_app(service, scheduler=scheduler)
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=5)
        found.append(server.stopping_server(config, scheduler))
        started.set()
        found[0].run(sockets=[listener])

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=run, args=(listener,), daemon=True)
        thread.start()
        assert started.wait(20)
        accepted = [pool.submit(post, port)]
        assert entered.acquire(timeout=20)
        accepted.append(pool.submit(post, port))
        while scheduler.count("embed") != (1, 1):  # type: ignore[attr-defined]
            time.sleep(0.01)
        found[0].handle_exit(signal.SIGTERM, None)
        status, body = post(port)
        assert status == 503 and b"the server is being stopped" in body and b'"server_error"' in body
        time.sleep(0.3)
        assert post(port)[0] == 503  # it listens as long as there is something to wait for
        assert thread.is_alive() and not any(each.done() for each in accepted)
        go_on.set()
        assert [each.result(timeout=20)[0] for each in accepted] == [200, 200]
        thread.join(20)
        assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        post(port)


def test_a_run_says_what_failed() -> None:
    def work(before_pass: Callable[[], None]) -> Iterator[Any]:
        yield "first"
        raise ZeroDivisionError

    async def scene() -> None:
        nobody = asyncio.get_running_loop().create_future()
        run: Run = Scheduler(ServingLimits()).start("generate", work)  # type: ignore[arg-type]
        assert await run.next(nobody) == (True, "first")
        with pytest.raises(ZeroDivisionError):
            await run.next(nobody)

    asyncio.run(scene())


def test_pages_of_other_sites_are_refused_without_keys(model: GritModel) -> None:
    """Browsers send such a request without asking first, and let a page's own name lead to this machine."""
    app = create_app(Service(model, "tiny"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        same = {"Origin": "http://127.0.0.1:8000"}
        assert client.post(EMBEDDINGS, json=TEXT, headers=same).status_code == 200
        assert client.post(EMBEDDINGS, json=TEXT, headers={"Host": "localhost:8000"}).status_code == 200
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:8000"}):
            response = client.post(EMBEDDINGS, json=TEXT, headers=headers)
            assert response.status_code == 403 and "another site" in response.json()["error"]["message"]
    with client_of(model, KEYS) as client:
        headers = {"Origin": "http://app.example", "Authorization": f"Bearer {KEYS[0].decode()}"}
        assert client.post(EMBEDDINGS, json=TEXT, headers=headers).status_code == 200
