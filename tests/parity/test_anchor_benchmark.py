"""The benchmark of an anchor in miniature: what its arms share and differ in, and when its targets are met."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import anchor
from megatron_grit.data.text.tokenizer import train_sentencepiece
from tests.corpus import sentences
from tests.harness.command import python

SMALL = ["--base-steps=2", "--steps=2", "--pairs=4", "--base-batch=4", "--anchor-batch=4", "--seeds=1", "--processes=1"]


def write_corpus(folder: Path) -> None:
    """Titles with abstracts as Cranfield has them, and conversations."""
    pairs = sentences(48)
    abstracts = [f".I {n}\n.T\n{asked}\n.A\nan author\n.W\n{asked}\n{said}\n" for n, (asked, said) in enumerate(pairs)]
    (folder / anchor.ABSTRACTS).write_text("".join(abstracts))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    (folder / anchor.CONVERSATIONS).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(anchor.sys, "executable", python())
    monkeypatch.setattr(anchor, "PAIRS", 16)
    monkeypatch.setattr(anchor, "train_sentencepiece", lambda texts, prefix, _: train_sentencepiece(texts, prefix, 400))
    monkeypatch.setattr(anchor.harness, "run", lambda _, given, measure: kept.append(measure(tmp_path / "work")) or 0)
    kept: list[tuple[dict[str, Any], bool]] = []
    assert anchor.main([*SMALL, f"--data={tmp_path}"]) == 0
    (numbers, _), arms = kept[0], kept[0][0]["arms"]
    steps = {
        name: [
            json.loads(line) for line in (tmp_path / "work" / f"{name}_1" / "metrics.jsonl").read_text().split("\n")[:2]
        ]
        for name in ("base", *anchor.ARMS)
    }
    # Both arms begin with the base's weights and the same pairs.
    first = [steps[name][0] for name in anchor.ARMS]
    for key in ("loss_preference", "logps/chosen", "logps/rejected"):
        assert first[0][key] == pytest.approx(first[1][key], rel=1e-6)
    assert first[0]["loss_preference"] == pytest.approx(0.693147, abs=1e-5)
    assert "loss_emb" not in first[0] and first[1]["loss_emb"] > 0 and "loss_gen" not in first[1]
    for name in anchor.ARMS:
        arm = arms[name]
        assert arm["ndcg_at_10"] == [steps[name][-1][anchor.FIGURE]] and 0 < arm["ndcg_at_10"][0] <= 1
        assert arm["lost"]["mean"] == arms["base"]["ndcg_at_10"][0] - arm["ndcg_at_10"][0]
        assert arm["accuracy"] == [steps[name][-1]["rewards/accuracies"]]
        assert 0 <= arm["runs"][0]["of the base"]["prefers"] <= 1 and arm["runs"][0]["of the base"]["margin"] != 0
    assert numbers["options"]["anchor_weight"] == "1.0"
    assert "dpo_anchored: accuracy" in capsys.readouterr().out


def run_of(base: float, alone: float, anchored: float, accuracy: float = 0.95) -> dict[str, Any]:
    """What the runs of a seed found."""
    return {
        "base": {"ndcg_at_10": base},
        "dpo": {"ndcg_at_10": alone, "rewards/accuracies": 1.0},
        "dpo_anchored": {"ndcg_at_10": anchored, "rewards/accuracies": accuracy},
    }


MET = [run_of(0.30, 0.20, 0.295), run_of(0.31, 0.21, 0.30)]
MISSED = {
    "it falls with the anchor too": [run_of(0.30, 0.20, 0.27), run_of(0.31, 0.21, 0.30)],
    "nothing was learned": [run_of(0.30, 0.20, 0.295, 0.85), run_of(0.31, 0.21, 0.30, 0.94)],
    "the control does not fall below it": [run_of(0.30, 0.296, 0.295), run_of(0.31, 0.21, 0.30)],
}


def test_targets() -> None:
    numbers, met = anchor.report(MET, Namespace(seeds=2))
    assert met and numbers["arms"]["dpo"]["lost"]["mean"] == pytest.approx(0.1)
    for what, runs in MISSED.items():
        assert not anchor.report(runs, Namespace(seeds=2))[1], what
