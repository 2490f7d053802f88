"""Answers as server-sent events: joined they are the whole answer, and they come while it is made."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from megatron_grit.inference.model import GritModel
from megatron_grit.serving.app import create_app
from megatron_grit.serving.service import Service
from tests.unit.serving.test_server import CHAT, CONVERSATION, EMBEDDINGS, QUESTION, error_of
from tests.unit.serving.test_server_running import running

COMPLETIONS = "/v1/completions"
CASES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": CONVERSATION, "max_tokens": 12}),
    (CHAT, {"messages": [QUESTION], "max_tokens": 20, "temperature": 1.5, "n": 3, "seed": 4, "logprobs": True}),
    (CHAT, {"messages": [QUESTION], "max_tokens": 9, "return_token_ids": True}),
    (COMPLETIONS, {"prompt": ["The parser", "a"], "max_tokens": 8, "n": 2, "temperature": 0.9, "logprobs": 0}),
]


@pytest.fixture(scope="module")
def client(model: GritModel) -> Iterator[TestClient]:
    app = create_app(Service(model, "tiny", max_new_tokens=64))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def events(text: str) -> list[Any]:
    """What a stream says, of which every event is whole and the last one ends it."""
    *parts, rest = text.split("\n\n")
    assert rest == "" and all(part.startswith("data: ") and "\n" not in part for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def streamed(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    answer = client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(answer.text)


@pytest.mark.parametrize(("path", "body"), CASES)
def test_chunks_are_the_answer(client: TestClient, path: str, body: dict[str, Any]) -> None:
    whole = client.post(path, json=body).json()
    *chunks, last = streamed(client, path, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert [set(chunk) for chunk in streamed(client, path, body)] == [set(chunk) - {"usage"} for chunk in chunks]
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1
    kind = "chat.completion.chunk" if path == CHAT else "text_completion"
    texts, ends, roles = defaultdict[int, str](str), dict[int, Any](), defaultdict[int, list[bool]](list)
    for chunk in chunks:
        assert chunk["usage"] is None and chunk["object"] == kind and chunk["model"] == "tiny"
        (choice,) = chunk["choices"]
        assert choice["index"] not in ends, "nothing comes after the end"
        texts[choice["index"]] += choice["delta"]["content"] if path == CHAT else choice["text"]
        if path == CHAT:
            roles[choice["index"]].append(choice["delta"].get("role") == "assistant")
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = choice
    assert len(chunks) > 2 * len(ends) and all(given[0] and not any(given[1:]) for given in roles.values())
    for choice in whole["choices"]:
        end = ends.pop(choice["index"])
        assert texts[choice["index"]] == (choice["message"]["content"] if path == CHAT else choice["text"])
        for known in ("finish_reason", "logprobs", "token_ids"):
            assert end.get(known) == choice.get(known)
    assert not ends
    if "prompt_token_ids" in whole:
        assert chunks[-1]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_a_stream_ends_before_its_stop(client: TestClient) -> None:
    body = {"messages": [QUESTION], "max_tokens": 30, "temperature": 2.0, "seed": 3}
    whole = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    stop = whole[9:14]  # of several tokens
    chunks = streamed(client, CHAT, body | {"stop": stop})
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == whole[: whole.find(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"stream": "yes"}, "stream must be true or false, not 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options is of stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage must be true or false, not 1"),
        ({"stream": True, "stream_options": {"other": 1}}, 'stream_options must be {"include_usage"'),
        ({"stream": True, "stream_options": []}, 'stream_options must be {"include_usage"'),
        ({"stream": True, "messages": [{"role": "user", "content": "long " * 600}]}, "the model takes 512"),
    ],
)
def test_what_fails_before_the_first_chunk_has_a_status(client: TestClient, more: dict[str, Any], why: str) -> None:
    assert why in error_of(client.post(CHAT, json={"messages": [QUESTION]} | more))


def slow(model: GritModel, monkeypatch: pytest.MonkeyPatch, at: Callable[[int], object]) -> threading.Event:
    """Each pass of an answer is told of its number first. Returns what is set at its end."""
    stream, ended = model.stream_prompts, threading.Event()

    def counted(prompts: Any, options: Any, before_pass: Any) -> Any:
        passes = iter(range(10**6))

        def noting() -> None:
            at(next(passes))
            before_pass()

        try:
            yield from stream(prompts, options, noting)
        finally:
            ended.set()

    monkeypatch.setattr(model, "stream_prompts", counted)
    return ended


def test_what_fails_later_is_an_event(model: GritModel, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    body = {"messages": [QUESTION], "max_tokens": 20}
    slow(model, monkeypatch, lambda number: 1 / (5 - number))
    with TestClient(create_app(Service(model, "tiny"))) as client:
        *chunks, last = streamed(client, CHAT, body)
    assert chunks and last["error"]["type"] == "server_error"
    assert last["error"]["message"].startswith("internal error") and "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    slow(model, monkeypatch, lambda number: time.sleep(1.2 * (number == 5)))
    with TestClient(create_app(Service(model, "tiny", max_seconds=1.0))) as client:
        *chunks, last = streamed(client, CHAT, body)
        assert chunks and last["error"]["code"] == "timeout"
        monkeypatch.undo()
        assert client.post(CHAT, json={"messages": [QUESTION], "max_tokens": 1}).status_code == 200


def test_chunks_come_while_the_answer_is_made(model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And texts are embedded meanwhile; the answer ends when the client leaves."""
    go_on = threading.Event()

    def wait(number: int) -> None:
        if number == 4:
            assert go_on.wait(20), "the first chunk has not come before the fifth pass"
        time.sleep(0.1 * (number > 4))  # 40 s of it

    ended = slow(model, monkeypatch, wait)
    monkeypatch.setattr(model, "chat", replace(model.chat, end_ids=()))
    body = json.dumps({"messages": [QUESTION], "max_tokens": 400, "stream": True, "temperature": 1.0}).encode()
    with running(model) as (_, port):
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asking.request("POST", CHAT, body)
        answer = asking.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: {")
        go_on.set()
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(3):
            other.request("POST", EMBEDDINGS, b'{"input": "a"}')
            found = other.getresponse()
            assert found.status == 200 and found.read()
        assert not ended.is_set(), "texts are embedded between the passes of an answer"
        began = time.monotonic()
        answer.close()
        asking.close()
        assert ended.wait(20) and time.monotonic() - began < 8
        other.close()
