"""Prompts to rewarded completions: rewards, an endpoint that behaves or not, resuming, and the way into training."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.compat import install_command
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.rollouts import Rollouts
from megatron_grit.data.rollouts.build import build_rollouts
from megatron_grit.data.rollouts.options import RolloutBuild
from megatron_grit.data.rollouts.records import PromptGroup, SampledCompletion
from megatron_grit.data.text.lines import Line
from megatron_grit.data.text.tokenizer import train_sentencepiece
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.inference.rollouts.options import RewardOptions, RolloutOptions
from megatron_grit.inference.rollouts.rewards import Rewards
from megatron_grit.inference.rollouts.run import write_rollouts_file

Answer = Callable[[str, dict[str, Any]], tuple[int, bytes]]


class Api:
    """An HTTP server that answers as it is told."""

    def __init__(self, answer: Answer) -> None:
        outer = self
        self.asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*answer(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                self._send(*answer(self.path, body))

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


MODELS = json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode()


def echo(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Says the number of the completion, with the seed as its only token."""
    if path.endswith("/models"):
        return 200, MODELS
    choices = [
        {
            "text": str(number),
            "finish_reason": "stop",
            "token_ids": [body["seed"]],
            "prompt_token_ids": [1, 2],
            "logprobs": {"token_logprobs": [-0.5 * number]},
        }
        for number in range(body["n"])
    ]
    return 200, json.dumps({"choices": choices}).encode()


@pytest.fixture
def api() -> Iterator[Callable[[Answer], Api]]:
    opened: list[Api] = []

    def start(answer: Answer) -> Api:
        opened.append(Api(answer))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def prompts_file(path: Path, count: int = 3) -> str:
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": str(i), "id": i}) + "\n" for i in range(count)))
    return str(path)


