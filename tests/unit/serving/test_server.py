"""The HTTP server: it answers what the model answers, refuses what it cannot use, and ends when asked to."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.inference.model import GritModel
from megatron_grit.serving import server
from megatron_grit.training.trainer import train
from tests.corpus import tiny_run

QUESTION = {"role": "user", "content": "what does the parser do when it opens?"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "The parser opens a file."},
    {"role": "user", "content": "what does the queue do?"},
]
EMBEDDINGS, CHAT = "/v1/embeddings", "/v1/chat/completions"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An untrained model on disk."""
    config = tiny_run(tmp_path_factory.mktemp("server"))
    config.training.steps = 0
    train(config)
    return config


@pytest.fixture(scope="module")
def model(config: RunConfig) -> GritModel:
    return GritModel.load(config.output_dir, device="cpu")


@pytest.fixture(scope="module")
def client(model: GritModel) -> Iterator[TestClient]:
    service = server.Service(model, "tiny", max_length=64, max_new_tokens=32)
    with TestClient(server.create_app(service), raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error["message"]


def test_health_and_models(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "tiny" and entry["object"] == "model"


@pytest.mark.parametrize("instruction", ["Answer the question", "", None])
def test_embeddings_are_those_of_encode(client: TestClient, model: GritModel, instruction: str | None) -> None:
    texts = ["The parser opens a file.", "The queue sorts two lists and every byte. " * 9]
    expected = model.encode(texts, instruction, max_length=64)
    answer = client.post(EMBEDDINGS, json={"input": texts, "instruction": instruction, "user": "ignored"}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    np.testing.assert_array_equal(
        np.array([entry["embedding"] for entry in answer["data"]], dtype=np.float32), expected
    )
    packed = client.post(EMBEDDINGS, json={"input": texts, "instruction": instruction, "encoding_format": "base64"})
    for entry, row in zip(packed.json()["data"], expected, strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), row)


def test_one_text_and_its_tokens(client: TestClient, model: GritModel) -> None:
    answer = client.post(EMBEDDINGS, json={"input": QUESTION["content"], "model": "another"}).json()
    (entry,) = answer["data"]
    np.testing.assert_array_equal(np.float32(entry["embedding"]), model.encode(QUESTION["content"]))
    assert answer["model"] == "tiny"
    template = [model.tokenizer.bos_id, *model.tokenizer.encode("<|embed|>\n" + QUESTION["content"])]
    assert answer["usage"] == {"prompt_tokens": len(template), "total_tokens": len(template)}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}, {"temperature": 2, "seed": 6}])
def test_chat_is_what_generate_says(client: TestClient, model: GritModel, options: dict[str, Any]) -> None:
    expected = model.generate(CONVERSATION, max_new_tokens=12, **options)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.post(CHAT, json={"messages": CONVERSATION, name: 12, "stream": False, **options}).json()
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected}
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert (choice["finish_reason"] == "length") == (usage["completion_tokens"] == 12)


