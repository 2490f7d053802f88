"""What lies beside exported weights: the model card, generation's end, the chat template, arguments for vLLM."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_grit.convert.hf_out.chat import jinja_of
from megatron_grit.convert.hf_out.convert import export_checkpoint
from megatron_grit.convert.hf_out.embedding import bidirectional_settings
from megatron_grit.data.chat.chat_templates import TEMPLATES
from megatron_grit.data.indexed.reader import read_meta
from tests.unit.convert.hf_out.test_convert import make_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("files"))[0]


def card_of(run: Path, target: Path) -> str:
    return (export_checkpoint(run, target) / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_the_runs_files_say(run: Path, tmp_path: Path) -> None:
    """Losses of the checkpoint's step and no later one; counts of the blend; nothing where there is no file."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    plain = card_of(copy, tmp_path / "plain")
    assert "last loss" not in plain and "- generative: gen" in plain
    assert "| steps | 3 |" in plain and "| mesh | tensor 1, pipeline 1, context 1, data 1, expert 1" in plain
    lines = [{"step": step, "loss_gen": step + 0.25, "loss_emb": 7.5, "lr": 0.1} for step in (2, 3, 4)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"embedding": {"data/emb": 24}, "generative": {"data/gen": 16}}
    (copy / "blend_counts.json").write_text(json.dumps(counts))
    told = card_of(copy, tmp_path / "told")
    assert "| last loss_gen | 3.2500 |" in told and "| last loss_emb | 7.5000 |" in told and "lr" not in told
    assert "| generative | gen | 16 |" in told and "| embedding | emb | 24 |" in told
    assert str(tmp_path) not in told and "base_model" not in told
    assert "<|user|>\\n{instruction}\\n<|embed|>\\n{text}" in told and "AutoModelForCausalLM" in told


def test_a_model_that_was_not_trained_here(tmp_path: Path) -> None:
    """Step 0: no training is told of; where it came from is."""
    run, _ = make_checkpoint(tmp_path, step=0, model={"pretrained": "mistralai/Mistral-7B-v0.1@main"})
    card = card_of(run, tmp_path / "out")
    assert "## Training" not in card and "| steps |" not in card
    assert "base_model: mistralai/Mistral-7B-v0.1\n" in card
    assert "| started from | mistralai/Mistral-7B-v0.1@main |" in card


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds no chat.json: the template is that of the data where it is still there, and said in any case."""
    run, _ = make_checkpoint(tmp_path / "run")
    (path,) = run.glob("checkpoints/*/chat.json")
    assert json.loads(path.read_text())["template"] == "gritlm"
    path.unlink()
    meta = read_meta(run.parent / "gen")
    (run.parent / "gen.json").write_text(dataclasses.replace(meta, template="zephyr").to_json())
    export_checkpoint(run, tmp_path / "there")
    assert (tmp_path / "there" / "chat_template.jinja").read_text() == jinja_of(TEMPLATES["zephyr"])
    assert "did not keep its chat template; zephyr is taken, from training data" in caplog.text
    (run.parent / "gen.json").unlink()
    export_checkpoint(run, tmp_path / "gone")
    assert (tmp_path / "gone" / "chat_template.jinja").read_text() == jinja_of(TEMPLATES["gritlm"])
    assert "did not keep its chat template; gritlm is taken, from default" in caplog.text


def test_what_changes_for_both_sides_to_be_seen() -> None:
    assert bidirectional_settings({"sliding_window": None}) == {"is_causal": False}
    assert bidirectional_settings({"sliding_window": 8}) == {"is_causal": False, "sliding_window": None}
    mixed = {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert bidirectional_settings(mixed) == {
        "is_causal": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    }
