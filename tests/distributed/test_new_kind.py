"""A third kind of row is four new files and nothing else: it is configured, trained, resumed, audited and estimated."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import tiny_run
from tests.harness.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests/unit/kinds"
FOLDERS = {
    "megatron_grit.config.schema.kinds": "sections",
    "megatron_grit.data.kinds": "rows",
    "megatron_grit.losses": "losses",
    "megatron_grit.training.objectives": "objectives",
}
STEPS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
}


def put_in() -> None:
    """As if the four files lay in the package. In processes of their own: other tests know nothing of the kind."""
    for package, folder in FOLDERS.items():
        importlib.import_module(package).__path__.append(str(FILES / folder))
    importlib.import_module("megatron_grit.config.kinds").add_sections()


class _Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def train_focal(corpus: str, output: str, layout: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train a mix of pairs and focal rows to a step, from a checkpoint if there is one; what was logged and read."""
    put_in()
    from megatron_grit.config.checks.run import check
    from megatron_grit.config.parse import dump_config, load_config
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.store.logs import configure_logging
    from megatron_grit.training.trainer import Trainer

    config = tiny_run(Path(corpus))
    config.focal.data, config.focal.weight = [str(Path(corpus) / "gen")], 0.5  # type: ignore[attr-defined]
    config.output_dir, config.training.objective, config.training.steps = output, ["focal", "embedding"], steps
    config.checkpoint.save_interval = 2
    if steps:  # all layouts start from the same weights
        config.checkpoint.load = str(Path(corpus) / "start")
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    written = Path(output + f".{os.environ['RANK']}.yaml")
    written.write_text(dump_config(config))
    config = load_config(written)
    configure_logging()
    lines = _Lines()
    with parallel_job(config.parallel, config.training.seed) as context:
        check(config, context.world_size)
        for name in ("audit.run", "estimate_report", "trainer"):
            logging.getLogger(f"megatron_grit.training.{name}").addHandler(lines)
        trainer = Trainer(config, context)
        trainer.run()
        fingerprints = [trainer.loader.fingerprint(step) for step in range(STEPS)]
        counts = trainer.loader.source_counts(STEPS)
    return {
        "log": lines.text,
        "fingerprints": fingerprints,
        "counts": {kind: sum(sources.values()) for kind, sources in counts.items()},
        "estimated": trainer.report.estimated_bytes,
    }


def plan_focal() -> dict[str, Any]:
    """What a plan and the checks say of a run with the kind, and how a wrong one is refused."""
    put_in()
    from megatron_grit.config.parse import parse_run_config
    from megatron_grit.errors import ConfigError
    from megatron_grit.planning.plan import make_plan, problems_of
    from megatron_grit.planning.text import format_plan

    words = ["--model", "tiny_mistral", "--data.tokenizer=t"]
    config = parse_run_config([*words, "--training.objective=focal", "--focal.data=[f]", "--focal.batch_size=64"])
    plan = make_plan(config, 4, 1000)
    assert plan.configured is not None
    refused = []
    for options in (["--training.objective=focale"], ["--focal.gama=1"], ["--focal.gamma=x"]):
        with pytest.raises(ConfigError) as error:
            parse_run_config([*words, *options])
        refused.append(str(error.value))
    config.focal.batch_size, config.focal.gamma = 2, -1.0  # type: ignore[attr-defined]
    refused += [problem.message for problem in problems_of(config, 4)]
    config.focal.gamma = 1.0  # type: ignore[attr-defined]
    refused += [problem.message for problem in problems_of(config, 4)]
    estimate = plan.configured
    return {
        "text": format_plan(plan),
        "refused": refused,
        "memory": estimate.memory.kinds,
        "operations": estimate.flops.losses,
        "kinds": [rows.kind for rows in estimate.workload.kinds],
    }


def metrics_of(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Output and report of a run in each layout."""
    corpus = tmp_path_factory.mktemp("corpus")
    tiny_run(corpus)

    def run(output: Path, name: str = "one process", steps: int = STEPS) -> tuple[Path, dict[str, Any]]:
        size, layout = LAYOUTS[name]
        ranks = tmp_path_factory.mktemp("ranks")
        return output, run_on_ranks(train_focal, size, ranks, str(corpus), str(output), layout, steps)[0]

    run(corpus / "start", steps=0)
    done = {name: run(tmp_path_factory.mktemp("run"), name) for name in LAYOUTS}
    output = done["one process"][0]
    straight = metrics_of(output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    _, resumed = run(output)
    assert "resumed from" in resumed["log"]
    assert metrics_of(output) == straight, "a resumed run goes on as if it had not been stopped"
    return done


def test_it_is_four_files(repository: Path) -> None:
    files = sorted(str(path.relative_to(FILES)) for path in FILES.rglob("*.py"))
    assert files == [f"{folder}/focal.py" for folder in ("losses", "objectives", "rows", "sections")]
    named = [path for path in (repository / "megatron_grit").rglob("*.py") if "focal" in path.read_text().lower()]
    assert not named


@pytest.mark.parametrize("name", ["DP2", "TP2 x PP2"])
def test_layouts_train_alike(runs: dict[str, tuple[Path, dict[str, Any]]], name: str) -> None:
    (alone, one), (spread, several) = runs["one process"], runs[name]
    assert one["fingerprints"] == several["fingerprints"] and one["counts"] == several["counts"]
    assert one["counts"] == {"embedding": STEPS * 12, "focal": STEPS * 8}
    first, second = metrics_of(alone), metrics_of(spread)
    assert len(first) == len(second) == STEPS
    for ours, theirs in zip(first, second, strict=True):
        assert list(ours)[:5] == ["step", "loss_emb", "loss_focal", "accuracy_emb", "easy_focal"]
        for metric in ("loss_emb", "loss_focal", "accuracy_emb", "easy_focal", "loss", "grad_norm"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=2e-4, abs=1e-6), metric
        assert ours["loss"] == pytest.approx(ours["loss_emb"] + 0.5 * ours["loss_focal"])
    assert first[-1]["loss_focal"] < first[0]["loss_focal"]


def test_it_is_audited_and_estimated(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    for _, report in runs.values():
        assert "of focal tokens are labels" in report["log"] and "of embedding tokens are pooled" in report["log"]
        assert report["estimated"] > 0
    # The losses are computed on the last stage, which rank 0 of the other layout does not hold.
    assert "focal" in runs["one process"][1]["log"].split("measured")[1]


def test_it_is_configured_and_planned(tmp_path: Path) -> None:
    (found,) = run_on_ranks(plan_focal, 1, tmp_path)
    assert found["kinds"] == ["focal"] and found["memory"]["focal"] > 0 and found["operations"]["focal"] > 0
    assert "Rows a step: 64 focal" in found["text"] or " focal, " in found["text"]
    for said, message in zip(
        [
            "one of unified, embedding, focal, generative",
            "did you mean --focal.gamma?",
            "--focal.gamma must be float, at least 0, not 'x'",
            "focal.gamma must be at least 0, not -1.0",
            "focal.batch_size 2 is below the 4 rows of a step",
        ],
        found["refused"],
        strict=True,
    ):
        assert said in message
