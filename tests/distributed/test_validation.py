"""Loss on held-out texts: the mean over all their tokens, on any mesh, and training does not notice."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.builders.grit_builder import build_grit
from tests.corpus import sentences, tiny_run, write_jsonl
from tests.distributed.test_resume import metrics, train_and_describe
from tests.harness.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_overlap": {"overlap": True},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
}
SIZES = {"a": 37, "b": 11}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with dropout, and two held-out files."""
    folder = tmp_path_factory.mktemp("validation")
    config = tiny_run(folder, layers=4)
    for seed, (name, size) in enumerate(SIZES.items(), 5):
        texts = [{"text": list(pair)} for pair in sentences(size, seed)]
        build_grit([write_jsonl(folder / f"{name}.jsonl", texts)], folder / name, folder / "tokenizer.model")
    config.data.over_long, config.data.tokens_per_row = "split", 48
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.training.steps, config.training.audit, config.training.objective = 4, "off", "generative"
    config.parallel = ParallelConfig(device="cpu")
    return config


def validated(config: RunConfig, folder: Path, **training: Any) -> RunConfig:
    config = copy.deepcopy(config)
    config.data.valid = [str(Path(config.data.tokenizer or "").parent / name) for name in SIZES]
    config.output_dir = str(folder)
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def plain_losses(config: RunConfig, name: str) -> list[float]:
    """Cross-entropy of each predicted token of a file, a record at a time through the saved model, from its logits."""
    import torch

    from megatron_grit.data.indexed.records import IndexedRecords
    from megatron_grit.data.indexed.roles import Role, supervised
    from megatron_grit.data.rows.batch import PackedRow
    from megatron_grit.data.text.tokenizer import load_tokenizer
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, resolve_checkpoint

    found = []
    with parallel_job(config.parallel, 1) as context, torch.no_grad():
        model = build_model(config, load_tokenizer(config.data.tokenizer or "").vocab_size, context).eval()
        load_weights(resolve_checkpoint(config.output_dir), [model], context)
        source = IndexedRecords(name)
        for record in range(len(source)):
            roles, lengths = source.spans(record)
            of_tokens = [role for role, length in zip(roles, lengths, strict=True) for _ in range(length)]
            whole = torch.from_numpy(source.tokens(record, 0, len(of_tokens)).astype(np.int64))
            step = config.data.tokens_per_row - 1
            for start in range(0, max(1, len(whole) - 1), step):  # pieces overlap by a token
                tokens, size = whole[start : start + step + 1], len(whole[start : start + step + 1])
                row = PackedRow(
                    embeds=False,
                    tokens_1T=tokens[None],
                    positions_1T=torch.arange(size)[None],
                    cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
                    max_seqlen=size,
                    padding_mask_1T=torch.zeros(1, size, dtype=torch.bool),
                )
                losses = torch.nn.functional.cross_entropy(
                    model(row, Output.LOGITS)[:-1].float(), tokens[1:], reduction="none"
                )
                counted = [supervised(Role(role)) for role in of_tokens[start + 1 : start + size]]
                found += losses[torch.tensor(counted)].tolist()
    return found


def train_both(config_path: str, folder: str) -> dict[str, Any]:
    config = load_config(config_path)
    plain = copy.deepcopy(config)
    plain.output_dir = f"{folder}/plain"
    found: dict[str, Any] = {"plain": train_and_describe(plain) | {"metrics": metrics(plain.output_dir)}}
    measured = validated(config, Path(folder) / "measured", valid_interval=2)
    found["measured"] = train_and_describe(measured) | {"metrics": metrics(measured.output_dir)}
    found["losses"] = {
        name: plain_losses(measured, path) for name, path in zip(SIZES, measured.data.valid, strict=True)
    }
    return found


@pytest.fixture(scope="module")
def found(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    save_config(run, folder / "run.yaml")
    (result,) = run_on_ranks(train_both, 1, tmp_path_factory.mktemp("results"), str(folder / "run.yaml"), str(folder))
    return result | {"folder": str(folder)}


def test_training_does_not_notice(found: dict[str, Any]) -> None:
    plain, measured = found["plain"], found["measured"]
    assert plain["digests"] == measured["digests"] and plain["records"] == measured["records"]
    without = [{key: value for key, value in line.items() if "valid" not in key} for line in measured["metrics"]]
    assert without == plain["metrics"]
    assert ["valid_loss" in line for line in measured["metrics"]] == [False, True, False, True]


def test_it_is_the_mean_of_all_tokens(found: dict[str, Any]) -> None:
    line, losses = found["measured"]["metrics"][-1], found["losses"]
    for key, own in {"/a": losses["a"], "/b": losses["b"], "": losses["a"] + losses["b"]}.items():
        assert line[f"valid_tokens{key}"] == len(own) > 0
        assert line[f"valid_loss{key}"] == pytest.approx(np.mean(own), abs=2e-6)
        assert line[f"valid_perplexity{key}"] == pytest.approx(math.exp(np.mean(own)), rel=1e-5)
    # A mean over files, or rows, would be another number.
    assert abs(np.mean([np.mean(own) for own in losses.values()]) - line["valid_loss"]) > 1e-4


def measure_alone(config_path: str) -> None:
    from megatron_grit.training.trainer import train

    train(load_config(config_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alone_and_on_any_mesh(run: RunConfig, found: dict[str, Any], tmp_path: Path, layout: str) -> None:
    config = validated(run, tmp_path / "alone", skip_train=True)
    config.checkpoint.load = f"{found['folder']}/measured"
    config.parallel = ParallelConfig(device="cpu", **LAYOUTS[layout])
    save_config(config, tmp_path / "run.yaml")
    run_on_ranks(measure_alone, 2, tmp_path, str(tmp_path / "run.yaml"))
    figures = {key: value for key, value in found["measured"]["metrics"][-1].items() if key.startswith("valid_")}
    result = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text())
    assert result == {"step": 0} | {key: pytest.approx(value, rel=2e-6) for key, value in figures.items()}
    assert not {"checkpoints", "config.yaml"} & {path.name for path in (tmp_path / "alone").iterdir()}
