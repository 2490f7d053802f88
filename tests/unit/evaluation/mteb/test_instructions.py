"""Which text is embedded for what."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_grit.compat import install_command
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.mteb.instructions import known_sets, load_instructions
from megatron_grit.evaluation.mteb.tasks import load_tasks, suites


def test_sides_of_tasks() -> None:
    e5 = load_instructions("e5")
    prompt = {"query": "Given a claim, find documents that refute the claim"}
    assert e5.of("ArguAna", "Retrieval", prompt, "query") == prompt["query"]
    assert e5.of("ArguAna", "Retrieval", prompt, "document") == ""
    assert e5.of("NewTask", "Retrieval", None, "document") == ""
    assert e5.of("NewTask", "Retrieval", "Find it", "document") == ""
    for side in (None, "query", "document"):
        assert e5.of("AskUbuntuDupQuestions", "Reranking", "Find duplicates", side) == "Find duplicates"
    assert e5.of("STS12", "STS", None, None) == "Retrieve semantically similar text"
    medi = load_instructions("medi2")
    assert medi.of("ArguAna", "Retrieval", prompt, "query").startswith("Represent the argument")
    assert medi.of("STS12", "STS", "published", None).startswith("Represent the sentence")
    assert load_instructions("none").of("STS12", "STS", "published", None) == ""


def test_an_example_is_appended_to_instructions_only() -> None:
    shots = load_instructions("e5", num_shots=1)
    text = shots.of("SciFact", "Retrieval", {"query": "Find evidence."}, "query")
    assert text.startswith('Find evidence. For example, "Vitamin D') and text.count("matches") == 1
    assert shots.of("SciFact", "Retrieval", {"query": "Find evidence."}, "document") == ""
    shots.check_shots(suites()["quick"])
    with pytest.raises(ConfigError, match="no example of NQ"):
        shots.check_shots(["NQ", "SciFact"])


def test_suites() -> None:
    assert len(suites()["quick"]) == 12 and len(set(suites()["english"])) == 56
    assert set(suites()["quick"]) < set(suites()["english"])
    assert known_sets() == ["e5", "medi2", "none"]


def test_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('template: "{instruction}: "\ntypes: {STS: Compare}\ntasks: {SciFact: {query: Check}}\n')
    mine = load_instructions(str(path))
    assert (mine.template, mine.of("STS12", "STS", None, None)) == ("{instruction}: ", "Compare")
    assert load_instructions(str(path), template="own").template is None
    assert mine.of("SciFact", "Retrieval", None, "query") == "Check"
    for content, message in [
        ("taks: {}", "unknown key taks"),
        ("types: {STS: 3}", "types.STS must be a text"),
        ("types: [STS]", "types must have"),
        ("tasks: {SciFact: {passage: a}}", "tasks.SciFact must be a text"),
        ("examples: {SciFact: {text: a}}", "examples.SciFact must be"),
        ("- a", "give types: and tasks:"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_instructions(str(path))


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ConfigError, match=rf"evaluate mteb needs mteb: {re.escape(install_command('eval'))}$"):
        load_tasks(["quick"], ["eng"])
