"""Three rows of each published data set, in its own form, and what the table makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Turns = list[list[str]]

_FIELDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say {hi}.", "input": "", "output": "hi"},
    {"instruction": "Name a fox.", "input": " ", "output": "Reynard"},
]
_FIELD_TURNS: list[Turns] = [["Add.\n\n1 and 2", "3"], ["Say {hi}.", "hi"], ["Name a fox.", "Reynard"]]  # type: ignore[list-item]
_INPUTS = [
    {"inputs": "Why?", "targets": "So."},
    {"inputs": "Answer:", "targets": "yes"},
    {"inputs": "done\n", "targets": "no"},
]
_INPUT_TURNS: list[Any] = [["Why?\n", "So."], ["Answer:", "yes"], ["done\n", "no"]]


def _said(*turns: tuple[str, str], **more: object) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def _message(name: str, text: str, replies: list[Any], quality: float | None = None, **more: object) -> dict[str, Any]:
    labels = {} if quality is None else {"labels": {"quality": {"value": quality, "count": 1}}}
    role = "prompter" if name.startswith("p") else "assistant"
    return {"message_id": name, "role": role, "text": text, "replies": replies, **labels, **more}


_TREES = [
    _message(
        "p1",
        "q",
        [
            _message("a1", "fair", [_message("p2", "more", [_message("a3", "deep", [])])], 0.5),
            _message("a2", "good", [], 0.9),
            _message("a4", "gone", [_message("p5", "x", [_message("a6", "y", [])])], 1.0, deleted=True),
        ],
    ),
    _message("p1", "alone", []),
    _message("p1", "r", [_message("a1", "first", []), _message("a2", "second", [])]),
]
_TASKS = {
    name: {
        "Definition": [f"Do {name}."],
        "Positive Examples": [{"input": f"e{k}", "output": f"f{k}", "explanation": ""} for k in range(3)],
        "Instances": [{"id": f"{name}-{k}", "input": f"i{k}", "output": [f"o{k}", "other"]} for k in range(3)],
    }
    for name in ("task001", "task002_mmmlu_x", "task003")
}

RAW: dict[str, dict[str, list[Any] | dict[str, Any]]] = {
    "cot": {"cot_zsopt.jsonl": _INPUTS, "cot_fsopt.jsonl": _INPUTS},
    "flan_v2": {"tulu_v2_resampled_flan_50k.jsonl": _INPUTS},
    "dolly": {
        "databricks-dolly-15k.jsonl": [
            {"instruction": row["instruction"], "context": row["input"], "response": row["output"], "category": "c"}
            for row in _FIELDS
        ]
    },
    "self_instruct": {"all_instances_82K.jsonl": _FIELDS},
    "unnatural_instructions": {
        "core_data.jsonl": [
            {
                "instruction": "Add.",
                "constraints": "Only a number.",
                "instances": [{"input": "1 and 2", "output": "3"}, {"input": "2 and 2", "output": "4"}],
            },
            {"instruction": "Say it.", "instances": [{"input": "hi", "constraints": "None.", "output": "hi"}]},
            {"instruction": "Name it.", "instances": []},
        ]
    },
    "stanford_alpaca": {"alpaca_data.json": _FIELDS},
    "code_alpaca": {"code_alpaca_20k.json": _FIELDS},
    "gpt4_alpaca": {"alpaca_gpt4_data.json": _FIELDS, "alpaca_gpt4_data_zh.json": _FIELDS},
    "sharegpt": {
        "sharegpt_html_cleaned_and_split_4096.json": [
            _said(("human", "a"), ("gpt", "b"), ("user", "c"), ("chatgpt", "d"), ("human", "e"), id="x"),
            _said(("human", "a"), ("bing", "b"), id="y"),
            _said(("gpt", "a"), ("human", "b"), ("gpt", "c"), id="z"),
        ]
    },
    "baize": {
        f"{name}_chat_data.json": [
            {
                "topic": "t",
                "input": "The two talk.\n[|Human|] hello\n[|AI|] hi\n[|Human|] bye\n[|AI|] so long\n[|Human|] ",
            },
            {"topic": "t", "input": "The two talk.\n[|Human|] a [|AI|] b"},
            {"topic": "t", "input": "nobody talks"},
        ]
        for name in ("alpaca", "medical", "quora", "stackoverflow")
    },
    "oasst1": {"2023-04-12_oasst_ready.trees.jsonl": [{"message_tree_id": "t", "prompt": tree} for tree in _TREES]},
    "lima": {
        "train.jsonl": [
            {"conversations": ["q", "a"], "source": "s"},
            {"conversations": ["q", "a", "r"], "source": "s"},
            {"conversations": ["q", "a", "r", "b"], "source": "multi_turn"},
        ]
    },
    "wizardlm": {
        "WizardLM_evol_instruct_V2_143k.json": [
            _said(("human", f"q{k}"), ("gpt", f"a{k}"), idx=f"K{k}") for k in range(3)
        ]
    },
    "open_orca": {
        "1M-GPT4-Augmented.jsonl": [
            {"id": "n", "system_prompt": "s", "question": "q", "response": "a"},
            {"id": "n", "system_prompt": "", "question": "r", "response": "b"},
            {"id": "n", "system_prompt": "s", "question": "t", "response": " "},
        ]
    },
    "hard_coded": {"hard_coded_examples.jsonl": [{"Prompt": f"who {k}", "Output": f"me {k}"} for k in range(3)]},
    "science": {
        "science_train.jsonl": [
            {"dataset": name, "input": f"q {name}", "output": "a"}
            for name in ("evidence_inference", "scifact_json", "scierc_ner")
        ]
    },
    "alpagasus_alpaca_5k": {"claude_t45.json": _FIELDS},
    "alpagasus_dolly_9k": {"chatgpt_9k.json": _FIELDS},
    "alpagasus_dolly_3k": {"dolly_3k.json": _FIELDS},
}

EXPECTED: dict[str, list[Any]] = {
    "cot": _INPUT_TURNS * 2,
    "flan_v2": _INPUT_TURNS,
    "unnatural_instructions": [
        ["Add.\nOnly a number.\n\n1 and 2", "3"],
        ["Add.\nOnly a number.\n\n2 and 2", "4"],
        ["Say it.\n\nhi", "hi"],
    ],
    "sharegpt": [["a", "b", "c", "d"]],
    "baize": [["hello", "hi", "bye", "so long"], ["a", "b"]] * 4,
    "oasst1": [["q", "fair", "more", "deep"], ["q", "good"], ["r", "first"], ["r", "second"]],
    "lima": [["q", "a"], ["q", "a"], ["q", "a", "r", "b"]],
    "wizardlm": [["q0", "a0"], ["q1", "a1"], ["q2", "a2"]],
    "open_orca": [["[s]", "q", "a"], ["r", "b"]],
    "hard_coded": [["who 0", "me 0"], ["who 1", "me 1"], ["who 2", "me 2"]],
    "science": [["q evidence_inference", "a"], ["q scifact_json", "a"], ["q scierc_ner", "a"]],
    "super_ni": [[f"Do {name}.\n\ni{k}", f"o{k}"] for name in ("task001", "task003") for k in range(3)],
}
"""Turns of each record; a system message in brackets. Sources that are not here have instructions, inputs, outputs."""
for _name in RAW:
    EXPECTED.setdefault(_name, _FIELD_TURNS)


def write_raw(folder: Path, source: str) -> Path:
    """The raw files of a source in a folder of its name."""
    folder /= source
    folder.mkdir(parents=True, exist_ok=True)
    if source == "super_ni":
        (folder / "splits" / "xlingual").mkdir(parents=True)
        (folder / "tasks").mkdir()
        (folder / "splits" / "xlingual" / "train_tasks.txt").write_text("".join(f"{name}\n" for name in _TASKS))
        for name, task in _TASKS.items():
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(task, indent=1))
        return folder
    for name, rows in RAW[source].items():
        lines = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith(".jsonl") else json.dumps(rows)
        (folder / name).write_text(lines)
    return folder


def turns_of(record: dict[str, Any]) -> list[str]:
    """As in :data:`EXPECTED`; a role in another place than its own is shown."""
    shown, expected = [], "user"
    for message in record["messages"]:
        role, text = message["role"], message["content"]
        if role == "system" and not shown:
            shown.append(f"[{text}]")
            continue
        shown.append(text if role == expected else f"{role}: {text}")
        expected = "assistant" if expected == "user" else "user"
    return shown
