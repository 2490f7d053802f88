"""A run that trains preferences and pairs to embed in one step: weights, metrics, its cache, and how it resumes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import sentences, tiny_run, write_jsonl
from tests.harness.ranks import run_on_ranks

STEPS = 4


def write_pairs(folder: Path) -> None:
    """Answers to a question, and to another one with a word more, which is soon learned."""
    from megatron_grit.data.builders.grit_builder import build_grit
    from megatron_grit.data.indexed.roles import RowKind

    pairs = sentences(96)
    records: list[dict[str, object]] = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": answer,
            "rejected": pairs[(number + 5) % 96][1] + " indeed",
        }
        for number, (question, answer) in enumerate(pairs)
    ]
    write_jsonl(folder / "pairs.jsonl", records)
    build_grit([folder / "pairs.jsonl"], folder / "pairs", folder / "tokenizer.model", kind=RowKind.PREFERENCE)


def train_both(corpus: str, output: str, objective: list[str], changes: dict[str, Any]) -> str:
    """Train, from a checkpoint if there is one; the error that ended it, or nothing."""
    from megatron_grit.config.kinds import option
    from megatron_grit.errors import GritError
    from megatron_grit.training.trainer import train

    config = tiny_run(Path(corpus))
    config.output_dir, config.training.objective, config.training.steps = output, objective, STEPS
    config.loss.loss_emb_factor, config.checkpoint.save_interval = 0.25, 2
    knobs = option(config, "preference")
    knobs.data, knobs.batch_size, knobs.weight = [str(Path(corpus) / "pairs")], 16, 2.0
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(option(config, section), name, value)
    try:
        train(config)
    except GritError as error:
        return str(error)
    return ""


def metrics_of(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def scenes(folder: str) -> dict[str, Any]:
    """All runs, one after another in one process."""
    corpus, both = folder, ["preference", "embedding"]
    said = {"both": train_both(corpus, f"{folder}/both", both, {})}
    said["alone"] = train_both(corpus, f"{folder}/alone", ["preference"], {})
    said["weighed"] = train_both(corpus, f"{folder}/weighed", both, {"preference.weight": 0.0})
    straight = metrics_of(Path(folder) / "both")
    shutil.rmtree(f"{folder}/both/checkpoints/step_{STEPS:08d}")
    (part,) = Path(folder).glob("both/cache/reference/*/part_*.npz")
    part.rename(part.with_suffix(".away"))
    said["missing"] = train_both(corpus, f"{folder}/both", both, {})
    part.write_bytes(part.with_suffix(".away").read_bytes()[:-40])
    said["damaged"] = train_both(corpus, f"{folder}/both", both, {})
    part.with_suffix(".away").rename(part)
    said["resumed"] = train_both(corpus, f"{folder}/both", both, {})
    said["more steps"] = train_both(corpus, f"{folder}/both", both, {"training.steps": 40})
    window = {"data.packing": "window", "preference.rows": 2, "data.num_rows_multiple": 1, "data.packing_window": 8}
    window |= {"training.steps": 2}
    kto = window | {"preference.loss": "kto", "preference.over_long": "truncate", "data.tokens_per_row": 96}
    said["window"] = train_both(corpus, f"{folder}/window", ["preference"], kto)
    return {"said": said, "straight": straight}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    tiny_run(folder)
    write_pairs(folder)
    (found,) = run_on_ranks(scenes, 1, tmp_path_factory.mktemp("ranks"), str(folder))
    return folder, found


def test_both_train_in_one_step_with_their_own_weights_and_metrics(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, found = runs
    assert found["said"]["both"] == found["said"]["alone"] == found["said"]["weighed"] == ""
    both, alone, weighed = (metrics_of(folder / name) for name in ("both", "alone", "weighed"))
    assert len(both) == STEPS
    for line in both:
        assert {"loss_emb", "accuracy_emb", "loss_preference", "rewards/margins", "rewards/accuracies"} <= line.keys()
        assert line["loss"] == pytest.approx(0.25 * line["loss_emb"] + 2 * line["loss_preference"])
    assert both[0]["loss_preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert both[0]["logps/chosen"] == pytest.approx(alone[0]["logps/chosen"])
    assert "loss_emb" not in alone[0]
    assert both[-1]["loss_emb"] < both[0]["loss_emb"] and both[-1]["loss_preference"] < both[0]["loss_preference"]
    # The control: without a weight the embedding loss alone is trained, from the same first losses.
    assert weighed[0]["loss"] == pytest.approx(0.25 * both[0]["loss_emb"])
    assert weighed[-1]["loss_preference"] > both[-1]["loss_preference"] + 0.05


def test_it_resumes_with_its_cache_and_not_without(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, found = runs
    said = found["said"]
    assert said["resumed"] == "" and found["straight"] == metrics_of(folder / "both")
    assert (
        "the reference's log-probabilities of" in said["missing"]
        and "a resumed run has the reference no more" in (said["missing"])
    )
    assert "preference.cache_dir" in said["missing"] and "are not in" in said["more steps"]
    assert "cannot be read" in said["damaged"] and "part_" in said["damaged"]
    assert not any("\n" in each for each in said.values())


def test_windows_of_rated_pairs(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, found = runs
    assert found["said"]["window"] == ""
    first, second = metrics_of(folder / "window")
    assert first["loss_preference"] == pytest.approx(0.5, abs=1e-6), "half of what a certain model would lose"
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] >= 0
    assert first["padding_fraction"] < 0.05
