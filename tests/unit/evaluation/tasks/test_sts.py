from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_grit.errors import DataError
from megatron_grit.evaluation.tasks import sts
from megatron_grit.evaluation.tasks.task import Lengths


class Angles:
    """Texts are angles; a pair is the more alike the smaller the difference is."""

    def encode(self, texts: list[str], instruction: str | None, **how: object) -> np.ndarray:
        assert instruction == "compare"
        angles = np.array([float(text) for text in texts])
        return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * 3).astype(np.float32)


def test_correlations_are_those_of_scipy(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    first, second = random.uniform(0, 3, (2, 50))
    scores = (5 - 2 * np.abs(first - second) + random.normal(0, 1, 50)).round(0)  # many are equal
    path = tmp_path / "pairs.csv"
    path.write_text("".join(f"{a},{b},{score}\n" for a, b, score in zip(first, second, scores, strict=True)))
    figures = sts.run(Angles(), sts.read(path, "compare"), Lengths()).contents()
    cosines = np.cos(first - second)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=1e-6)
    assert figures["pearson"] == pytest.approx(stats.pearsonr(cosines, scores).statistic, abs=1e-6)
    low, high = figures["intervals"]["spearman"]
    assert low < figures["spearman"] < high and figures["num_pairs"] == 50


def test_forms_of_files(tmp_path: Path) -> None:
    files = {
        "a.csv": 'sentence1,score,sentence2\n"one, two",1,three\nfour,0.5,five\n',
        "a.tsv": '"one, two\tthree\t1\nfour\tfive\t0.5\n',
        "a.jsonl": '{"sentence1": "one, two", "sentence2": "three", "score": 1}\n'
        '{"sentence1": "four", "sentence2": "five", "score": 0.5}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        pairs = sts.read(tmp_path / name)
        assert [text.strip('"') for text in pairs.first] == ["one, two", "four"]
        assert (pairs.second, pairs.scores.tolist()) == (["three", "five"], [1, 0.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,1\nc,d\n", r"pairs.csv:2: must have two sentences and a score; it has 2 fields"),
        ("a,b,1\nc,d,high\n", r"pairs.csv:2: must have .*'high' is no finite number"),
        ("a,b,1\nc,d,2\ne,f,nan\n", r"pairs.csv:3: must have two sentences and a score; 'nan' is no finite number"),
        ("a,b,-inf\nc,d,2\n", r"pairs.csv:1: must have .*'-inf' is no finite number"),
        ("a,b,1\nc, ,2\n", r"pairs.csv:2: an empty sentence"),
        ("a,b,1\nc,d,1\n", "no two of different scores"),
        ("", "no two of different scores"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        sts.read(path)


@pytest.mark.parametrize("score", ["true", "null", "[1]", '"high"', '"nan"'])
def test_scores_of_objects_are_numbers(tmp_path: Path, score: str) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [f'{{"sentence1": "a", "sentence2": "b", "score": {each}}}\n' for each in ("2", '"3"', score)]
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"pairs.jsonl:3: must have two sentences and a score; .* is no finite number"):
        sts.read(path)