def options(tmp_path: Path, url: str, **changes: Any) -> RolloutOptions:
    values: dict[str, Any] = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "endpoint": url,
        "output": str(tmp_path / "out.jsonl"),
        "reward": ["exact"],
        "n": 4,
        "retries": 0,
        "seed": 10,
    }
    return RolloutOptions(**values | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_sampled_and_rewarded(tmp_path: Path, api: Callable[[Answer], Api]) -> None:
    prompts_file(tmp_path / "prompts.jsonl")
    server = api(echo)
    found = write_rollouts_file(options(tmp_path, server.url, reward=["exact", "0.5*regex:[2-9]"]))
    assert (found.num_prompts, found.num_completions, found.num_without_ids) == (3, 12, 0)
    written = lines(tmp_path / "out.jsonl")
    assert [line["id"] for line in written] == [0, 1, 2]
    for number, line in enumerate(written):
        assert line["prompt_token_ids"] == [1, 2] and line["answer"] == str(number)
        assert (line["temperature"], line["top_p"]) == (1.0, 1.0)
        assert [one["reward"] for one in line["completions"]] == [
            float(place == number) + 0.5 * (place >= 2) for place in range(4)
        ]
        assert [one["logprobs"] for one in line["completions"]] == [[0.0], [-0.5], [-1.0], [-1.5]]
        assert line["completions"][0]["token_ids"] == [10 + number]
    body = next(body for body in server.asked if body["prompt"] == "p1")
    asked = {"model": "tiny", "prompt": "p1", "seed": 11, "n": 4, "max_tokens": 512, "temperature": 1.0, "top_p": 1.0}
    assert body == asked | {"return_token_ids": True, "logprobs": 0}
    again = RolloutOptions(
        completions=str(tmp_path / "out.jsonl"), output=str(tmp_path / "again.jsonl"), reward=["contains"]
    )
    assert write_rollouts_file(again).reward_mean == pytest.approx(3 / 12)
    first, second = (lines(tmp_path / name) for name in ("out.jsonl", "again.jsonl"))
    for one in (*first, *second):
        for completion in one["completions"]:
            del completion["reward"], completion["rewards"]
    assert first == second


def test_a_killed_run_resumes(tmp_path: Path, api: Callable[[Answer], Api]) -> None:
    prompts_file(tmp_path / "prompts.jsonl", 8)

    def breaks(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        return (500, b'{"error": {"message": "out of memory"}}') if body.get("prompt") == "p5" else echo(path, body)

    with pytest.raises(DataError, match=r"prompts.jsonl:6: .*status 500: out of memory"):
        write_rollouts_file(options(tmp_path, api(breaks).url, concurrency=2))
    assert not (tmp_path / "out.jsonl").exists()
    server = api(echo)
    write_rollouts_file(options(tmp_path, server.url, concurrency=2))
    assert sorted(body["prompt"] for body in server.asked) == ["p5", "p6", "p7"]
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == list(range(8))


def test_an_overloaded_endpoint_is_asked_again(
    tmp_path: Path, api: Callable[[Answer], Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("megatron_grit.inference.rollouts.endpoint.time.sleep", pauses.append)
    prompts_file(tmp_path / "prompts.jsonl", 1)
    busy = iter([503, 429, 200])

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path.endswith("/models"):
            return 200, MODELS
        status = next(busy)
        return echo(path, body) if status == 200 else (status, b"busy")

    write_rollouts_file(options(tmp_path, api(answer).url, retries=2))
    assert pauses == [1.0, 2.0]


def fixed(content: Any, status: int = 200) -> Answer:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path.endswith("/models"):
            return 200, MODELS
        return status, content if isinstance(content, bytes) else json.dumps(content).encode()

    return answer


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.5}])
def test_another_temperature_is_kept_and_told(
    changes: dict[str, float], tmp_path: Path, api: Callable[[Answer], Api]
) -> None:
    """No figure of training shows it, since log-probabilities are those of temperature 1."""
    prompts_file(tmp_path / "prompts.jsonl")
    output, rewarded = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    summary = write_rollouts_file(options(tmp_path, api(fixed({"choices": [{"text": "1"}] * 4})).url, **changes))
    again = write_rollouts_file(RolloutOptions(completions=str(output), output=str(rewarded), reward=["contains"]))
    for line in lines(rewarded):
        assert {name: line[name] for name in changes} == changes
    model = train_sentencepiece(["one two three four five"] * 20, tmp_path / "tokenizer", 280)
    how = RolloutBuild(tokenizer=str(model), template="gritlm")
    for found in (summary, again, build_rollouts([rewarded], tmp_path / "rollouts", how)):
        assert found.num_tempered == found.num_completions == 12
        assert "12 completions were sampled at a temperature or top_p other than 1" in "\n".join(found.lines("x"))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda path, body: (200, b"<html>hello</html>"), "answers /models with something else than OpenAI's API"),
        (lambda path, body: (200, b'{"a": 1}'), "answers /models with something else than OpenAI's API"),
        (
            lambda path, body: (404, b"no"),
            "status 404: 'no'; --endpoint is the base of the API",
        ),
        (fixed(b"text"), "prompts.jsonl:1: .* answers /completions with something else than OpenAI's API: 'text'"),
        (fixed({"choices": []}), "something else than OpenAI's API"),
        (fixed({"choices": [{"text": "a"}]}), "gave 1 completions in place of --n 4"),
        (fixed({"choices": [{"text": "a", "token_ids": ["x"]}] * 4}), "something else than OpenAI's API"),
        (
            fixed({"choices": [{"text": "a", "token_ids": [1], "logprobs": {"token_logprobs": [-9999.0]}}] * 4}),
            "something else than OpenAI's API: logprobs: number 0 is -9999.0; no token is sampled at less than -80",
        ),
        (
            fixed({"error": {"message": "unknown field return_token_ids"}}, 400),
            "status 400: unknown field return_token",
        ),
    ],
)
def test_other_answers_are_one_line(tmp_path: Path, api: Callable[[Answer], Api], answer: Answer, says: str) -> None:
    prompts_file(tmp_path / "prompts.jsonl", 1)
    with pytest.raises(GritError, match=says) as error:
        write_rollouts_file(options(tmp_path, api(answer).url))
    assert "\n" not in str(error.value)


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    prompts_file(tmp_path / "prompts.jsonl", 1)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{one.getsockname()[1]}/v1"
    with pytest.raises(DataError, match=r"does not answer /models \(.*refused.*\); start it, or correct --endpoint"):
        write_rollouts_file(options(tmp_path, url))
    for address in (
        "localhost:8000",
        "http://localhost:99999/v1",
        "http://localhost:x/v1",
        "http://lo cal/v1",
        "http://a/ä",
    ):
        with pytest.raises(ConfigError, match="is no address"):
            write_rollouts_file(options(tmp_path, address))


def group_of(text: str, **line: Any) -> PromptGroup:
    place = Line(Path("prompts.jsonl"), 7, b"")
    return PromptGroup(line=place, prompt="p", other=line, completions=[SampledCompletion(text=text)])


