"""The four tasks of USEB in small, in its files, against sklearn and pytrec_eval."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation import checkpoint
from megatron_grit.evaluation.ranking.run import evaluate_collection
from megatron_grit.evaluation.tasks import useb
from megatron_grit.evaluation.tasks.task import Lengths


class Angles:
    """Texts are numbers; n of them are as similar as they are close."""

    def encode(self, texts: list[str], instruction: str | None, **how: object) -> np.ndarray:
        angles = np.array([float(text) for text in texts]) / 50
        return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * 2).astype(np.float32)


def figures_of(folder: Path, split: str | None = None) -> dict[str, float]:
    return useb.run(Angles(), useb.read(folder, split), Lengths()).contents()


def test_askubuntu(tmp_path: Path) -> None:
    lines = [f"{name}\t{name}\tbody {name}" for name in range(20)]
    (tmp_path / "text_tokenized.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.txt").write_text("3\t4 9\t9 4 8 2\t3 2 1 0\n5\t\t1 2\t2 1\n10\t11\t12 11 18\t3 2 1\n")
    (tmp_path / "dev.txt").write_text("3\t4\t4 9\t1 0\n")
    # 3: nearest are 4 and 2 (in the order of the file), 8, 9; 10: 11 is first.
    assert figures_of(tmp_path)["map_askubuntu"] == pytest.approx(((1 + 2 / 4) / 2 + 1) / 2)
    assert figures_of(tmp_path, "valid")["map_askubuntu"] == 1
    (tmp_path / "test.txt").write_text("3\t4\t99\t1\n")
    with pytest.raises(DataError, match=r"test.txt:1: question 99 is not in text_tokenized.txt"):
        useb.read(tmp_path)


def test_evaluate_retrieval_knows_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{name}\t{name}\tbody" for name in range(5)]
    (tmp_path / "text_tokenized.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.txt").write_text("3\t4\t1 4\t2 1\n")
    monkeypatch.setattr(checkpoint, "load_encoder", lambda path, device, layer: Angles())
    figures = evaluate_collection("model", tmp_path, tmp_path / "out.json", lengths=Lengths())
    assert figures["map_askubuntu"] == 1 and figures == json.loads((tmp_path / "out.json").read_text())
    with pytest.raises(ConfigError, match="all texts have the instruction of queries; leave the other out"):
        evaluate_collection("model", tmp_path, tmp_path / "a.json", lengths=Lengths(), document_instruction="a")


def test_cqadupstack(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    corpus = {forum: {f"{forum}{i}": str(i) for i in range(30)} for forum in ("gis", "tex")}
    splits = {"gis": {"gis3": ["gis5", "gis20"], "gis9": ["gis8"]}, "tex": {"tex1": ["tex2"]}}
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    (tmp_path / "retrieval_split.json").write_text(json.dumps({"test": splits, "valid": splits}))
    found = figures_of(tmp_path)
    for forum, judged in splits.items():
        expected = []
        for name, right in judged.items():
            query = int(corpus[forum][name])
            pool = {each: int(text) for each, text in corpus[forum].items() if each not in judged}
            # Of two equally near ones the earlier stands first in ours; here the nearest ones are unequal.
            cosines = [np.cos((value - query) / 50) - 1e-9 * value for value in pool.values()]
            expected.append(metrics.average_precision_score([each in right for each in pool], cosines))
        assert found[f"map_{forum}"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["map_mean"] == pytest.approx((found["map_gis"] + found["map_tex"]) / 2)


def test_scidocs(tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    corpus = {f"p{i}": {"title": str(i * i) if i != 7 else None} for i in range(12)}
    qrels = {"p1": {"p2": 1, "p5": 0, "p9": 1, "p7": 1}, "p4": {"p3": 0, "p5": 1}}
    (tmp_path / "data.json").write_text(json.dumps({"corpus": corpus, "test": {"cite": qrels}}))
    run = {
        query: {
            name: float(np.cos((int(corpus[name]["title"]) - int(corpus[query]["title"])) / 50))  # type: ignore[arg-type]
            for name in grades
            if corpus[name]["title"] is not None
        }
        for query, grades in qrels.items()
    }
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"map"}).evaluate(run)
    assert figures_of(tmp_path)["map_cite"] == pytest.approx(np.mean([each["map"] for each in expected.values()]))
    with pytest.raises(DataError, match="is not laid out as USEB's scidocs"):
        useb.read(tmp_path, "valid")


def test_twitterpara(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    first, second = random.integers(0, 100, 40), random.permutation(100)[:40]
    votes = random.integers(0, 7, 40)
    rows = list(zip(first, second, votes, strict=True))
    (tmp_path / "Twitter_URL_Corpus_test.txt").write_text("".join(f"{a}\t{b}\t({v}, 6)\turl\n" for a, b, v in rows))
    (tmp_path / "test.data").write_text("".join(f"1\ttopic\t{a}\t{b}\t{v}\n" for a, b, v in rows))
    cosines, told = np.cos((first - second) / 50), votes != 3
    expected = metrics.average_precision_score(votes[told] > 3, cosines[told].astype(np.float32))
    found = figures_of(tmp_path)
    assert found["ap_twitterurl"] == found["ap_pit"] == found["ap_mean"]
    assert found["ap_pit"] == pytest.approx(expected, abs=0.02)  # sklearn takes pairs of one cosine together
    assert found["spearman_pit"] == pytest.approx(stats.spearmanr(cosines, votes).statistic, abs=0.01)
    (tmp_path / "test.data").write_text("1\ttopic\t3\n")
    with pytest.raises(DataError, match=r"test.data:1: must have 5 fields"):
        useb.read(tmp_path)


def test_other_folders(tmp_path: Path) -> None:
    assert not useb.is_useb(tmp_path)
    with pytest.raises(DataError, match="holds none of USEB's tasks"):
        useb.read(tmp_path)
