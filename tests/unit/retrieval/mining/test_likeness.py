"""Copies and parts of positives are no negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import save_project_config
from megatron_grit.retrieval.mining import corpus as mine_corpus
from megatron_grit.retrieval.mining import mine
from megatron_grit.retrieval.mining.likeness import normalized, repeats
from megatron_grit.retrieval.mining.mine import mine_negatives
from megatron_grit.retrieval.mining.options import MineOptions
from tests.corpus import write_jsonl
from tests.unit.retrieval.databases import WordEmbedder, build, make_project, tokenizer_of, write_documents


def mined_from(pairs: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    output = pairs.with_name("mined.jsonl")
    report = mine_negatives(MineOptions(input=[pairs], output=output, **options))
    return [json.loads(line) for line in output.read_text().splitlines()], report


def texts_like_positives() -> tuple[list[dict[str, object]], list[str], list[str]]:
    """Twelve records; of the positive of each the first half, the second half, the positive with three words of 24
    changed, one with a sentence around it, and one without its first words; and other texts of the same words."""
    random, records, like, other = np.random.default_rng(0), list[dict[str, object]](), list[str](), list[str]()
    for number in range(12):
        words = [f"w{word}" for word in random.choice(60, 24, replace=False)]
        changed = [*words[:5], "x1", *words[6:12], "x2", *words[13:20], "x3", *words[21:]]
        for copy in (words[:12], words[12:], changed, ["so", "they", "say", *words, "and", "more"], words[4:]):
            like.append(f"{' '.join(copy).upper()}")
        other += [" ".join(random.permutation(words)) for _ in range(4)]
        records.append({"query": f"{' '.join(random.choice(words, 6))} {number}", "pos": [" ".join(words)]})
    return records, like, other


@pytest.mark.parametrize("source", ["corpus", "database"])
def test_copies_and_parts_of_positives_are_no_negatives(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, like, other = texts_like_positives()
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    monkeypatch.setattr(mine, "load_embedder", lambda *_: WordEmbedder())
    options: dict[str, Any] = {"ranks": (1, 120), "num_negatives": 200, "sampling": "top", "embedder": "student"}
    if source == "corpus":
        options["corpus"] = [write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in [*like, *other]])]
    else:
        tokenizer = tokenizer_of(tmp_path)
        prefix = write_documents(tmp_path / "texts", [*like, *other], tokenizer)
        project = build(
            make_project(tmp_path / "db", [prefix], tmp_path, chunk_length=400), WordEmbedder(), query=False
        )
        save_project_config(project.config, project.folder)
        monkeypatch.setattr(mine_corpus, "project_embedder", lambda config, **_: WordEmbedder())
        options |= {"embedder": None, "project_dir": project.folder}
    without, _ = mined_from(pairs, max_overlap=None, **options)
    mined, report = mined_from(pairs, max_overlap=MineOptions.max_overlap, **options)
    for number, (record, before) in enumerate(zip(mined, without, strict=True)):
        own, found = {normalized(text) for text in like[5 * number : 5 * number + 5]}, record["neg"]
        assert not own & set(map(normalized, found)), "a copy or a part of the positive is a negative"
        assert {normalized(text) for text in other} <= set(map(normalized, found)), "the same words are no copy"
        assert own <= set(map(normalized, before["neg"]))
        assert len(found) == len(like) + len(other) - 5
    assert report["dropped_candidates"]["like_positive"] == 5 * len(records)


@pytest.mark.parametrize(
    ("passage", "positive", "expected"),
    [
        ("b c d", "a b c d e", True),
        ("b", "a b c", True),
        ("a b c d e f", "a b c d e f g h i j k l", True),
        ("x x x a b c d e x x x x", "a b c d e", True),
        ("a b c d x x x x", "a b c d y y y y", False),
        ("a b c d e x y", "a b c d e u v", True),
        ("the same", "is not the one", False),
        ("昨日は雨が降りました", "東京では昨日は雨が降りましたので", True),
        ("昨日は雪が降りました", "明日は雨が降るでしょう", False),
    ],
)
def test_what_repeats_a_positive(passage: str, positive: str, expected: bool) -> None:
    assert repeats(passage, ["nothing of it", positive], 0.5) == expected
