"""MS MARCO's hard negatives against the loop that sentence-transformers' script runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.builders.sources.msmarco import KeyedLines, convert_msmarco
from megatron_grit.errors import ConfigError, DataError

SYSTEMS = ("bm25", "dense", "other")


def files(directory: Path, *, num_queries: int = 30, seed: int = 0, own_scores: bool = False) -> dict[str, Path]:
    """Queries, passages and negatives of a made-up collection; query q's positives are passages q and q + 100."""
    random = np.random.default_rng(seed)
    paths = {name: directory / name for name in ("queries", "corpus", "negatives", "scores")}
    lines: dict[str, list[str]] = {name: [] for name in paths}
    lines["queries"] = [f"{q}\tquery  {q} \n" for q in range(num_queries)]
    lines["corpus"] = [f"{p}\tpassage {p}, with a\ttab\n" for p in range(200)]
    for q in range(num_queries):
        positives = [q, q + 100][: 1 + q % 2]
        mined = {name: random.permutation(np.arange(40, 90))[:20].tolist() for name in SYSTEMS[: 1 + q % 3]}
        table = {str(p): round(float(random.normal(2, 3)), 3) for p in range(40, 90)}
        table |= {str(p): round(float(random.normal(7, 2)), 3) for p in positives}
        line: dict[str, Any] = {"qid": q, "pos": positives, "neg": mined}
        if own_scores:
            line["pos"] = [{"pid": p, "ce-score": table[str(p)]} for p in positives]
            line["neg"] = {n: [{"pid": p, "ce-score": table[str(p)]} for p in ps] for n, ps in mined.items()}
        lines["negatives"].append(json.dumps(line) + "\n")
        lines["scores"].append(json.dumps({"qid": q, "scores": table}) + "\n")
    for name, path in paths.items():
        path.write_text("".join(lines[name]))
    return paths


def by_loop(paths: dict[str, Path], margin: float | None, per_system: int) -> list[dict[str, Any]]:
    scores = {str(v["qid"]): v["scores"] for v in map(json.loads, paths["scores"].read_text().splitlines())}
    records = []
    for line in map(json.loads, paths["negatives"].read_text().splitlines()):
        table = scores[str(line["qid"])]
        threshold = min(table[str(p)] for p in line["pos"]) - (margin or 0)
        negatives: list[int] = []
        for mined in line["neg"].values():
            added = 0
            for p in mined:
                if margin is not None and table[str(p)] > threshold:
                    continue
                if p not in negatives:
                    negatives.append(p)
                    added += 1
                    if added >= per_system:
                        break
        if negatives:
            text = "passage {}, with a\ttab"
            pos, neg = ([text.format(p) for p in pids] for pids in (line["pos"], negatives))
            records.append({"query": f"query  {line['qid']}", "pos": pos, "neg": neg})
    return records


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("margin", [3.0, 9.0, None])
@pytest.mark.parametrize("per_system", [1, 5])
@pytest.mark.parametrize("own_scores", [False, True])
def test_the_negatives_are_the_scripts(margin: float | None, per_system: int, own_scores: bool, tmp_path: Path) -> None:
    paths, output = files(tmp_path, own_scores=own_scores), tmp_path / "out.jsonl"
    scores = None if own_scores or margin is None else paths["scores"]
    counts = convert_msmarco(
        paths["queries"],
        paths["corpus"],
        paths["negatives"],
        output,
        scores_path=scores,
        margin=margin,
        per_system=per_system,
    )
    if own_scores:
        files(tmp_path)  # the same in the form that the loop reads
    expected = by_loop(paths, margin, per_system)
    assert read(output) == expected
    assert counts.kept == len(expected) and counts.negatives == sum(len(r["neg"]) for r in expected)
    assert (counts.too_close > 0) == (margin is not None)
    assert counts.without_negatives == 30 - len(expected)
    if margin == 9.0:
        assert counts.without_negatives > 0


def test_one_system_and_qrels(tmp_path: Path) -> None:
    paths, output = files(tmp_path), tmp_path / "out.jsonl"
    negatives, qrels = tmp_path / "negatives.jsonl.gz", tmp_path / "qrels"
    line = {"qid": "0", "pos": [], "neg": {"bm25": [50, 51, 50, 52], "dense": [60]}}
    negatives.write_bytes(gzip.compress(json.dumps(line).encode()))
    qrels.write_text("0 0 51 1\n0 0 52 0\n1 0 53 1\n")
    convert_msmarco(
        paths["queries"], paths["corpus"], negatives, output, qrels_path=qrels, margin=None, systems=["bm25"]
    )
    (record,) = read(output)
    assert [record["pos"], record["neg"]] == [
        ["passage 51, with a\ttab"],
        ["passage 50, with a\ttab", "passage 52, with a\ttab"],
    ], "a relevant passage is no negative"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("queries", "no tab\n", "queries:1: expected an id, a tab and a text"),
        ("queries", "77\tq\n", "negatives:1: query 0 is not in"),
        ("corpus", "1\tx\nno tab\n", "corpus:2: expected an id, a tab and a text"),
        ("corpus", "1000\tx\n", "corpus: has no line for"),
        ("corpus", "", "corpus: cannot be read"),
        ("negatives", "{}\n", 'negatives:1: expected {"qid": id'),
        ("negatives", '{"qid": 0, "pos": [0], "neg": {"a": [null]}}\n', 'negatives:1: expected {"qid": id'),
        (
            "negatives",
            '{"qid": 0, "pos": [0], "neg": {"a": [95]}}\n',
            "negatives:1: passage 95 of query 0 has no cross",
        ),
        ("negatives", '{"qid": 0, "pos": [], "neg": {"a": [50]}}\n', "negatives: no query has a positive"),
        ("scores", '{"scores": {}}\n', 'scores:1: expected a JSON object with "qid"'),
        ("scores", '{"qid": 0}\n', 'scores: the line of query 0 has no object "scores"'),
    ],
)
def test_bad_input(name: str, text: str, message: str, tmp_path: Path) -> None:
    paths, output = files(tmp_path), tmp_path / "out.jsonl"
    paths[name].write_text(text)
    with pytest.raises(DataError) as caught:
        convert_msmarco(paths["queries"], paths["corpus"], paths["negatives"], output, scores_path=paths["scores"])
    assert message in str(caught.value)
    assert not output.exists()


def test_options_are_checked(tmp_path: Path) -> None:
    paths = files(tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        convert_msmarco(paths["queries"], paths["corpus"], paths["negatives"], tmp_path / "o", per_system=0)
    with pytest.raises(DataError, match="decompress it first"):
        KeyedLines(tmp_path / "corpus.gz")


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"1\tone\r\n\n22\ttwo")
    lines = KeyedLines(tmp_path / "c")
    assert (lines.text("1"), lines.text("22"), "2" in lines) == ("one", "two", False)
