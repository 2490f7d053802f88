"""All doors against each other: a command, GritModel and the server give a request one answer or one refusal."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from megatron_grit.cli import main as cli
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.model import GritModel
from megatron_grit.serving import server

BUDGET = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
Result = tuple[str, Any]
"""("done", what came out) or ("refused", the reason)."""

UNGIVEN = object()
"""A field that is left out."""
NO_UNICODE = "no valid Unicode"
SAME = {
    r".*half of a surrogate pair.*": NO_UNICODE,
    r".*not UTF-8: byte .*": NO_UNICODE,
    r".*(NaN|Infinity) is no JSON.*": "no finite number",
    r".*not (-?(nan|inf)|an integer of 401 digits)$": "no finite number",
    r".*(holds no text; give one text a line|there is no text to encode)": "no text",
    r"(input|texts) must be a string": "texts must be a string",
}
"""Doors name one mistake by where it stands, a line of a file or a field of JSON."""


def reason(text: str) -> str:
    """A refusal without what is a door's own: its name, and how it spells an option."""
    text = re.sub(r"^megatron-grit \w+: error: |\n$", "", text)
    text = re.sub(r"--[a-z-]+", lambda found: found[0][2:].replace("-", "_"), text)
    text = re.sub(r"^\S+in\.txt:(\d+): ", lambda found: f"text {int(found[1]) - 1} ", text)
    text = re.sub(r"^the content of message \d+|^content of message \d+", "prompt", text)
    text = re.sub(r"\.0$", "", text.replace("max_tokens", "max_new_tokens").replace("'", ""))
    for pattern, meaning in SAME.items():
        if re.fullmatch(pattern, text) or (pattern[0] == "(" and re.match(pattern, text)):
            return re.sub(pattern, meaning, text)
    return text


def refused(step: Callable[[], Any]) -> Result:
    try:
        return "done", step()
    except (DataError, ConfigError) as error:
        assert "\n" not in str(error)
        return "refused", reason(str(error))


class Doors:
    """The three of them, to one loaded model."""

    def __init__(self, model: GritModel, folder: Path) -> None:
        self.model, self.folder = model, folder

    def command(self, *argv: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(GritModel, "load", lambda *_, **__: self.model),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = cli.main([*argv, f"--checkpoint={self.folder}"])
        if status:
            assert status == 2 and err.getvalue().count("\n") == 1, err.getvalue()
            return "refused", reason(err.getvalue())
        return "done", out.getvalue()

    def generate(self, messages: Any, options: dict[str, Any]) -> Result:
        given = {name: value for name, value in options.items() if value is not UNGIVEN}
        # A list of one message is one conversation, so what is no list goes in as it is.
        several = messages if isinstance(messages, dict) else [messages]
        return refused(lambda: self.model.generate(several, **given)[0])

    def generate_command(self, messages: Any, options: dict[str, Any]) -> Result:
        argv = [f"--{message['role'].replace('user', 'prompt')}={message['content']}" for message in messages]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            if name == "stop" and isinstance(value, list):
                argv += [f"{flag}{'+' * (number > 0)}={text}" for number, text in enumerate(value)]
            elif value is not UNGIVEN:
                argv.append(f"{flag}={value}")
        kind, told = self.command("generate", *argv)
        return kind, told[:-1] if kind == "done" else told

    def post(self, path: str, body: dict[str, Any], **limits: Any) -> Any:
        service = server.Service(self.model, "tiny", **limits)
        client = TestClient(server.create_app(service), raise_server_exceptions=False)
        body = {name: value for name, value in body.items() if value is not UNGIVEN}
        answer = client.post(path, content=json.dumps(body))
        assert answer.status_code in (200, 400), answer.text
        return answer.json()

    def chat(self, messages: Any, options: dict[str, Any]) -> Result:
        body = {"messages": messages, **options}
        body["max_tokens"] = body.pop("max_new_tokens", UNGIVEN)
        answer = self.post("/v1/chat/completions", body, max_new_tokens=2**63 - 1)
        if "error" in answer:
            return "refused", reason(answer["error"]["message"])
        return "done", answer["choices"][0]["message"]["content"]

    def encode(self, texts: Any, options: dict[str, Any]) -> Result:
        given = {name: value for name, value in options.items() if value is not UNGIVEN}
        return refused(lambda: np.atleast_2d(self.model.encode(texts, **given)))

    def encode_command(self, texts: list[str], options: dict[str, Any]) -> Result:
        path, output = self.folder / "in.txt", self.folder / "out.npy"
        # The mark and the ends are those of the file, whatever texts begin or end with.
        lines = "".join(f"{text}\r\n" for text in texts).encode("utf-8", "surrogatepass")
        path.write_bytes(codecs.BOM_UTF8 + lines)
        argv = [
            f"--{name.replace('_', '-')}={'null' if value is None else value}"
            for name, value in options.items()
            if value is not UNGIVEN
        ]
        result = self.command("encode", f"--input={path}", f"--output={output}", *argv)
        return ("done", np.load(output)) if result[0] == "done" else result

    def embeddings(self, texts: Any, options: dict[str, Any]) -> Result:
        body = {"input": texts, **options}
        limits = {"max_length": body.pop("max_length")} if "max_length" in body else {}
        limits = {name: value for name, value in limits.items() if value is not UNGIVEN}
        try:
            answer = self.post("/v1/embeddings", body, **limits)
        except ConfigError as error:  # of an option of the server
            return "refused", reason(str(error))
        if "error" in answer:
            return "refused", reason(answer["error"]["message"])
        return "done", np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)


