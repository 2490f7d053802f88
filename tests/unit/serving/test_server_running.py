"""The server as it runs: bodies that do not end, whoever hangs up, its log, its addresses, and a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from megatron_grit.compat import install_command
from megatron_grit.config.options import ServingLimits
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.inference.model import GritModel
from megatron_grit.serving import bodies, server
from tests.unit.serving.test_server import CHAT, EMBEDDINGS, QUESTION


@contextlib.contextmanager
def running(model: GritModel, **options: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    """A server on a port of its own, in a thread of this process."""
    app = server.create_app(server.Service(model, "tiny", max_new_tokens=400), **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield http, listener.getsockname()[1]
        finally:
            http.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not stop"


def raw(port: int, head: str, body: bytes = b"") -> tuple[socket.socket, bytes]:
    """An open connection after a request's beginning."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    content = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + body
    connection.sendall(content)
    return connection, content


def test_bodies_that_do_not_end(model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A declared length above the limit is refused before a byte of it has come, a body that does not come in time
    too, and a chunked one where it grows too large."""
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with running(model) as (_, port):
        for head, body, status in (
            ("Content-Length: 9999999999", b"", 413),
            (f"Content-Length: {'9' * 19}", b"", 413),
            ("Content-Length: 100", b'{"messages"', 408),
            ("Transfer-Encoding: chunked", b"5\r\n{ \r\n", 408),
            ("Transfer-Encoding: chunked", b"400001\r\n" + b" " * 0x400001, 413),
        ):
            connection, _ = raw(port, head, body)
            with connection, connection.makefile("rb") as answer:
                assert answer.readline().split()[1] == str(status).encode(), head
                assert answer.read().count(b'"invalid_request_error"') == 1  # to the end: it hangs up
        whole = json.dumps({"messages": [QUESTION], "max_tokens": 1}).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in whole) + b"0\r\n\r\n"
        connection, _ = raw(port, "Transfer-Encoding: chunked\r\nConnection: close", chunks)
        with connection, connection.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"200"


def test_a_client_that_sends_all_of_a_large_body_sees_the_refusal(model: GritModel) -> None:
    """It reads when it has sent, by which time a connection with unread bytes would have been reset."""
    with running(model) as (_, port):
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", CHAT, b" " * (ServingLimits.max_body_bytes + 2**21))
            answer = connection.getresponse()
            assert answer.status == 413 and b"the body is larger than" in answer.read()
            connection.close()


@pytest.mark.parametrize("ends", ["client", "server"])
def test_a_generation_ends_with_whoever_waits(ends: str, model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hangs up, or the server is stopped and its time is over, while tokens are generated."""
    answer, started, ended = model.continue_prompts, threading.Event(), threading.Event()

    def slow(prompts: Any, options: Any, before_pass: Any) -> Any:
        def noting() -> None:
            started.set()
            time.sleep(0.05)
            before_pass()

        try:
            return answer(prompts, options, noting)
        finally:
            ended.set()

    monkeypatch.setattr(model, "continue_prompts", slow)
    body = json.dumps({"messages": [QUESTION], "max_tokens": 400}).encode()  # 20 s of it
    began = time.monotonic()
    with running(model) as (http, port):
        connection, _ = raw(port, f"Content-Length: {len(body)}", body)
        assert started.wait(60)
        if ends == "client":
            connection.close()
            assert ended.wait(60)
        else:
            http.should_exit = True
    connection.close()
    assert ended.wait(60) and time.monotonic() - began < 15


def test_a_line_for_each_request(model: GritModel, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    service = server.Service(model, "tiny")
    with TestClient(server.create_app(service, log_json=True), raise_server_exceptions=False) as client:
        used = client.post(EMBEDDINGS, json={"input": "a"}).json()["usage"]["total_tokens"]
        client.post(EMBEDDINGS, json={})
        client.get("/no%0Awhere")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    facts = [(line["method"], line["path"], line["status"], line["tokens"]) for line in lines]
    nowhere = ("GET", "/no%0Awhere", 404, None)
    assert facts == [("POST", EMBEDDINGS, 200, used), ("POST", EMBEDDINGS, 400, None), nowhere]
    assert all(line["ms"] >= 0 and line["time"].endswith("+00:00") for line in lines)
    with caplog.at_level("INFO", "megatron_grit"), TestClient(server.create_app(service)) as client:
        client.post(EMBEDDINGS, json={"input": "a"})
        client.get("/health")
    first, second = [record.getMessage() for record in caplog.records if "request_log" in record.name]
    assert re.fullmatch(rf"POST {EMBEDDINGS} 200 [\d.]+ ms, {used} tokens", first)
    assert re.fullmatch(r"GET /health 200 [\d.]+ ms", second)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: {re.escape(install_command('serve'))}"):
        server.serve("nowhere")


def test_an_address_that_cannot_be_used() -> None:
    """It is found before the checkpoint is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="in use; choose another"):
        server.serve("nowhere", port=taken.getsockname()[1])
    for options in ({"port": 70_000}, {"host": "no.such.host.invalid"}):
        with pytest.raises(ConfigError, match="cannot listen"):
            server.serve("nowhere", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_other_machines_are_warned_of(
    host: str, warned: bool, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(GritModel, "load", lambda *args, **options: model)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: messages.append("run"))
    for level in ("info", "warning"):
        monkeypatch.setattr(server.LOGGER, level, lambda text, *values: messages.append(text % values))
    server.serve("runs/tiny", host=host, port=0)
    assert ("everyone who can reach" in messages[0]) == warned
    assert messages[-2].startswith("serving tiny on http://") and messages[-1] == "run"


@pytest.mark.slow
def test_a_real_process(trained_run: RunConfig, repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "megatron_grit.cli.serve",
        "--checkpoint",
        trained_run.output_dir,
        "--device",
        "cpu",
    ]
    # Loading a model in this process has made it rank 0 of a job; the server is a job of its own.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=repository, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    guard = threading.Timer(200, process.kill)
    guard.start()
    try:
        lines = [process.stderr.readline() for _ in range(3)]
        assert "loading torch" in lines[0] and "loading the model of" in lines[1]
        line = lines[2]
        found = re.search(r"serving run on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + process.stderr.read()
        with urllib.request.urlopen(f"{found[1]}/health", timeout=60) as response:
            assert json.load(response) == {"status": "ok"}
        body = json.dumps({"messages": [QUESTION], "max_tokens": 4}).encode()
        with urllib.request.urlopen(found[1] + CHAT, data=body, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 4
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=60)
    finally:
        guard.cancel()
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, messages
    pattern = rf"[\d:]+ GET /health 200 [\d.]+ ms\n[\d:]+ POST {CHAT} 200 [\d.]+ ms, \d+ tokens\n"
    pattern += "megatron-grit serve: terminated\n"
    assert re.fullmatch(pattern, messages), messages
