"""Write what examples/quickstart_retro.sh trains on: documents, pairs to embed, and question records.

Passages with several questions each: those of xquad_en_part1.json (--data), or docstrings of Python's standard library
as examples/pydoc_corpus.py writes them (--pydoc), of which is asked what they describe, which parameters it takes and
which module has it. A document is a passage with one of its questions, so a passage stands in as many documents as it
has questions; other documents are paragraphs of wikitext2_valid.txt, or help topics, which stand nowhere else. Each
tenth document is held out, with its question. Written are

    documents.jsonl, heldout.jsonl   {"text"}
    pairs.jsonl                      {"query", "pos"}: question and passage
    squad/squad_QA_train.json        records of InstructRetro's form: question, answers, ctxs
    squad/squad_QA_dev.json          the same of the held-out questions

Example:
    python examples/retro_texts.py --data ../shared/data --output-dir corpus
    python examples/retro_texts.py --pydoc pydoc --output-dir corpus
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.data.text.lines import filled_lines, parse_json
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.files import replacing

QUERY_INSTRUCTION = "Find the passage"
HELD_OUT_EVERY = 10
NUM_PASSAGES = 400
_NUM_DOCSTRINGS = 260
_OTHER_WORDS = (50, 250)
_DOCSTRING_WORDS = (60, 200)
_MAX_ANSWER_WORDS = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its passage."""

    title: str
    passage: str
    question: str
    answer: str

    def document(self) -> str:
        """Text of the document that it makes."""
        return f"{self.passage}\nQuestion: {self.question}\nAnswer: {self.answer}"

    def pair(self) -> dict[str, Any]:
        """Record to embed."""
        return {"query": [QUERY_INSTRUCTION, self.question], "pos": [["", self.passage]]}

    def record(self) -> dict[str, Any]:
        """Record of InstructRetro's form."""
        contexts = [{"title": self.title, "text": self.passage}]
        return {"question": self.question, "answers": [self.answer], "ctxs": contexts}


def read_xquad(path: Path) -> Iterator[Question]:
    """Questions of a file of SQuAD's form.

    Raises:
        DataError: it cannot be read, or is of another form.
    """
    try:
        for article in parse_json(path.read_bytes())["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    yield Question(
                        title=article["title"],
                        passage=paragraph["context"],
                        question=asked["question"],
                        answer=asked["answers"][0]["text"],
                    )
    except (OSError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"is no file of SQuAD's form ({error!r})", path=path) from None


def ask_docstrings(path: Path) -> Iterator[Question]:
    """Questions of the pairs of pydoc_corpus.py; the docstrings are spread over the file.

    Raises:
        DataError: it cannot be read.
    """
    pairs = [line.value() for line in filled_lines(path)]
    found = [(pair["query"][1], pair["pos"][0][1]) for pair in pairs]
    low, high = _DOCSTRING_WORDS
    found = [(signature, text) for signature, text in found if low <= len(text.split()) <= high]
    for signature, text in found[:: max(1, len(found) // _NUM_DOCSTRINGS)][:_NUM_DOCSTRINGS]:
        name, _, parameters = signature.partition("(")
        passage = f"{signature}: {text}"
        answers = {
            f"What does {name} do?": " ".join(re.split(r"(?<=[.:])\s", text)[0].split()[:_MAX_ANSWER_WORDS]),
            f"Which module has {name.rsplit('.', 1)[-1]}?": name.split(".")[0],
            f"Which parameters does {name} take?": " ".join(parameters.rstrip(")").split()[:_MAX_ANSWER_WORDS]),
        }
        for question, answer in answers.items():
            if answer:
                yield Question(title=name, passage=passage, question=question, answer=answer)


def of_first_passages(questions: Iterable[Question], num_passages: int) -> list[Question]:
    """Questions of the first so many passages."""
    passages: dict[str, list[Question]] = {}
    for question in questions:
        passages.setdefault(question.passage, []).append(question)
    return [question for asked in list(passages.values())[:num_passages] for question in asked]


def other_texts(texts: Iterable[str], num_texts: int) -> list[str]:
    """The first texts of a middle length."""
    low, high = _OTHER_WORDS
    return [text for text in map(str.strip, texts) if low <= len(text.split()) <= high][:num_texts]


def split(items: list[Any]) -> tuple[list[Any], list[Any]]:
    """What is trained on, and what is held out."""
    kept = [item for number, item in enumerate(items) if number % HELD_OUT_EVERY]
    return kept, items[::HELD_OUT_EVERY]


@dataclass(kw_only=True)
class TextOptions:
    """Where texts come from and go."""

    data: Path | None = knob(None)
    """Folder with xquad_en_part1.json and wikitext2_valid.txt."""
    pydoc: Path | None = knob(None)
    """Folder of examples/pydoc_corpus.py."""
    num_passages: int = knob(NUM_PASSAGES, at_least=1)
    """Most passages, and most other texts."""
    output_dir: Path = knob()
    """Folder for the files."""


def run(options: TextOptions) -> None:
    """Write the files and print how many records each has."""
    if (options.data is None) == (options.pydoc is None):
        raise ConfigError("give one of --data and --pydoc")
    if options.data is not None:
        questions = read_xquad(options.data / "xquad_en_part1.json")
        path = options.data / "wikitext2_valid.txt"
        try:
            others = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot be read: {error}", path=path) from None
    else:
        assert options.pydoc is not None
        questions = ask_docstrings(options.pydoc / "train_embedding.jsonl")
        records = (line.value()["text"] for line in filled_lines(options.pydoc / "train_generative.jsonl"))
        others = [text for text in records if isinstance(text, str)]
    asked, held_out = split(of_first_passages(questions, options.num_passages))
    texts, held_out_texts = split(other_texts(others, options.num_passages))
    (options.output_dir / "squad").mkdir(parents=True, exist_ok=True)
    lines = {
        "documents": [{"text": text} for text in [*(question.document() for question in asked), *texts]],
        "heldout": [{"text": text} for text in [*(question.document() for question in held_out), *held_out_texts]],
        "pairs": [question.pair() for question in asked],
    }
    for name, found in lines.items():
        with replacing(options.output_dir / f"{name}.jsonl") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
        print(f"{name:20s} {len(found):6d}")
    for name, of in {"squad_QA_train": asked, "squad_QA_dev": held_out}.items():
        with replacing(options.output_dir / "squad" / f"{name}.json") as file:
            json.dump([question.record() for question in of], file, ensure_ascii=False, indent=1)
        print(f"{name:20s} {len(of):6d}")


if __name__ == "__main__":
    sys.exit(command(TextOptions, run, None, prog="retro_texts", about=__doc__))