@pytest.fixture(scope="module")
def doors(trained_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    folder = tmp_path_factory.mktemp("doors")
    (folder / "manifest.json").write_text("{}")
    (folder / "state.json").write_text("{}")  # which makes it a checkpoint
    yield Doors(GritModel.load(trained_run.output_dir, device="cpu"), folder)


PLAIN = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
ODD_TEXTS = [
    "",
    "  \t",
    "\0",
    "a\0b",
    "null",
    "~",
    "\ud800",
    "a\udcff",
    "\u2028",
    "\ufeffa",
    "a\r",
    "--seed=3",
    "-1",
    "[a]",
]
ODD = [None, True, 5, 1.5, [], ["a"], {}, {"text": "a"}]
INTEGERS = [0, -1, -(10**19), 2**63, 10**20, 10**4000, 2.0, 1.5, math.nan, math.inf, -math.inf, "x", "", True, [], {}]
NUMBERS = [-1, -1e-9, math.nan, math.inf, -math.inf, 10**400, "warm", "", True, [1.0], {}]
FINE: dict[str, Any] = {
    "max_new_tokens": st.integers(1, 5),
    "temperature": st.sampled_from([0, 0.0, -0.0, 1, 0.7, 1e-320, 1e-30, 1e308, 10**20, 10**300]),
    "top_p": st.sampled_from([1, 1.0, 0.5, 1e-300]),
    "top_k": st.sampled_from([1, 2, 10**6]),
    "repetition_penalty": st.sampled_from([1, 1.0, 1.2, 1e-300, 1e308]),
    "seed": st.sampled_from([0, 3, 2**32, 2**63 - 1]),
    "stop": st.lists(PLAIN | st.sampled_from(["e", "a", "null", "~", "\0"]), max_size=4),
}
BAD: dict[str, list[Any]] = {
    "max_new_tokens": INTEGERS,
    "temperature": NUMBERS,
    "top_p": [0, 0.0, 1.0000001, 2, *NUMBERS],
    "top_k": [value for value in INTEGERS if value != []],
    "repetition_penalty": [0, 0.0, *NUMBERS],
    "seed": [value for value in INTEGERS if value != 0],
    "stop": [[""], ["a"] * 5, ["\ud800"], [5], [None], {}, 5, [["a"]]],
}
ROLES = st.sampled_from(["user", "system", "assistant", "developer", "tool", "", None, 5, ["user"], "User"])


@st.composite
def requests(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """A conversation, which may be odd in one place, and options of an answer."""
    options = {name: draw(st.just(UNGIVEN) | fine) for name, fine in FINE.items() if name != "max_new_tokens"}
    options["max_new_tokens"] = draw(FINE["max_new_tokens"])
    return draw(conversations(draw(st.booleans()))), options


@st.composite
def conversations(draw: st.DrawFn, is_odd: bool) -> Any:
    turns = draw(st.integers(0, 2))
    messages: list[Any] = [{"role": "system", "content": draw(PLAIN)}] * draw(st.integers(0, 1))
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(PLAIN)}, {"role": "assistant", "content": draw(PLAIN)}]
    messages.append({"role": "user", "content": draw(PLAIN)})
    odd = draw(st.sampled_from(["content", "role", "key", "message", "all", "end"])) if is_odd else ""
    place = draw(st.integers(0, len(messages) - 1))
    if odd == "content":
        messages[place] = messages[place] | {"content": draw(st.sampled_from(ODD_TEXTS + ODD))}
    elif odd == "role":
        messages[place] = messages[place] | {"role": draw(ROLES)}
    elif odd == "key":
        messages[place] = messages[place] | draw(
            st.sampled_from([{"name": "a"}, {"tool_calls": [1]}, {"images": None}])
        )
    elif odd == "message":
        messages[place] = draw(st.sampled_from([None, "a", 5, {}, {"role": "user"}, {"content": "a"}]))
    elif odd == "all":
        return draw(st.sampled_from([[], None, 5, {}, messages * 2, messages[0]]))
    elif odd == "end":
        messages.pop()
    return messages


