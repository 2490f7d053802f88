"""The HTTP server: it answers what the model answers, refuses what it cannot use, and ends when asked to."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from megatron_grit.config.options import SamplingOptions, ServingLimits
from megatron_grit.inference.generation.generate import generate_tokens
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.score import score_tokens
from megatron_grit.serving import fields, server

QUESTION = {"role": "user", "content": "what does the parser do when it opens?"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "The parser opens a file."},
    {"role": "user", "content": "what does the queue do?"},
]
EMBEDDINGS, CHAT = "/v1/embeddings", "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(model: GritModel) -> Iterator[TestClient]:
    service = server.Service(model, "tiny", max_length=64, max_new_tokens=32)
    with TestClient(server.create_app(service), raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
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
    answer = client.post(EMBEDDINGS, json={"input": QUESTION["content"], "model": "tiny"}).json()
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
    monkeypatch.setattr(model, "chat", replace(model.chat, end_ids=()))
    answer = client.post(CHAT, json={"messages": [QUESTION]}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 32
    prompt = [model.tokenizer.bos_id, *model.tokenizer.encode(f"<|user|>\n{QUESTION['content']}\n<|assistant|>\n")]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    options = SamplingOptions(max_new_tokens=32)
    tokens = generate_tokens(model.model, [prompt], options, stop_ids=(), max_positions=512)[0].tokens
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
        (EMBEDDINGS, {"input": [1, "a"]}, "text 0 holds 'a'; ids of tokens are from 0 to"),
        (EMBEDDINGS, {"input": [[1, 2], [10**6]]}, "text 1 holds 1000000; ids of tokens"),
        (EMBEDDINGS, {"input": [[]]}, "text 0 is empty"),
        (EMBEDDINGS, {"input": [True]}, "text 0 holds true"),
        (EMBEDDINGS, {"input": [None]}, "text 0 must be a string"),
        (EMBEDDINGS, {"input": [{}]}, "text 0 must be a string"),
        (EMBEDDINGS, {"input": "a", "dimensions": 0}, "dimensions must be at least 1, not 0"),
        (EMBEDDINGS, {"input": "a", "dimensions": 65}, "dimensions must be at most 64"),
        (EMBEDDINGS, {"input": "a", "dimensions": "9"}, "dimensions must be int or null, at least 1, not '9'"),
        (EMBEDDINGS, {"input": "a", "side": "left"}, "side must be one of query, passage or null, not 'left'"),
        (EMBEDDINGS, {"input": "a", "truncate": "END"}, "unknown field truncate"),
        (EMBEDDINGS, {"input": "a", "instructions": "b"}, "unknown field instructions (did you mean instruction?)"),
        (EMBEDDINGS, {"input": []}, "no text to encode"),
        (EMBEDDINGS, {"input": ["a", " "]}, "text 1 is empty"),
        (EMBEDDINGS, {"input": "\ud800"}, "surrogate"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, "at most 2048"),
        (EMBEDDINGS, {"input": "a", "instruction": 1}, "instruction must be str or null, not 1"),
        (EMBEDDINGS, {"input": "a", "instruction": "long " * 99}, "fills max_length 64"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (CHAT, {}, "messages must be a list"),
        (CHAT, {"messages": "hello"}, "messages must be a list"),
        (CHAT, {"messages": ["hello"]}, "messages must be a list"),
        (CHAT, {"messages": []}, "messages must be a list of"),
        (CHAT, {"messages": [QUESTION, QUESTION]}, "message 1 is of role user where assistant was expected"),
        (CHAT, {"messages": CONVERSATION[:3]}, "last turn has to be the user's"),
        (CHAT, {"messages": [{"role": "bot", "content": "4"}]}, "role of message 0 must be one of system, developer,"),
        (CHAT, {"messages": [{"role": ["user"], "content": "4"}]}, "role of message 0 must be one of"),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, "content of message 0 must not be empty"),
        (CHAT, {"messages": [{"role": "user"}]}, "content of message 0 must be a string, not null"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text in content of message 0"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of message 0 must be a"),
        (CHAT, {"messages": [QUESTION | {"tool_calls": [{}]}]}, "message 0 holds tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 600}]}, "tokens, and the model takes 512"),
        (CHAT, {"messages": [QUESTION], "max_tokens": 33}, "max_tokens must be at least 1 and at most 32, not 33"),
        (CHAT, {"messages": [QUESTION], "max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        (CHAT, {"messages": [QUESTION], "max_tokens": 2.0}, "max_tokens must be int, at least 1, not 2.0"),
        (CHAT, {"messages": [QUESTION], "max_completion_tokens": "9"}, "max_completion_tokens must be int"),
        (CHAT, {"messages": [QUESTION], "max_completion_tokens": 9, "max_tokens": 8}, "two names of one limit"),
        (CHAT, {"messages": [QUESTION], "temperature": -1}, "temperature must be at least 0, not -1"),
        (CHAT, {"messages": [QUESTION], "temperature": float("nan")}, "NaN is no JSON"),
        (CHAT, {"messages": [QUESTION], "temperature": True}, "temperature must be float, at least 0, not true"),
        (CHAT, {"messages": [QUESTION], "top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        (CHAT, {"messages": [QUESTION], "top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        (CHAT, {"messages": [QUESTION], "seed": 2**63}, "seed must be at least 0 and at most 9223372036854775807"),
        (CHAT, {"messages": [QUESTION], "seed": 10**4000}, "not an integer of 4001 digits"),
        (CHAT, {"messages": [QUESTION], "stop": ["a"] * 5}, "stop must be at most 4 texts, not 5"),
        (CHAT, {"messages": [QUESTION], "stop": [1]}, "stop must be a list"),
        (CHAT, {"messages": [QUESTION], "stop": [""]}, "stop must not be empty"),
        (CHAT, {"messages": [QUESTION], "top_k": 0}, "top_k must be at least 1"),
        (CHAT, {"messages": [QUESTION], "min_p": 0.1}, "unknown field min_p"),
    ],
)
def test_a_body_that_cannot_be_used(client: TestClient, path: str, body: dict[str, Any], message: str) -> None:
    answer = client.post(path, content=json.dumps(body))
    assert message in error_of(answer)
    named = [*body, "messages" if path == CHAT else "input", None]
    assert answer.json()["error"]["param"] in named and answer.json()["error"]["code"] is None


# What openai's client may send to /v1/chat/completions (openai/types/chat/completion_create_params.py of 3.57), each
# with a value that asks for something which is not done.
NOT_DONE: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 2,
    "echo": True,
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 10},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni"},
    "presence_penalty": -0.5,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "store": True,
    "suffix": "and so on",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 2,
    "verbosity": "low",
    "web_search_options": {},
}


def test_what_changes_an_answer_is_done_or_refused(client: TestClient) -> None:
    assert set(NOT_DONE) == set(fields.NEUTRAL)
    for field, value in NOT_DONE.items():
        answer = client.post(CHAT, json={"messages": [QUESTION], field: value})
        assert f"{field} " in error_of(answer) and "is not supported; leave it out" in error_of(answer)
        assert answer.json()["error"]["param"] == field
    answer = client.post(CHAT, json={"messages": [QUESTION], "best_of": True})
    assert "best_of true is not supported" in error_of(answer)


def test_what_changes_nothing_is_accepted(client: TestClient) -> None:
    body = {"messages": [QUESTION], "max_tokens": 4}
    expected = client.post(CHAT, json=body).json()["choices"]
    neutral = {field: values[0] for field, values in fields.NEUTRAL.items() if values}
    for more in (neutral, dict.fromkeys(NOT_DONE), {field: "any" for field in fields.HARMLESS}):
        assert client.post(CHAT, json=body | more).json()["choices"] == expected
    with_name = {"messages": [QUESTION | {"name": "Ann", "refusal": None, "tool_calls": []}], "max_tokens": 4}
    assert client.post(CHAT, json=with_name).json()["choices"] == expected


def test_several_answers_with_their_tokens(client: TestClient, model: GritModel) -> None:
    """Both endpoints sample the same from the same prompt, and log-probabilities are those of a forward pass."""
    asked = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 6, "return_token_ids": True}
    chat = client.post(CHAT, json=asked | {"messages": [QUESTION], "logprobs": True}).json()
    prompt = chat["prompt_token_ids"]
    text = client.post("/v1/completions", json=asked | {"prompt": prompt, "logprobs": 0}).json()
    assert [one["token_ids"] for one in chat["choices"]] == [one["token_ids"] for one in text["choices"]]
    assert len({tuple(one["token_ids"]) for one in text["choices"]}) > 1
    assert text["usage"] == chat["usage"] and chat["usage"]["prompt_tokens"] == len(prompt)
    for ours, theirs in zip(chat["choices"], text["choices"], strict=True):
        assert ours["message"]["content"] == theirs["text"] and theirs["prompt_token_ids"] == prompt
        ids, found = theirs["token_ids"], theirs["logprobs"]["token_logprobs"]
        assert [entry["logprob"] for entry in ours["logprobs"]["content"]] == found
        tokens = np.array([*prompt, *ids])
        supervised = np.arange(len(tokens)) >= len(prompt)
        (loss,), (count,) = score_tokens(
            model.chunks, [(tokens, supervised)], group=model.model_group, batch_tokens=512
        )
        assert count == len(ids) and sum(found) == pytest.approx(-loss, abs=1e-4)


def test_a_text_is_continued_without_a_template(client: TestClient, model: GritModel) -> None:
    answer = client.post("/v1/completions", json={"prompt": ["The parser", "a"], "return_token_ids": True}).json()
    assert [one["logprobs"] for one in answer["choices"]] == [None, None]
    first = answer["choices"][0]["prompt_token_ids"]
    assert first[0] == model.tokenizer.bos_id and model.tokenizer.decode(first) == "The parser"
    for wrong, why in (
        ({"prompt": "a", "n": 0}, "n must be at least 1 and at most 128, not 0"),
        ({"prompt": ["a"] * 65, "n": 2}, "ask for 130 answers; ask for at most 128"),
        ({"prompt": "a", "logprobs": 5}, "logprobs must be 0, not 5"),
        ({"prompt": "a", "return_token_ids": "yes"}, "return_token_ids must be true or false"),
        ({"prompt": ""}, "is empty"),
        ({}, "prompt must be a string"),
    ):
        assert why in error_of(client.post("/v1/completions", json=wrong))


def test_another_model_is_not_found(client: TestClient) -> None:
    for path, body in ((CHAT, {"messages": [QUESTION]}), (EMBEDDINGS, {"input": "a"})):
        answer = client.post(path, json=body | {"model": "gpt-4"})
        assert "there is no model 'gpt-4' here, but 'tiny'" in error_of(answer, 404)
        assert answer.json()["error"]["param"] == "model" and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("instruction", ["Answer the question", None])
def test_ids_of_tokens_are_the_text(client: TestClient, model: GritModel, instruction: str | None) -> None:
    texts = ["The parser opens a file.", "a queue"]
    ids = [tail for _, tail in model.embedding_tokens(texts, instruction)]
    expected = client.post(EMBEDDINGS, json={"input": texts, "instruction": instruction}).json()
    assert client.post(EMBEDDINGS, json={"input": ids, "instruction": instruction}).json() == expected
    (one,) = client.post(EMBEDDINGS, json={"input": ids[1], "instruction": instruction}).json()["data"]
    np.testing.assert_allclose(one["embedding"], model.encode(texts[1], instruction), atol=1e-6)


def test_dimensions(client: TestClient, model: GritModel) -> None:
    whole = model.encode(["a file", "a queue"])
    answer = client.post(EMBEDDINGS, json={"input": ["a file", "a queue"], "dimensions": 16}).json()
    cut = np.array([entry["embedding"] for entry in answer["data"]])
    torch_cut = torch.nn.functional.normalize(torch.from_numpy(whole[:, :16]), dim=-1).numpy()
    np.testing.assert_allclose(cut, torch_cut, atol=1e-7)
    np.testing.assert_array_equal(cut.astype(np.float32), model.encode(["a file", "a queue"], dimensions=16))
    packed = client.post(EMBEDDINGS, json={"input": "a file", "dimensions": 64, "encoding_format": "base64"}).json()
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4"), whole[0], atol=1e-6
    )


def test_text_parts_and_the_developer(client: TestClient, model: GritModel) -> None:
    parts = [{"type": "text", "text": "what does the"}, {"type": "text", "text": "queue do?"}]
    given = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what does the\nqueue do?"}]
    answer = client.post(CHAT, json={"messages": given, "max_tokens": 6}).json()
    assert answer["choices"][0]["message"]["content"] == model.generate(plain, max_new_tokens=6)
    assert answer["choices"][0]["message"]["content"] == model.generate(given, max_new_tokens=6)


def test_stop_texts(client: TestClient, model: GritModel) -> None:
    """An answer ends before the first of them, and no token is made after it."""
    options = {"temperature": 2.0, "seed": 3}
    body = {"messages": [QUESTION], "max_tokens": 30, **options}
    whole = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    for stop in (whole[9:14], [whole[20:22], whole[9:14], "never there"]):
        expected = whole[: min(whole.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in whole)]
        answer = client.post(CHAT, json=body | {"stop": stop}).json()
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == expected and choice["finish_reason"] == "stop"
        assert 0 < answer["usage"]["completion_tokens"] < 30
        assert model.generate([QUESTION], max_new_tokens=30, stop=stop, **options) == expected
    answer = client.post(CHAT, json=body | {"stop": "never there"}).json()
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"[" * 200_000, b'{"input": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object(client: TestClient, content: bytes) -> None:
    assert error_of(client.post(EMBEDDINGS, content=content)).startswith("the body ")


def test_other_refusals(client: TestClient) -> None:
    over = json.dumps({"input": "a", "filler": "x" * ServingLimits.max_body_bytes})
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
    assert usage["completion_tokens"] > 1 and answer["choices"][0]["finish_reason"] == "length"
    again = client.post(CHAT, json=body | {"max_tokens": 32}).json()
    assert again["choices"] == answer["choices"] and again["usage"] == usage
    (text,) = [choice["message"]["content"] for choice in answer["choices"]]
    assert model.generate(body["messages"], max_new_tokens=10**9) == text


def test_an_error_of_ours_is_500(client: TestClient, model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "embed_tokens", lambda *args, **options: 1 / 0)
    assert "internal error" in error_of(client.post(EMBEDDINGS, json={"input": "a"}), 500)
    monkeypatch.undo()
    assert client.post(EMBEDDINGS, json={"input": "a"}).status_code == 200


def test_requests_wait_in_turn_and_health_does_not(
    client: TestClient, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, entered, go_on, inside, most = model.embed_tokens, threading.Semaphore(0), threading.Event(), [0], [0]

    def slow(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        entered.release()
        assert go_on.wait(20), "nobody else was answered meanwhile"
        result = embed(*args, **options)
        inside[0] -= 1
        return result

    monkeypatch.setattr(model, "embed_tokens", slow)
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(client.post, EMBEDDINGS, json={"input": text}) for text in ("a", "b")]
        assert entered.acquire(timeout=20)
        assert pool.submit(client.get, "/health").result(timeout=10).status_code == 200
        assert "input must be" in error_of(pool.submit(client.post, EMBEDDINGS, json={}).result(timeout=10))
        assert not entered.acquire(timeout=0.5), "two requests were computed at once"
        go_on.set()
        answers = [request.result(timeout=20).json()["data"][0]["embedding"] for request in requests]
    assert most == [1]
    monkeypatch.undo()
    for text, answer in zip(("a", "b"), answers, strict=True):
        np.testing.assert_array_equal(np.float32(answer), model.encode(text))


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_is_computed_for_a_client_that_left(
    whole: bool, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves while it waits for its turn, or in the middle of its body."""
    computed: list[Any] = []
    monkeypatch.setattr(model, "embed_tokens", lambda *args, **options: computed.append(args))
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
