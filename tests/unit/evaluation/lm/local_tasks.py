"""Tasks of lm-eval on local files, one of each kind of request."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tests.corpus import sentences, write_jsonl

_MULTIPLE = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
num_fewshot: 1
fewshot_split: test
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
_ROLLING = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
_GENERATION = """task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n\\n", "zebra"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
NAMES = ("local_choice", "local_text", "local_answers")


def write_tasks(folder: Path, count: int = 12) -> Path:
    """A folder for ``include_path``: ``local_choice`` has choices of one token and of several, and one of them is
    empty of context; ``local_text`` a text longer than the model reads; ``local_answers`` is generated."""
    folder.mkdir(parents=True)
    pairs = sentences(count, seed=3)
    records: list[dict[str, object]] = []
    for number, (question, answer) in enumerate(pairs):
        others = [pairs[(number + step) % count][1] for step in (1, 2)]
        choices = ["a", "b", "c"] if number % 3 == 0 else [answer, *others]
        records.append({"question": question, "choices": choices, "label": number % 3})
    texts: list[dict[str, object]] = [
        {"text": " ".join(answer for _, answer in pairs[i : i + 1 + i])} for i in range(5)
    ]
    for name, template, held in (
        ("choice", _MULTIPLE, records),
        ("text", _ROLLING, texts),
        ("answers", _GENERATION, records),
    ):
        file = write_jsonl(folder / f"{name}.jsonl", held)
        (folder / f"{name}.yaml").write_text(template.format(file=file))
    return folder


@cache
def load_tasks(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """As the harness takes them."""
    from megatron_grit.evaluation.lm.tasks import Part, TaskLoader

    tasks = {task.task_name: task for task in TaskLoader([folder]).load(Part(name="", tasks=names))}
    for task in tasks.values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    return tasks


def responses(lm: Any, folder: Path, chat: bool = False, names: tuple[str, ...] = NAMES) -> dict[str, list[Any]]:
    """What a model of lm-eval's answers to each request of the tasks, and their figures."""
    from lm_eval.evaluator import evaluate

    tasks = load_tasks(folder, names)
    for task in tasks.values():
        task.set_fewshot_seed(1234)  # examples are drawn anew
    told = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "bootstrap_iters": 0}
    results: Any = evaluate(lm, {"tasks": tasks}, **told)
    found = {
        task: [answer for sample in samples for of_request in sample["resps"] for answer in of_request]
        for task, samples in results["samples"].items()
    }
    figures = [
        value
        for task in names
        for name, value in sorted(results["results"][task].items())
        if "," in name and isinstance(value, float)
    ]
    return found | {"figures": figures}


def distance(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> float:
    """The largest difference of two numbers, infinite where a text or a flag is another one."""

    def numbers(value: Any) -> list[Any]:
        return [each for part in value for each in numbers(part)] if isinstance(value, list | tuple) else [value]

    pairs = list(zip(numbers(list(one.values())), numbers(list(other.values())), strict=True))
    assert pairs and one.keys() == other.keys()
    return max(
        abs(a - b) / max(1.0, abs(b)) if isinstance(b, float) else 0.0 if a == b else float("inf") for a, b in pairs
    )