@pytest.mark.parametrize(
    ("spec", "text", "right", "expected"),
    [
        ("exact", " 4\n", "4", 1),
        ("exact", "4.", "4", 0),
        ("exact", "5", ["4", 5], 1),
        ("contains", "it is 4", "4", 1),
        ("starts_with", "\n4 it is", "4", 1),
        ("starts_with", "it is 4", "4", 0),
        ("regex:^[0-9]+$", "12", None, 1),
        ("2*regex:^[0-9]+$", "12", None, 2),
        ("-1*regex:x", "box", None, -1),
        ("format:think,answer", "<think>a\nb</think>\n<answer>4</answer> ", None, 1),
        ("format:think,answer", "<think>a</think> so <answer>4</answer>", None, 0),
        ("format:answer", "<answer>4</answer><answer>5</answer>", None, 0),
        ("math-verify", r"so it is $\frac{1}{2}$", "0.5", 1),
        ("math-verify", r"\boxed{3x+x}", "4x", 1),
        ("math-verify", "so it is 0.6", "0.5", 0),
    ],
)
def test_rewards(spec: str, text: str, right: Any, expected: float) -> None:
    if spec == "math-verify":
        pytest.importorskip("math_verify")
    group = group_of(text, answer=right)
    Rewards(RewardOptions(reward=[spec])).add(group)
    assert group.completions[0].reward == expected


def test_only_the_tag_is_compared() -> None:
    for text, expected in (("<answer>3</answer> <answer> 4 </answer>", 1), ("4", 0), ("<answer>4", 0)):
        group = group_of(text, gold="4")
        Rewards(RewardOptions(reward=["exact"], answer_tag="answer", answer_key="gold")).add(group)
        assert group.completions[0].reward == expected


def test_functions_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "number = 3\n\ndef length(completion, line):\n    return len(completion) / line['most']\n\n"
        "def text(completion, line):\n    return 'good'\n\ndef fails(completion, line):\n    return line['absent']\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    group = group_of("abcd", most=8)
    Rewards(RewardOptions(reward=["python:my_rewards:length", "python:my_rewards:length"])).add(group)
    assert group.completions[0].reward == 1.0
    for name, says in (
        ("text", "prompts.jsonl:7: reward python:my_rewards:text: it must be a number, not 'good'"),
        ("fails", "prompts.jsonl:7: reward python:my_rewards:fails failed with KeyError: 'absent'"),
    ):
        with pytest.raises(DataError, match=says):
            Rewards(RewardOptions(reward=[f"python:my_rewards:{name}"])).add(group)
    for spec, says in (
        ("python:my_rewards:none", "module my_rewards has no function none"),
        ("python:my_rewards:number", "number of my_rewards is no function"),
        ("python:my_rewards", "needs a module and a function"),
        (
            "python:broken_rewards:f",
            "cannot be imported .ModuleNotFoundError: No module named 'not_there'.; PYTHONPATH",
        ),
        ("exat", r"there is no reward 'exat' \(did you mean exact\?\)"),
        ("exact:4", "takes no argument"),
        ("nan*exact", r"--reward nan\*exact: the weight nan is no finite number"),
        ("1e400*exact", "the weight 1e400 is no finite number"),
        ("-inf*exact", "the weight -inf is no finite number"),
        ("regex:[", "is no pattern of Python's re"),
        ("format", "needs tags"),
    ):
        with pytest.raises(ConfigError, match=says):
            Rewards(RewardOptions(reward=[spec]))


@pytest.mark.parametrize("right", ["", " \n", ["4", ""], True, ["4", False], []])
def test_what_every_completion_would_be_is_not_right(right: Any) -> None:
    for reward in ("exact", "contains", "starts_with"):
        with pytest.raises(DataError, match='prompts.jsonl:7: says not what is right: "answer" is '):
            Rewards(RewardOptions(reward=[reward])).add(group_of("True", answer=right))


def test_rewards_that_add_up_to_no_number() -> None:
    with pytest.raises(DataError, match="prompts.jsonl:7: the weighted sum of its rewards must be a number"):
        Rewards(RewardOptions(reward=["1e308*regex:T", "1e308*exact"])).add(group_of("T", answer="T"))


