"""ROUGE of the package against its definition, and what is done where the package is missing."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.compat import install_command
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.qa.rouge import rouge_scores
from megatron_grit.evaluation.qa.run import evaluate_answers, format_scores
from megatron_grit.evaluation.qa.scores import SCORERS, ScorerName

ANSWERS = ["the cat sat on the mat", "it was a dark, stormy night", "no words in common", "", "a b"]
REFERENCES = [
    ["the cat was on the mat", "on the mat"],
    ["A dark and stormy night it was"],
    ["something else entirely"],
    ["an answer"],
    ["x", "a b c"],
]


def f_measure(num_shared: int, left: int, right: int) -> float:
    return 2 * num_shared / (left + right) if num_shared else 0.0


def defined(answer: str, reference: str) -> dict[str, float]:
    """F-measures of n-grams, each counted as often as both have it, and of the longest common subsequence."""
    one, other = (
        "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower()).split()
        for text in (answer, reference)
    )
    found = {}
    for n in (1, 2):
        grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (one, other)]
        found[f"rouge{n}"] = f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())
    longest = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, word in enumerate(one):
        for j, match in enumerate(other):
            longest[i + 1, j + 1] = longest[i, j] + 1 if word == match else max(longest[i, j + 1], longest[i + 1, j])
    return found | {"rougeL": f_measure(int(longest[-1, -1]), len(one), len(other))}


class DefinedScorer:
    """In the place of the package's class."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def score(self, target: str, prediction: str) -> dict[str, SimpleNamespace]:
        found = defined(prediction, target)
        return {name: SimpleNamespace(fmeasure=found[name]) for name in self.names}


@pytest.fixture(params=["package", "definition"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "package":
        pytest.importorskip("rouge_score", reason="the extra eval is not installed")
        return
    module = ModuleType("rouge_score")
    module.rouge_scorer = SimpleNamespace(RougeScorer=DefinedScorer)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rouge_score", module)


@pytest.mark.usefixtures("package")
def test_the_best_reference_counts_for_each_measure() -> None:
    found = rouge_scores(ANSWERS, REFERENCES)
    for name, given in {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}.items():
        pairs = zip(ANSWERS, REFERENCES, strict=True)
        expected = [max(defined(answer, one)[given] for one in references) for answer, references in pairs]
        np.testing.assert_allclose(found[name], expected, atol=1e-12)
    np.testing.assert_allclose(found["rouge_1"], [5 / 6, 12 / 13, 0, 0, 0.8])
    np.testing.assert_allclose(found["rouge_2"], [0.6, 6 / 11, 0, 0, 2 / 3])


@pytest.mark.usefixtures("package")
def test_the_geometric_mean_is_of_the_means(tmp_path: Path) -> None:
    """Over the questions that have an answer."""
    import json

    (tmp_path / "answers.txt").write_text("".join(f"{answer}\n" for answer in [*ANSWERS, "the"]))
    references = [*({"answers": texts} for texts in REFERENCES), {"answers": []}]
    (tmp_path / "right.json").write_text(json.dumps(references))
    figures = evaluate_answers(tmp_path / "answers.txt", tmp_path / "right.json", rouge=True)
    means = [values.mean() for values in rouge_scores(ANSWERS, REFERENCES).values()]
    assert [figures[name] for name in ("rouge_1", "rouge_2", "rouge_l")] == pytest.approx(means)
    assert figures["rouge_geometric_mean"] == pytest.approx(np.exp(np.log(means).mean()))
    assert f"{figures['rouge_geometric_mean']:.3f}" in format_scores(figures).splitlines()[-1]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("scorer", SCORERS)
def test_texts_are_scored_as_they_stand(tmp_path: Path, scorer: ScorerName) -> None:
    """Three words with one; only an answer that says that there is none is made empty."""
    (tmp_path / "answers.txt").write_text("Answer: Paris<|endoftext|>\nunknown\n")
    (tmp_path / "right.json").write_text('[{"answer": "Paris"}, {"answer": "unknown"}]')
    paths = tmp_path / "answers.txt", tmp_path / "right.json"
    figures = evaluate_answers(*paths, scorer=scorer, no_answer=["Unknown"], rouge=True)
    assert figures["rouge_1"] == pytest.approx((0.5 + 0) / 2) and figures["em"] == (0.5 if scorer == "retro" else 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before a file is read."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert cli.main(["evaluate", "qa", "nothing.txt", "nothing.json", "--rouge"]) == 2
    message = f"--rouge needs rouge-score: {install_command('eval')}"
    assert capsys.readouterr().err == f"megatron-grit evaluate qa: error: {message}\n"
    with pytest.raises(ConfigError):
        rouge_scores(["a"], [["a"]])
