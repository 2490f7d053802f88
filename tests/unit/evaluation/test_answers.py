"""The last answers of conversations, with a model whose answers are known; BLEU against its definition."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.compat import install_command
from megatron_grit.inference.model import GritModel

COMMAND = "evaluate answers --checkpoint run --input chats.jsonl --output answers.jsonl".split()
ANSWERS = ["the cat sat on the mat today", "a b c d e f"]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a model is asked that always answers alike."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"format_version": 1, "step": 7, "world_size": 1}))
    asked: list[Any] = []

    class KnownAnswers:
        config = SimpleNamespace(training=SimpleNamespace(precision="fp32"))
        model = SimpleNamespace(context=SimpleNamespace(device=SimpleNamespace(type="cpu")))

        def answer(self, conversations: list[Any], options: Any, *, tools: Any) -> list[Any]:
            if len(asked) == options.seed - 1:  # in tests of kills
                raise KeyboardInterrupt
            asked.append((conversations, tools, options.temperature))
            return [SimpleNamespace(text=" the cat sat on the mat\n") for _ in conversations]

    monkeypatch.setattr(GritModel, "load", lambda path, device: KnownAnswers())
    return asked


def write(*records: dict[str, Any]) -> None:
    Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def chat(answer: str, **more: Any) -> dict[str, Any]:
    turns = [("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def defined_bleu(given: list[str], right: list[str]) -> float:
    """Papineni et al., 2002: the geometric mean of clipped n-gram precisions, with the brevity penalty; texts of words
    alone. A precision without a match counts as sacrebleu smooths it (exp)."""
    logs, halved = 0.0, 1.0
    for n in range(1, 5):
        matches = total = 0
        for one, other in zip(given, right, strict=True):
            grams = [
                Counter(tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1))
                for text in (one, other)
            ]
            matches, total = matches + (grams[0] & grams[1]).total(), total + grams[0].total()
        halved *= 1 if matches else 2
        logs += math.log(matches / total if matches else 1 / (halved * total)) / 4
    lengths = [sum(len(text.split()) for text in texts) for texts in (given, right)]
    return 100 * math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


def test_last_answers_are_asked_for_and_compared(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    tools = [{"name": "clock"}]
    write(chat(ANSWERS[0]), chat(ANSWERS[1]), chat("the cat sat on the mat", tools=tools))
    assert cli.main(COMMAND) == 0
    (first, _, temperature), (last, given_tools, _) = calls
    assert [len(first), len(last)] == [2, 1] and temperature == 0 and given_tools == tools  # one call, one set of tools
    assert [message.content for message in first[0]] == ["be brief", "one?", "1", "two?"]
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3]
    assert lines[1] == {"line": 2, "pred": " the cat sat on the mat\n", "answer": ANSWERS[1]}
    expected = defined_bleu(["the cat sat on the mat"] * 3, [*ANSWERS, "the cat sat on the mat"])
    out = capsys.readouterr().out
    assert "3 answers, 1 of them equal" in out and f"BLEU-4 {expected:.2f} (" in out
    assert cli.main(["evaluate", "qa", "answers.jsonl", "answers.jsonl"]) == 0  # the file is both of its files


def test_max_records(calls: list[Any]) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    write(*[chat(answer) for answer in ANSWERS])
    assert cli.main([*COMMAND, "--max-records", "1", "--at-once", "5"]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) == 1


def test_a_stopped_run_goes_on_with_what_is_there(calls: list[Any]) -> None:
    """Of the same questions and options; of others it begins anew."""
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    write(*[chat(f"{answer} {number}") for number, answer in enumerate(ANSWERS * 2)])
    command = [*COMMAND, "--at-once", "1", "--seed", "3"]
    assert cli.main(command) == 130 and len(calls) == 2
    assert not Path("answers.jsonl").exists()
    calls.append("what stopped it is gone")
    assert cli.main(command) == 0 and len(calls) == 3 + 2
    assert [json.loads(line)["line"] for line in Path("answers.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not list(Path().glob(".*partial"))
    calls.clear()
    assert cli.main(command) == 130
    write(*[chat(answer) for answer in ANSWERS])
    calls.append("what stopped it is gone")
    assert cli.main(command) == 0 and len(calls) == 3 + 2  # neither of the two that are there


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "chats.jsonl:2: is no conversation; give messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chats.jsonl:2: "),
    ],
)
def test_a_line_that_cannot_be_asked_is_found_before_the_model(
    calls: list[Any], capsys: pytest.CaptureFixture[str], record: dict[str, Any], message: str
) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    write(chat("x"), record)
    assert cli.main(COMMAND) == 2
    assert message in capsys.readouterr().err
    assert not calls and not Path("answers.jsonl").exists()


def test_without_the_package(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    write(chat("x"))
    assert cli.main(COMMAND) == 2
    assert install_command("eval") in capsys.readouterr().err