def test_what_is_right_must_be_said() -> None:
    with pytest.raises(DataError, match='prompts.jsonl:7: says not what is right: "answer" is null; give a text'):
        Rewards(RewardOptions(reward=["exact"])).add(group_of("4", gold="4"))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=rf"needs math-verify: {re.escape(install_command('rl'))}"):
        Rewards(RewardOptions(reward=["math-verify"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": []}, "--reward must be given"),
        ({"endpoint": None}, "--prompts and --endpoint go together"),
        ({"completions": "a.jsonl"}, "give --prompts, to be answered by --endpoint, or --completions"),
    ],
)
def test_options_that_contradict(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options(tmp_path, "http://127.0.0.1:1/v1", **changes)


def served(config: Any) -> Answer:
    """The endpoints of our own server."""
    from megatron_grit.inference.model import GritModel
    from megatron_grit.serving.service import Service

    service = Service(GritModel.load(config.output_dir, device="cpu"), "tiny", max_new_tokens=16)
    turn = threading.Lock()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path.endswith("/models"):
            return 200, json.dumps(service.models()).encode()
        with turn:
            work = service.chat if path.endswith("/chat/completions") else service.completions
            return 200, json.dumps(work(body)()).encode()

    return answer


@pytest.mark.engine
def test_what_our_server_samples_is_what_is_trained(
    tmp_path: Path, trained_run: Any, api: Callable[[Answer], Api]
) -> None:
    """Ids and log-probabilities go from the server through the file into training, where the policy is the sampler."""
    from megatron_grit.config.kinds import option
    from megatron_grit.config.parse import dump_config, load_config
    from megatron_grit.training.trainer import train

    asked: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "what does the parser do?"}], "answer": "The parser"},
        {"prompt": "The socket", "answer": "reads"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked * 2))
    how = options(tmp_path, api(served(trained_run)).url, n=4, max_tokens=8, reward=["python:random:random"])
    write_rollouts_file(replace(how, reward=["regex:^.*[aeiou]"]))
    sampled = lines(tmp_path / "out.jsonl")
    for line in sampled:  # an untrained model says nothing that is right
        for place, completion in enumerate(line["completions"]):
            completion["reward"] = float(place % 2)
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sampled))
    prefix = tmp_path / "rollouts"
    report = build_rollouts(
        [tmp_path / "out.jsonl"], prefix, RolloutBuild(tokenizer=trained_run.data.tokenizer, template="gritlm")
    )
    assert report.num_completions == 16 and report.has_log_probs and report.reward_mean == 0.5
    records = IndexedRecords(prefix)
    known = Rollouts(records, "mean")
    assert known.advantages_R.tolist() == [-0.5, 0.5] * 8
    length = int(records.lengths()[0])
    first = sampled[0]["completions"][0]
    np.testing.assert_allclose(
        known.behavior(0, len(sampled[0]["prompt_token_ids"]), length), first["logprobs"], rtol=1e-6
    )
    (tmp_path / "run.yaml").write_text(dump_config(trained_run))
    config = load_config(tmp_path / "run.yaml")
    config.training.objective, config.training.steps = "rollout", 2
    config.output_dir, config.checkpoint.load = str(tmp_path / "run"), trained_run.output_dir
    knobs = option(config, "rollout")
    knobs.data, knobs.batch_size = [str(prefix)], 16
    config.optimizer.lr = 1e-3
    train(config)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    again = load_config(tmp_path / "run" / "config.yaml")
    knobs = option(again, "rollout")
    knobs.behavior, knobs.kl_weight, again.output_dir = "start", 0.1, str(tmp_path / "again")
    for steps in (2, 3):  # the second time it resumes, and its weights are not those of the start any more
        again.training.steps = steps
        train(again)
    computed = lines(tmp_path / "again" / "metrics.jsonl")
    assert computed[0]["loss_rollout"] == pytest.approx(metrics[0]["loss_rollout"], abs=1e-5)
    assert computed[0]["kl_reference_rollout"] == pytest.approx(0, abs=1e-9)
    assert 0 < computed[1]["kl_reference_rollout"] < computed[2]["kl_reference_rollout"]
    assert metrics[0]["ratio_rollout"] == pytest.approx(1, abs=1e-4)
    assert metrics[0]["kl_rollout"] == pytest.approx(0, abs=1e-5) and metrics[0]["clipped_rollout"] == 0
    assert metrics[0]["reward_rollout"] == metrics[0]["reward_std_rollout"] == pytest.approx(0.5)
    assert metrics[0]["entropy_rollout"] > 1
    assert metrics[1]["kl_rollout"] > 1e-5 and metrics[1]["loss_rollout"] < metrics[0]["loss_rollout"]