def test_an_answer_ends_at_its_stop(client: TestClient, model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post(CHAT, json={"messages": [QUESTION]}).json()
    assert answer["choices"][0]["finish_reason"] == "length", "the untrained model stopped by itself"
    assert answer["usage"]["completion_tokens"] == 32
    prompt = [model.tokenizer.bos_id, *model.tokenizer.encode(f"<|user|>\n{QUESTION['content']}\n<|assistant|>\n")]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    tokens = server.generate_tokens(model.model, [prompt], max_new_tokens=32, stop_ids=())[0]
    stop = tokens[-1]
    monkeypatch.setattr(model, "chat", replace(model.chat, end_ids=(stop,)))
    answer = client.post(CHAT, json={"messages": [QUESTION]}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == tokens.index(stop)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (EMBEDDINGS, {}, "input must be a string"),
        (EMBEDDINGS, {"input": 3}, "input must be a string"),
        (EMBEDDINGS, {"input": [[1, 2]]}, "input must be a string"),
        (EMBEDDINGS, {"input": []}, "no text to encode"),
        (EMBEDDINGS, {"input": ["a", " "]}, "text 1 is empty"),
        (EMBEDDINGS, {"input": "\ud800"}, "surrogate"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, "at most 2048"),
        (EMBEDDINGS, {"input": "a", "instruction": 1}, "instruction must be"),
        (EMBEDDINGS, {"input": "a", "instruction": "long " * 99}, "fills max_length 64"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (CHAT, {"messages": [QUESTION], "stream": True}, "stream is not supported"),
        (CHAT, {}, "messages must be a list"),
        (CHAT, {"messages": "hello"}, "messages must be a list"),
        (CHAT, {"messages": ["hello"]}, "messages must be a list"),
        (CHAT, {"messages": []}, "last turn has to be the user's"),
        (CHAT, {"messages": [QUESTION, QUESTION]}, "message 1 is of role user where assistant was expected"),
        (CHAT, {"messages": CONVERSATION[:3]}, "last turn has to be the user's"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content of message 0"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 600}]}, "more than the 512"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 100}], "max_tokens": 33}, "from 1 to 32"),
        (CHAT, {"messages": [QUESTION], "max_tokens": 0}, "max_tokens must be an integer from 1"),
        (CHAT, {"messages": [QUESTION], "max_tokens": 2.0}, "max_tokens must be an integer"),
        (CHAT, {"messages": [QUESTION], "max_completion_tokens": "9"}, "max_completion_tokens must be"),
        (CHAT, {"messages": [QUESTION], "temperature": -1}, "temperature must be a number from 0.0 to 2.0"),
        (CHAT, {"messages": [QUESTION], "temperature": float("nan")}, "temperature must be"),
        (CHAT, {"messages": [QUESTION], "temperature": True}, "temperature must be"),
        (CHAT, {"messages": [QUESTION], "temperature": 1e-40}, "at least 0.01"),
        (CHAT, {"messages": [QUESTION], "top_p": 1.1}, "top_p must be"),
        (CHAT, {"messages": [QUESTION], "seed": 2**63}, "seed must be"),
    ],
)
def test_a_body_that_cannot_be_used(client: TestClient, path: str, body: dict[str, Any], message: str) -> None:
    assert message in error_of(client.post(path, content=json.dumps(body)))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"[" * 200_000, b'{"input": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object(client: TestClient, content: bytes) -> None:
    assert error_of(client.post(EMBEDDINGS, content=content)).startswith("the body ")


def test_other_refusals(client: TestClient) -> None:
    over = json.dumps({"input": "a", "filler": "x" * server.MAX_BODY_BYTES})
    assert "larger than" in error_of(client.post(EMBEDDINGS, content=over), 413)
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(EMBEDDINGS), 405)


def test_room_for_the_answer(client: TestClient, model: GritModel) -> None:
    """What the model takes is prompt and answer: a number of tokens that does not fit is refused, the default fits."""
    words = next(n for n in range(400) if 480 < len(model.tokenizer.encode("a file " * n)) < 490)
    body = {"messages": [{"role": "user", "content": "a file " * words}]}
    answer = client.post(CHAT, json=body).json()
    usage = answer["usage"]
    assert usage["total_tokens"] == 512 and usage["completion_tokens"] < 32
    assert "max_tokens is 32" in error_of(client.post(CHAT, json=body | {"max_tokens": 32}))


def test_an_error_of_ours_is_500(client: TestClient, model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "encode", lambda *args, **options: 1 / 0)
    assert "internal error" in error_of(client.post(EMBEDDINGS, json={"input": "a"}), 500)
    monkeypatch.undo()
    assert client.post(EMBEDDINGS, json={"input": "a"}).status_code == 200


def test_requests_wait_in_turn_and_health_does_not(
    client: TestClient, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, entered, go_on, inside, most = model.encode, threading.Semaphore(0), threading.Event(), [0], [0]

    def slow(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        entered.release()
        assert go_on.wait(20), "nobody else was answered meanwhile"
        result = encode(*args, **options)
        inside[0] -= 1
        return result

    monkeypatch.setattr(model, "encode", slow)
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(client.post, EMBEDDINGS, json={"input": text}) for text in ("a", "b")]
        assert entered.acquire(timeout=20)
        assert pool.submit(client.get, "/health").result(timeout=10).status_code == 200
        assert "input must be" in error_of(pool.submit(client.post, EMBEDDINGS, json={}).result(timeout=10))
        assert not entered.acquire(timeout=0.5), "two requests were computed at once"
        go_on.set()
        answers = [request.result(timeout=20).json()["data"][0]["embedding"] for request in requests]
    assert most == [1]
    for text, answer in zip(("a", "b"), answers, strict=True):
        np.testing.assert_array_equal(np.float32(answer), encode(text))


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_is_computed_for_a_client_that_left(
    whole: bool, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves while it waits for its turn, or in the middle of its body."""
    computed: list[Any] = []
    monkeypatch.setattr(model, "encode", lambda *args, **options: computed.append(args))
    body = {"type": "http.request", "body": b'{"input": "a"}', "more_body": not whole}
    received, sent = iter([body, {"type": "http.disconnect"}]), []

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    app = server.create_app(server.Service(model, "tiny"))
    scope = {"type": "http", "method": "POST", "path": EMBEDDINGS, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499 and not computed


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'megatron-grit\[serve\]'"):
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
    assert ("no authentication" in messages[0]) == warned
    assert messages[-2].startswith("serving tiny on http://") and messages[-1] == "run"


@pytest.mark.slow
def test_a_real_process(config: RunConfig, repository: Path) -> None:
    command = [sys.executable, "-m", "megatron_grit.cli.serve", "--checkpoint", config.output_dir, "--device", "cpu"]
    # Loading a model in this process has made it rank 0 of a job; the server is a job of its own.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=repository, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    guard = threading.Timer(200, process.kill)
    guard.start()
    try:
        line = process.stderr.readline()
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
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), messages
    assert messages == ""
