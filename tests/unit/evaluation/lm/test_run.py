"""megatron-grit evaluate lm: results on disk, killed runs, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.compat import install_command
from megatron_grit.config.options import HarnessModel, HarnessTasks
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.lm.run import LmReport, evaluate_lm
from tests.corpus import write_jsonl
from tests.unit.evaluation.lm.local_tasks import NAMES, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm") / "tasks", count=5)


def evaluate(run: RunConfig, folder: Path, output: Path, **changes: Any) -> LmReport:
    asked: dict[str, Any] = {"tasks": list(NAMES), "include_path": [str(folder)], "bootstrap_iters": 0}
    options = HarnessModel(checkpoint=run.output_dir, device="cpu")
    report = evaluate_lm(options, HarnessTasks(output_dir=str(output), **asked | changes))
    assert report is not None
    return report


class Killed(BaseException):
    pass


def test_a_killed_evaluation_resumes(
    trained_run: RunConfig, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_grit.evaluation.lm import requests

    whole = evaluate(trained_run, tasks, tmp_path / "whole", log_samples=True)
    asked: list[int] = []
    take = requests.RequestRunner._take

    def counting(self: Any, what: str, items: list[Any]) -> Any:
        if len(asked) == 5:
            raise Killed
        asked.append(len(items))
        return take(self, what, items)

    monkeypatch.setattr(requests.RequestRunner, "_take", counting)
    monkeypatch.setattr(requests, "_ROUNDS", 1)
    options = HarnessModel(checkpoint=trained_run.output_dir, device="cpu", batch_tokens=256, at_once=2)
    told = HarnessTasks(
        tasks=list(NAMES), output_dir=str(tmp_path / "killed"), include_path=[str(tasks)], bootstrap_iters=0
    )
    for _ in range(9):  # killed again and again, after five passes each time
        asked.clear()
        try:
            report = evaluate_lm(options, told)
            break
        except Killed:
            assert not list((tmp_path / "killed").glob("results_*.json"))
    assert report is not None and report.figures.keys() == whole.figures.keys()
    for task, metrics in whole.figures[""].items():
        assert report.figures[""][task] == pytest.approx(metrics, rel=1e-5)
    asked.clear()
    again = evaluate(trained_run, tasks, tmp_path / "killed", tasks=["local_answers", "local_choice"])
    assert not asked  # every answer is there
    assert again.figures[""]["local_choice"] == report.figures[""]["local_choice"]
    (results,) = (tmp_path / "whole").glob("results_*.json")
    assert json.loads(results.read_bytes())["results"].keys() == set(NAMES)
    assert len(list((tmp_path / "whole").glob("samples_*.jsonl"))) == 3
    assert len((tmp_path / "whole").joinpath("summary.json").read_text()) > 100


def test_answers_of_another_model_are_refused(trained_run: RunConfig, tasks: Path, tmp_path: Path) -> None:
    evaluate(trained_run, tasks, tmp_path, tasks=["local_answers"])
    described = tmp_path / "answers" / "model.json"
    facts = json.loads(described.read_bytes())
    described.write_text(json.dumps(facts | {"content": "another"}))
    with pytest.raises(DataError, match=r"of another model \(content another\); give another --output-dir"):
        evaluate(trained_run, tasks, tmp_path, tasks=["local_answers"])


def test_data_that_change_change_the_figures(trained_run: RunConfig, tmp_path: Path) -> None:
    """Answers are kept by request, and figures are of the data that are there now."""
    folder, output = write_tasks(tmp_path / "tasks", count=2), tmp_path / "out"
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    told = {"tasks": ["local_answers"], "log_samples": True}
    report = evaluate(trained_run, folder, output, **told)
    assert report.figures[""]["local_answers"]["exact_match,none"] == 0
    (samples,) = output.glob("samples_*.jsonl")
    said = [json.loads(line)["filtered_resps"][0] for line in samples.read_text().splitlines()]
    write_jsonl(folder / "answers.jsonl", [r | {"choices": [a]} for r, a in zip(records, said, strict=True)])
    report = evaluate(trained_run, folder, output, **told)
    assert report.figures[""]["local_answers"]["exact_match,none"] == 1
    kept = list((output / "answers").glob("*.jsonl"))
    write_jsonl(folder / "answers.jsonl", [r | {"question": "what else?", "choices": ["x"]} for r in records])
    report = evaluate(trained_run, folder, output, **told)
    assert report.figures[""]["local_answers"]["exact_match,none"] == 0
    assert len(list((output / "answers").glob("*.jsonl"))) == len(kept) + 1  # asked


def test_a_suite_has_a_folder_for_each_part(
    trained_run: RunConfig, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_grit.evaluation.lm import tasks as module

    suites = tmp_path / "suites.yaml"
    suites.write_text(
        "small:\n"
        "  choice_0shot: {tasks: [local_choice], num_fewshot: 0, metric: acc, group: one}\n"
        "  choice_2shot: {tasks: [local_choice], num_fewshot: 2, metric: acc_norm, group: one, scale: 0.5}\n"
        "  answers: {tasks: [local_answers], metric: exact_match, group: two}\n"
    )
    monkeypatch.setattr(module, "SUITES", suites)
    report = evaluate(trained_run, tasks, tmp_path / "out", tasks=["small"])
    first, second = report.figures["choice_0shot"], report.figures["choice_2shot"]
    of_one = (first["local_choice"]["acc,none"] + 0.5 * second["local_choice"]["acc_norm,none"]) / 2
    assert report.groups == {"one": pytest.approx(of_one), "two": report.parts["answers"]}
    for part, shots in (("choice_0shot", 0), ("choice_2shot", 2)):
        (results,) = (tmp_path / "out" / part).glob("results_*.json")
        assert json.loads(results.read_bytes())["n-shot"] == {"local_choice": shots}
    assert report.lines()[-1].startswith("mean of 2 groups: ")


def refusals(tasks: Path) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"tasks": ["local_choise"], "include_path": [str(tasks)]}, r"task 'local_choise' is not known"
    yield {"include_path": [str(tasks / "nowhere")]}, "include_path .*nowhere: there is no such folder"
    yield {"tasks": ["nowhere/task.yaml"]}, "task nowhere/task.yaml: there is no such file"
    yield {"tasks": []}, "name at least one task, or a suite: open-instruct"
    yield {"tasks": ["local_text,local_text"]}, "task local_text is named twice"


def test_what_cannot_be_evaluated(
    trained_run: RunConfig, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)  # its own tasks take long to find
    for changes, message in refusals(tasks):
        with pytest.raises(ConfigError, match=message):
            evaluate(trained_run, tasks, tmp_path, **changes)
    (tasks / "answers.jsonl").rename(tasks / "away.jsonl")
    try:
        with pytest.raises(DataError, match="task local_answers cannot be loaded: .*answers.jsonl"):
            evaluate(trained_run, tasks, tmp_path, tasks=["local_answers"])
    finally:
        (tasks / "away.jsonl").rename(tasks / "answers.jsonl")


def test_without_the_harness(trained_run: RunConfig, tasks: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import builtins

    plain = builtins.__import__

    def refusing(name: str, *rest: Any, **others: Any) -> Any:
        if name == "lm_eval":
            raise ImportError(name)
        return plain(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ConfigError, match=rf"evaluate lm needs lm-eval.*: {re.escape(install_command('eval'))}$"):
        evaluate(trained_run, tasks, tmp_path)


def test_code_is_run_where_it_is_allowed(
    trained_run: RunConfig, tasks: Path, tmp_path: Path, names: Sequence[str] = ("local_code",)
) -> None:
    text = (tasks / "answers.yaml").read_text().replace("local_answers", "local_code")
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "code.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="local_code runs what the model writes .* --confirm-run-unsafe-code"):
        evaluate(trained_run, folder, tmp_path / "out", tasks=list(names))
    report = evaluate(trained_run, folder, tmp_path / "out", tasks=list(names), confirm_run_unsafe_code=True)
    assert report.figures[""].keys() == {"local_code"}


def test_the_suites_name_tasks_of_the_harness() -> None:
    """By the files of lm-eval's own folder of tasks: its index takes half a minute to build."""
    import lm_eval.tasks

    from megatron_grit.evaluation.lm.tasks import read_suites

    suites = read_suites()
    folder = Path(lm_eval.tasks.__file__).parent
    wanted = {task for parts in suites.values() for part in parts for task in part.tasks}
    found: set[str] = set()
    for path in folder.rglob("*"):
        if path.suffix == ".yaml" or path.name.endswith("_yaml"):
            words = path.read_text(encoding="utf-8").split()
            found |= {word.strip("\"'[],") for word in words} & wanted
    assert found == wanted
    groups = {part.group for part in suites["instruction-modelling"]}
    assert len(suites["instruction-modelling"]) == 18 and len(groups) == 6
