"""Memory of a teacher: against the tensors that a step holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.config.workload import LOGITS_AT_ONCE, TextLengths
from megatron_grit.planning.memory import Workload, estimate_memory
from megatron_grit.planning.operations import count_flops

VOCAB = 400


def memory(config: RunConfig, **knobs: Any) -> tuple[dict[str, int], int]:
    config = copy.deepcopy(config)
    config.training.objective = "generative"  # type: ignore[assignment]
    config.loss.teacher = TeacherConfig(**knobs)
    workload = Workload.of_config(config, 1, TextLengths())
    found = estimate_memory(config, 1, VOCAB, workload, "cpu")
    return found.kinds, found.moments["logits of a generative row"]


def test_weights_and_states_of_a_checkpoint(trained_run: RunConfig) -> None:
    from megatron_grit.inference.model import GritModel

    kinds, moment = memory(trained_run)
    assert kinds["teacher"] == 0
    model = GritModel.load(trained_run.output_dir, device="cpu").model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config = copy.deepcopy(trained_run)
    config.model.hidden_size, config.model.ffn_hidden_size = 32, 64  # the teacher is the wider
    config.training.objective = "generative"  # type: ignore[assignment]
    (rows,) = Workload.of_config(config, 1, TextLengths()).kinds
    states = rows.rows * rows.row_tokens * trained_run.model.hidden_size * 4
    full, full_moment = memory(config, kind="full", model=trained_run.output_dir)
    assert full["teacher"] == weights + states
    plain, plain_moment = memory(config)
    matrix = rows.row_labels * VOCAB * 4
    assert matrix < 4 * LOGITS_AT_ONCE
    assert full_moment - plain_moment == weights + states + 8 * matrix
    assert full["logits"] - plain["logits"] == 8 * matrix
    gold, _ = memory(config, kind="gold", model=trained_run.output_dir)
    assert gold["teacher"] == weights + rows.rows * rows.row_tokens * 4


def test_operations_of_a_teacher_are_those_of_a_forward_pass(trained_run: RunConfig) -> None:
    """A third of the trained model's, where it is the same shape."""
    found = []
    for knobs in (TeacherConfig(), TeacherConfig(kind="gold", model=trained_run.output_dir)):
        config = copy.deepcopy(trained_run)
        config.training.objective, config.loss.teacher = "generative", knobs  # type: ignore[assignment]
        found.append(count_flops(config, 1, VOCAB, Workload.of_config(config, 1, TextLengths())))
    plain, taught = found
    assert "teacher" not in plain.passes
    assert taught.passes["teacher"] == pytest.approx(plain.total / 3)
    assert taught.total == pytest.approx(4 / 3 * plain.total)


def test_base_and_cache_take_no_weights(trained_run: RunConfig) -> None:
    plain, _ = memory(trained_run)
    top, _ = memory(trained_run, kind="topk", cache="x")
    assert top["teacher"] == 0 < top["logits"] - plain["logits"]
    base, _ = memory(trained_run, kind="full")
    assert 0 < base["teacher"] < plain["weights"] + plain["optimizer"]
    assert base["logits"] > top["logits"]


def test_a_hugging_face_folder_takes_what_its_files_do(trained_run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    one, _ = memory(trained_run, kind="gold", model=str(tmp_path))
    (tmp_path / "other.safetensors").write_bytes(b"0" * 500)
    two, _ = memory(trained_run, kind="gold", model=str(tmp_path))
    assert two["teacher"] - one["teacher"] == pytest.approx(1000)  # two bytes in the file, four here
