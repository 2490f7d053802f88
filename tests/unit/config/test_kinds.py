"""Which kinds a run trains, where their options are, and that each kind has its files with the same members."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from megatron_grit.config import kinds
from megatron_grit.config.parse import known_keys, parse_run_config
from megatron_grit.config.schema import RunConfig

MEMBERS = {
    "config/schema/kinds": {
        *("SECTION", "DATA", "WEIGHT", "BATCH", "MADE_BY", "LOSS", "METRICS", "EMBEDS"),
        *("problems", "plan_rows", "loss_cost"),
    },
    "data/kinds": {"STREAM", "LEAD_AND_TEXT", "make_row"},
    "training/objectives": {"OBJECTIVE"},
}


def members(path: Path) -> set[str]:
    """Names that a file defines at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


@pytest.mark.parametrize("folder", MEMBERS)
def test_every_kind_has_a_file_with_the_same_members(repository: Path, folder: str) -> None:
    for kind in kinds.kind_names():
        missing = MEMBERS[folder] - members(repository / "megatron_grit" / folder / f"{kind}.py")
        assert not missing, f"{folder}/{kind}.py has no {missing}"
    for kind in kinds.kind_names():
        assert (repository / "megatron_grit/losses" / f"{kinds.kind_options(kind).LOSS}.py").is_file()


@pytest.mark.parametrize(
    ("objective", "trained"),
    [
        ("unified", ["embedding", "generative"]),
        ("embedding", ["embedding"]),
        ("[generative, embedding]", ["embedding", "generative"]),
        ("[generative]", ["generative"]),
    ],
)
def test_the_objective_names_kinds(objective: str, trained: list[str]) -> None:
    assert kinds.trained_kinds(parse_run_config(["--training.objective", objective])) == trained


def test_every_key_of_a_kind_is_an_option() -> None:
    for kind in kinds.kind_names():
        options = kinds.kind_options(kind)
        assert {options.DATA, options.WEIGHT, options.BATCH} <= set(known_keys())
    config = parse_run_config(
        ["--data.embedding=[a]", "--loss.loss_emb_factor=0.5", "--training.embedding_batch_size=3"]
    )
    assert kinds.kind_sources(config, "embedding") == ["a"] and kinds.kind_weight(config, "embedding") == 0.5
    assert kinds.kind_batch_size(config, "embedding") == 3


def test_losses_come_before_other_metrics() -> None:
    assert kinds.metric_names(["embedding", "generative"]) == ["loss_emb", "loss_gen", "accuracy_emb"]


def test_a_section_that_is_added_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Section:
        size: int = 3

    @dataclasses.dataclass(kw_only=True)
    class Run:
        output_dir: str = dataclasses.field(default="runs", metadata={"path": True})
        lists: list[str] = dataclasses.field(default_factory=lambda: ["a"])

    monkeypatch.setattr(kinds, "RunConfig", Run)
    monkeypatch.setattr(kinds, "kind_names", lambda: ["old", "new"])
    options = {"old": type("Options", (), {"SECTION": None}), "new": type("Options", (), {"SECTION": Section})}
    monkeypatch.setattr(kinds, "kind_options", options.get)
    before = dataclasses.fields(RunConfig)
    kinds.add_sections()
    kinds.add_sections()
    first, second = Run(), Run(output_dir="b", new=Section(size=4))  # type: ignore[call-arg]
    assert dataclasses.asdict(first) == {"output_dir": "runs", "lists": ["a"], "new": {"size": 3}}
    assert first != second and first == Run() and first.lists is not Run().lists and "new=" in repr(second)
    assert dataclasses.fields(Run)[0].metadata == {"path": True}
    assert dataclasses.fields(RunConfig) == before


@pytest.mark.parametrize("objective", ["unified", "generative", ["generative", "embedding"]])
def test_the_objective_is_kept_as_it_is_given(objective: str | list[str]) -> None:
    given = objective if isinstance(objective, str) else f"[{', '.join(objective)}]"
    assert parse_run_config(["--training.objective", given]).training.objective == objective