def is_word(value: Any) -> bool:
    """Whether a command line can say it, and nothing else by it."""
    return not isinstance(value, bool | dict | tuple | type(None)) and value not in ("null", "~")


def can_be_a_command(messages: Any, options: dict[str, Any]) -> bool:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    stop = options["stop"]
    return (
        [message.get("role") for message in messages] in (["user"], ["system", "user"])
        and all(message.keys() == {"role", "content"} for message in messages)
        and all(isinstance(message["content"], str) for message in messages)
        and not (len(messages) == 2 and messages[0]["content"] in ("null", "~"))
        and all(is_word(value) and (name == "stop" or not isinstance(value, list)) for name, value in options.items())
        and (stop is UNGIVEN or (isinstance(stop, list) and all(isinstance(text, str) for text in stop)))
    )


@BUDGET
@given(requests())
@example(([{"role": "user", "content": "a"}], {"max_new_tokens": 3, "stop": ["null"]}))
@example(([{"role": "system", "content": ""}, {"role": "user", "content": "a"}], {"max_new_tokens": 3, "stop": []}))
def test_one_answer(doors: Doors, request_: tuple[Any, dict[str, Any]]) -> None:
    is_one_answer(doors, *request_)


def is_one_answer(doors: Doors, messages: Any, options: dict[str, Any]) -> str:
    expected = doors.generate(messages, options)
    assert doors.chat(messages, options) == expected
    if can_be_a_command(messages, options):
        assert doors.generate_command(messages, options) == expected
    return expected[0]


@pytest.mark.parametrize("name", BAD)
def test_one_refusal_of_an_option(doors: Doors, name: str) -> None:
    for value in BAD[name]:
        options = {"max_new_tokens": 1, "stop": UNGIVEN, name: value}
        assert is_one_answer(doors, [{"role": "user", "content": "a"}], options) == "refused", value


FINE_EMBEDDING: dict[str, Any] = {
    "instruction": st.none() | PLAIN | st.sampled_from(["", "\0", " "]),
    "dimensions": st.sampled_from([1, 7, 64]),
    "max_length": st.sampled_from([8, 512, 2**63 - 1]),
}
BAD_EMBEDDING: dict[str, list[Any]] = {
    "instruction": ["\ud800", "long " * 999, 5, True, ["a"]],
    "dimensions": [65, *INTEGERS],
    "max_length": [1, *INTEGERS],
}
TEXTS = PLAIN | st.sampled_from(["word " * 3000, "a\0b", "\ufeffa", "a\r", "\u2028a", "null"])


@st.composite
def embedding_requests(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """Texts, which may be odd in one place, and options."""
    texts: Any = draw(st.lists(TEXTS, min_size=1, max_size=4))
    options = {name: draw(st.just(UNGIVEN) | fine) for name, fine in FINE_EMBEDDING.items()}
    odd = draw(st.sampled_from(["", "text", "texts", "ids"]))
    if odd == "text":
        texts[draw(st.integers(0, len(texts) - 1))] = draw(st.sampled_from(ODD_TEXTS + ODD))
    elif odd == "texts":
        texts = draw(st.sampled_from([[], "", "a", " ", "\ud800", None, 5, {}, {"a": 1}]))
    elif odd == "ids":
        texts = draw(
            st.sampled_from([[5, 6], [[5, 6], [7]], [5, -1], [5, 400], [[]], [True], [5, "a"], ["a", 5], [[5.0]]])
        )
    return texts, options


def are_lines(texts: Any, options: dict[str, Any]) -> bool:
    are_texts = isinstance(texts, list) and all(isinstance(text, str) and "\n" not in text for text in texts)
    instruction = options.get("instruction", UNGIVEN)
    words = all(is_word(value) for name, value in options.items() if name != "instruction")
    words &= instruction is UNGIVEN or instruction is None or (isinstance(instruction, str) and is_word(instruction))
    return are_texts and words and not any(isinstance(value, list) for value in options.values())


@BUDGET
@given(embedding_requests())
def test_one_embedding(doors: Doors, request_: tuple[Any, dict[str, Any]]) -> None:
    is_one_embedding(doors, *request_)


def is_one_embedding(doors: Doors, texts: Any, options: dict[str, Any]) -> str:
    results = [doors.encode(texts, options), doors.embeddings(texts, options)]
    if are_lines(texts, options):
        results.append(doors.encode_command(texts, options))
    (kind, expected), *others = results
    for other_kind, other in others:
        assert other_kind == kind, (expected, other)
        if kind == "done":
            np.testing.assert_array_equal(other, expected)
        else:
            assert other == expected
    return kind


@pytest.mark.parametrize("name", BAD_EMBEDDING)
def test_one_refusal_of_an_option_of_embeddings(doors: Doors, name: str) -> None:
    for value in BAD_EMBEDDING[name]:
        assert is_one_embedding(doors, ["a"], {name: value}) == "refused", value
