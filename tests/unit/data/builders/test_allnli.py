"""AllNLI to records: pairs in both directions, and tables that are not what they should be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.builders.sources.allnli import convert_allnli
from megatron_grit.errors import DataError
from tests.corpus import sentences

HEADER = "split\tdataset\tfilename\tsentence1\tsentence2\tlabel\n"


def row(first: str, second: str, label: str, split: str = "train") -> str:
    return f"{split}\tSNLI\tx.txt\t{first}\t{second}\t{label}\n"


def convert(directory: Path, text: str, name: str = "nli.tsv") -> list[dict[str, object]]:
    path = directory / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    count = convert_allnli(path, directory / "out.jsonl")
    records = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    assert len(records) == count
    return records


@pytest.mark.parametrize("name", ["nli.tsv", "nli.tsv.gz"])
def test_both_directions(name: str, tmp_path: Path) -> None:
    text = HEADER + row("a dog runs", " an animal moves ", "entailment") + row("a dog runs", "a dog", "entailment")
    text += row("a dog runs", "a cat sleeps", "contradiction") + row("a dog runs", "a dog barks", "neutral")
    text += row("a dog runs", "nothing here", "contradiction", "dev")
    text += row('"quoted" text', "a dog runs", "contradiction") + row("a dog runs", "a dog", "entailment")
    records = convert(tmp_path, text, name)
    negatives = ["a cat sleeps", '"quoted" text']  # the latter was labelled as the premise, and counts both ways
    assert records[0] == {"query": "a dog runs", "pos": ["an animal moves", "a dog"], "neg": negatives}
    assert records[1]["query"] in records[0]["pos"]  # type: ignore[operator]
    assert records[1] == {"query": records[1]["query"], "pos": ["a dog runs"], "neg": negatives}
    assert len(records) == 2, "a premise without both kinds gives none"


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    text = HEADER + "".join(
        row(f"premise {n}", f"hypothesis {n} {m}", "contradiction" if m % 2 else "entailment")
        for n in range(30)
        for m in range(6)
    )
    (tmp_path / "nli.tsv").write_text(text)
    outputs = []
    for number, seed in enumerate((1, 1, 2)):
        convert_allnli(tmp_path / "nli.tsv", tmp_path / f"{number}.jsonl", seed=seed)
        outputs.append((tmp_path / f"{number}.jsonl").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_triplets(tmp_path: Path) -> None:
    line = {"anchor": " a ", "positive": "b", "negative": "c", "other": 1}
    assert convert(tmp_path, json.dumps(line) + "\n", "t.jsonl") == [{"query": "a", "pos": ["b"], "neg": ["c"]}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "split\tsentence1\tlabel\n", "a.tsv:1: its header has no column sentence2"),
        ("a.tsv", HEADER + "train\ttwo cells\n", "a.tsv:2: 2 cells in a table of 6 columns"),
        ("a.tsv", HEADER + row("a", "b", "entailment"), "a.tsv: gives no record of the split train"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n', "a.jsonl:1: expected an object with the texts anchor"),
        ("a.jsonl", "\n[", "a.jsonl:2: malformed JSON"),
    ],
)
def test_bad_input(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        convert(tmp_path, text, name)
    assert message in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_records_can_be_built(tmp_path: Path) -> None:
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    pairs = sentences(40)
    tokenizer = train_sentencepiece([text for pair in pairs for text in pair], tmp_path / "t", 400)
    text = HEADER + "".join(
        row(q, a, "entailment") + row(q, pairs[n - 1][1], "contradiction") for n, (q, a) in enumerate(pairs)
    )
    count = len(convert(tmp_path, text))
    report = build_grit([tmp_path / "out.jsonl"], tmp_path / "built", tokenizer)
    assert report.num_kept == count > 40
