"""Answers to a file of questions against answers to each of its prompts alone, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.qa.builder import build_qa
from megatron_grit.data.qa.options import PromptOptions, QaTraining
from megatron_grit.data.qa.prompts import encode_question
from megatron_grit.data.qa.records import read_records
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.evaluation.qa.generate import answer_line, generate_answers
from megatron_grit.evaluation.qa.options import QaGeneration
from megatron_grit.evaluation.qa.run import evaluate_answers
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.reading import given_neighbors
from megatron_grit.inference.results import Answer
from megatron_grit.training.trainer import train
from tests.corpus import sentences, tiny_run

QUESTIONS: list[dict[str, Any]] = [
    {
        "question": question,
        "answers": [answer],
        "ctxs": [{"title": "", "text": text} for _, text in sentences(3, number)],
    }
    for number, (question, answer) in enumerate(sentences(5, 3))
]
PROMPT = {"prompt_template": "short", "task": "nq"}


@pytest.fixture(scope="module")
def reader_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that reads, tuned for a few steps on the questions with their contexts."""
    folder = tmp_path_factory.mktemp("qa")
    config = tiny_run(folder)
    (folder / "in.json").write_text(json.dumps(QUESTIONS))
    how = QaTraining(tokenizer=str(folder / "tokenizer.model"), neighbour_len=32, **PROMPT)  # type: ignore[arg-type]
    build_qa(folder / "in.json", folder / "q", how)
    config.data.generative, config.data.neighbors = [str(folder / "q")], "contexts"
    config.training.objective, config.training.steps = "generative", 12
    config.optimizer.lr, config.training.generative_batch_size = 1e-2, 5
    config.model.retro = RetroConfig(num_neighbors=2, layers=[1], chunk_length=16, retrieved_chunks=2)
    train(config)
    return folder


def answers_of(folder: Path, name: str = "out.txt", **options: Any) -> list[str]:
    how: dict[str, Any] = {"max_new_tokens": 12, "checkpoint": str(folder / "run")} | PROMPT | options
    count = generate_answers(QaGeneration(input=str(folder / "in.json"), output=str(folder / name), **how))
    lines = (folder / name).read_text().splitlines()
    assert len(lines) == count
    return lines


def test_answers_in_order_at_any_batch_size(reader_run: Path) -> None:
    """Each is the one that the model gives to this prompt and these contexts alone."""
    model = GritModel.load(reader_run / "run", device="cpu")
    records = list(read_records(reader_run / "in.json"))
    said = answers_of(reader_run, batch_size=2)
    assert len(said) == 5 and any(said), "the model says nothing"
    how = QaGeneration(checkpoint="-", input="-", output="-", max_new_tokens=12, **PROMPT)  # type: ignore[arg-type]
    alone, unread = [], []
    for record in records:
        prompt = encode_question(model.tokenizer, record, PromptOptions(**PROMPT), 400)  # type: ignore[arg-type]
        source = given_neighbors(model.config.model, model.tokenizer, [record.contexts[1:3]])
        alone += [answer_line(each.text, jsonl=False) for each in model.continue_prompts([prompt], how, source=source)]
        unread += [answer_line(each.text, jsonl=False) for each in model.continue_prompts([prompt], how)]
    assert said == alone
    assert answers_of(reader_run, encoder_neighbours=0, batch_size=5) == unread
    assert answers_of(reader_run, start=1, num=3) == said[1:4]
    lines = answers_of(reader_run, "out.jsonl")
    assert [" ".join(json.loads(line)["pred"].split()) for line in lines] == said
    answers_of(reader_run)
    figures = evaluate_answers(reader_run / "out.txt", reader_run / "in.json")
    assert figures["num_questions"] == 5 and 0 <= figures["f1"] <= 1


def test_the_next_contexts_are_read(reader_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the prompt, unless they are asked for; of each question its own."""
    given: list[Any] = []
    monkeypatch.setattr(
        GritModel,
        "continue_prompts",
        lambda model, prompts, options, *, source: given.append(source) or [Answer("", "stop", 1, 0)] * len(prompts),
    )
    tokenizer = load_tokenizer(reader_run / "tokenizer.model")

    def read(**options: Any) -> list[list[str]]:
        given.clear()
        answers_of(reader_run, batch_size=2, **options)
        return [[tokenizer.decode(one.tokens) for one in several] for source in given for several in source.passages]

    contexts = [[tokenizer.decode(tokenizer.encode(one["text"])[:32]) for one in each["ctxs"]] for each in QUESTIONS]
    assert read() == [each[1:3] for each in contexts]
    assert read(encoder_neighbours=1, ft_neighbours=2) == [each[2:3] for each in contexts]
    assert read(reuse_top=True) == [each[:2] for each in contexts]
    answers_of(reader_run, encoder_neighbours=0)
    assert given[-1] is None


def test_a_killed_run_goes_on_with_the_answers_that_are_there(
    reader_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begins anew where they follow from another option."""
    whole, answer, asked = answers_of(reader_run, batch_size=2), GritModel.continue_prompts, []

    def ends_in_the_second_batch(model: GritModel, prompts: Any, *how: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(model, prompts, *how, **more)

    monkeypatch.setattr(GritModel, "continue_prompts", ends_in_the_second_batch)
    for again, batches in (({}, [2, 1]), ({"max_new_tokens": 3}, [2, 2, 1])):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            answers_of(reader_run, "killed.txt", batch_size=2)
        said = answers_of(reader_run, "killed.txt", batch_size=2, **again)
        assert asked[2:] == batches and not list(reader_run.glob(".*partial"))
        assert (said == whole) == (not again)
        (reader_run / "killed.txt").unlink()


def test_sampling_and_limits(reader_run: Path) -> None:
    greedy, hot = answers_of(reader_run), answers_of(reader_run, temperature=3.0)
    assert greedy != hot and hot == answers_of(reader_run, temperature=3.0)
    assert hot != answers_of(reader_run, temperature=3.0, seed=1)
    long = answers_of(reader_run, temperature=3.0, max_new_tokens=100, stop=["\0"])
    assert max(len(GritModel.load(reader_run / "run").tokenizer.encode(line)) for line in long) > 64


@pytest.mark.parametrize(
    "options, message",
    [
        (["--start", "9"], "in.json: holds no question from number 9 on; lower start"),
        (["--prompt-template", "x"], "prompt_template x is none of prompts.yaml"),
        (["--output", "in.json"], "in.json would take the place of in.json, which is read"),
        (["--checkpoint", "none"], "none: no checkpoint here"),
        (["--max-new-tokens", "500"], "in.json: item 1: its question takes"),
        (["--encoder-neighbours", "3"], "at most 2 texts (model.retro.num_neighbors)"),
        (["--retrieve-every", "4"], "retrieve_every is of retro_project, which is not given"),
    ],
)
def test_mistakes(
    reader_run: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(reader_run)
    words = ["--checkpoint", "run", "--input", "in.json", "--output", "bad.txt", "--device", "cpu", "--reuse-top"]
    assert cli.main(["generate-qa", *words, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("bad.txt").exists()


def test_lines() -> None:
    assert answer_line(" a\n b<|endoftext|> c", jsonl=False) == "a b"
    assert json.loads(answer_line(" a\n b", jsonl=True)) == {"pred": "a\n b"}
