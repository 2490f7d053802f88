"""Texts for SCALE=tiny, from Python's help topics, which every machine has.

Example:
    python examples/tiny_texts.py nli FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

TOPICS = sorted(topics.items())


def write_lines(path: Path, lines: list[str]) -> None:
    """One line each."""
    path.write_text("".join(f"{line}\n" for line in lines))


def grit(folder: Path) -> None:
    """48 embedding pairs with a negative, and 48 conversations: embedding.jsonl, generative.jsonl."""
    texts = {name: text.strip()[:400] for name, text in TOPICS}
    texts = dict([(name, text) for name, text in texts.items() if len(text) == 400][:48])
    names = list(texts)
    pairs: list[dict[str, Any]] = [
        {"query": ["Find the topic", name], "pos": [["", texts[name]]], "neg": [["", texts[other]]]}
        for name, other in zip(names, names[1:] + names[:1], strict=True)
    ]
    write_lines(folder / "embedding.jsonl", [json.dumps(pair) for pair in pairs])
    chats = [{"text": [f"What is {name}?", text]} for name, text in texts.items()]
    write_lines(folder / "generative.jsonl", [json.dumps(chat) for chat in chats])


def preferences(folder: Path) -> None:
    """48 pairs of answers, the worse one of which says nothing, and 48 of these answers, rated: pairs.jsonl and
    rated.jsonl; texts.jsonl has the good ones."""
    texts = [(name, " ".join(text.split())[:120]) for name, text in TOPICS][:48]
    pairs, rated = [], []
    for number, (name, text) in enumerate(texts):
        question = {"role": "user", "content": f"What is {name}?"}
        answers = [{"role": "assistant", "content": each} for each in (text, f"It is hard to say what {name} is.")]
        pairs.append({"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]})
        rated.append({"messages": [question, answers[number % 2]], "label": number % 2 == 0})
    write_lines(folder / "pairs.jsonl", [json.dumps(pair) for pair in pairs])
    write_lines(folder / "rated.jsonl", [json.dumps(answer) for answer in rated])
    write_lines(folder / "texts.jsonl", [json.dumps({"text": [f"What is {name}?", text]}) for name, text in texts])


def nli(folder: Path) -> None:
    """A table of AllNLI's form: AllNLI.tsv."""
    sentences = [re.split(r"(?<=[.:])\s+", " ".join(text.split()))[1:4] for _, text in TOPICS]
    groups = [group for group in sentences if len(group) == 3 and all(20 < len(text) < 300 for text in group)][:40]
    rows = ["\t".join(("split", "dataset", "filename", "sentence1", "sentence2", "label"))]
    for group, other in zip(groups, groups[1:] + groups[:1], strict=True):
        for text, label in ((group[1], "entailment"), (group[2], "entailment"), (other[0], "contradiction")):
            rows.append("\t".join(("train", "help", "topics", group[0], text, label)))
    write_lines(folder / "AllNLI.tsv", rows)


def msmarco(folder: Path) -> None:
    """Queries, passages and scored negatives: queries.tsv, corpus.tsv, negatives.jsonl."""
    texts = [(name, " ".join(text.split())[:600]) for name, text in TOPICS][:48]
    write_lines(folder / "queries.tsv", [f"{number}\twhat is {name}" for number, (name, _) in enumerate(texts)])
    write_lines(folder / "corpus.tsv", [f"{number}\t{text}" for number, (_, text) in enumerate(texts)])
    negatives: list[dict[str, Any]] = []
    for number in range(len(texts)):
        mined = [{"pid": (number + step) % len(texts), "ce-score": 8.0 - 2 * step} for step in range(1, 7)]
        negatives.append({"qid": number, "pos": [{"pid": number, "ce-score": 8.0}], "neg": {"bm25": mined}})
    write_lines(folder / "negatives.jsonl", [json.dumps(line) for line in negatives])


def documents(folder: Path) -> None:
    """40 documents: corpus.jsonl."""
    write_lines(folder / "corpus.jsonl", [json.dumps({"text": text[:3000]}) for _, text in TOPICS[:40]])


def questions(folder: Path) -> None:
    """Two data sets of questions with two contexts each, NAME/NAME_QA_train.json and NAME_QA_dev.json, the blend of
    both, and their texts: texts.jsonl."""
    passages = [(name, " ".join(text.split())) for name, text in TOPICS if len(text) > 700]
    records = [
        {
            "question": f"What does the help say of {name}?",
            "answers": [" ".join(text.split()[:6])],
            "ctxs": [{"title": name, "text": text[:300]}, {"title": name, "text": text[300:700]}],
        }
        for name, text in passages
    ]
    for place, name in enumerate(("help", "topics")):
        (folder / name).mkdir(exist_ok=True)
        own = records[place::2]
        for split, chosen in (("train", own[4:28]), ("dev", own[:4])):
            (folder / name / f"{name}_QA_{split}.json").write_text(json.dumps(chosen))
    write_lines(folder / "texts.jsonl", [json.dumps({"text": text[:700]}) for _, text in passages])
    write_lines(folder / "blend.sh", ['DATA_BLEND="0.7 help 0.3 topics"'])


KINDS = {
    "grit": grit,
    "nli": nli,
    "msmarco": msmarco,
    "documents": documents,
    "questions": questions,
    "preferences": preferences,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
