"""A cache of a teacher: what is in it, how training reads it, how near it is to the whole teacher, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_grit.cli.teacher_logits import main
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.top_probabilities import TopProbabilities
from megatron_grit.data.rows.held_out import HeldOutLoader
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.inference import teacher_logits
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.score import scoring_row
from megatron_grit.inference.teacher_logits import write_teacher_logits
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.store.rows import RowFile
from megatron_grit.training.optimizer import wrap_model
from megatron_grit.training.step import TrainStep
from megatron_grit.training.teacher.model import TeacherCache, TeacherModel

TOP_K, TEMPERATURE = 6, 2.0


@pytest.fixture(scope="module")
def teacher(trained_run: RunConfig) -> GritModel:
    return GritModel.load(trained_run.output_dir, device="cpu")


@pytest.fixture(scope="module")
def write(trained_run: RunConfig, teacher: GritModel) -> Callable[..., None]:
    """Writes a cache by the loaded model."""

    def write(folder: Path, top_k: int = TOP_K, temperature: float = TEMPERATURE, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GritModel, "load", lambda *_, **__: teacher)
            files = options.pop("files", trained_run.data.generative)
            write_teacher_logits(
                trained_run.output_dir, files, folder, top_k=top_k, temperature=temperature, batch_tokens=300, **options
            )

    return write


@pytest.fixture(scope="module")
def cache(write: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


def taught_run(run: RunConfig, folder: Path, **knobs: Any) -> RunConfig:
    config = copy.deepcopy(run)
    config.training.objective = "generative"  # type: ignore[assignment]
    settings = {"kind": "topk", "cache": str(folder), "temperature": TEMPERATURE, "label_weight": 0.0} | knobs
    config.loss.teacher = TeacherConfig(**settings)
    return config


def test_the_cache_holds_what_torch_says_of_each_record_alone(
    trained_run: RunConfig, teacher: GritModel, cache: Path
) -> None:
    records = IndexedRecords(trained_run.data.generative[0])
    held = TopProbabilities(cache, records)
    for number in (0, 1, len(records) // 2, len(records) - 1):
        tokens = records.tokens(number)
        row = scoring_row([(tokens, np.ones(len(tokens), dtype=bool))])
        with torch.no_grad():
            logits = teacher.model(row.to(teacher.model.context.device), Output.LOGITS)
        p = (logits.double() / TEMPERATURE).softmax(1)
        ids, log_probs = held.read(number, len(tokens))
        best = p.topk(TOP_K, dim=1)
        assert (ids[-1] == -1).all() and np.isneginf(log_probs[-1]).all(), "nothing follows"
        np.testing.assert_allclose(np.exp(log_probs[:-1, :TOP_K]), best.values[:-1], rtol=1e-5)
        np.testing.assert_allclose(p[:-1].gather(1, torch.from_numpy(ids[:-1]).long()), best.values[:-1], rtol=1e-5)
        np.testing.assert_allclose(np.exp(log_probs[:-1, -1]), 1 - best.values[:-1].sum(1), rtol=1e-4)


def test_training_with_the_cache_is_training_with_the_teacher(
    trained_run: RunConfig, teacher: GritModel, write: Callable[..., None], tmp_path: Path
) -> None:
    """Never above the divergence over the whole vocabulary, nearer to it with more tokens, equal with all; packed."""
    context, vocab_size = teacher.model.context, teacher.model.num_tokens_in_vocab
    found: dict[str, tuple[float, torch.Tensor]] = {}
    for size in (2, 40, vocab_size, 0):
        if size:
            write(tmp_path / str(size), top_k=size)
        config = taught_run(trained_run, tmp_path / str(size))
        if not size:
            config.loss.teacher = TeacherConfig(kind="full", model="x", temperature=TEMPERATURE, label_weight=0.0)
        model = build_model(config, vocab_size, context)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        loader = GritDataLoader(config, teacher.tokenizer)
        batch = loader.batch(0)
        assert any(len(row.record_ids) > 1 for row in batch.rows)
        knobs = config.loss.teacher
        teaches = TeacherCache(knobs, context) if size else TeacherModel(knobs, context, [teacher.model])
        metrics = TrainStep(config, context, wrap_model(model), None, teaches).accumulate_gradients(batch)
        gradient = torch.cat([p.main_grad.flatten() for p in model.parameters()])
        found[str(size)] = metrics["loss_teacher"], gradient
    whole, gradient = found.pop("0")
    few, more, every = (found[str(size)][0] for size in (2, 40, vocab_size))
    assert 0 < few < more < every == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found[str(vocab_size)][1], gradient, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["2"][1], gradient, rtol=1e-2, atol=1e-4)


def test_the_verb_writes_the_same(
    trained_run: RunConfig,
    teacher: GritModel,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(GritModel, "load", lambda *_, **__: teacher)
    given = ["--checkpoint", trained_run.output_dir, "--input", *trained_run.data.generative, "--output", str(tmp_path)]
    numbers = ["--top-k", str(TOP_K), "--temperature", str(TEMPERATURE), "--batch-tokens", "300"]
    assert main([*given, *numbers]) == 0
    for path in cache.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert "loss.teacher.temperature 2" in capsys.readouterr().out


def test_held_out_texts_are_not_taught(trained_run: RunConfig, teacher: GritModel, cache: Path) -> None:
    config = taught_run(trained_run, cache)
    (row, *_) = GritDataLoader(config, teacher.tokenizer).batch(0).rows
    assert row.teacher_ids_TK is not None
    config.data.valid = trained_run.data.generative
    (row, *_) = HeldOutLoader(config, teacher.tokenizer).batch(0).rows
    assert row.teacher_ids_TK is None


def test_a_killed_run_resumes(
    write: Callable[..., None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = RowFile.append, []

    def fail_later(self: RowFile, rows: np.ndarray) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, rows)

    monkeypatch.setattr(RowFile, "append", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.json"))
    first = len(calls)
    write(tmp_path)
    for path in cache.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.setattr(RowFile, "append", append)
    asked: list[int] = []
    monkeypatch.setattr(teacher_logits, "top_probabilities", lambda *_: asked.append(1))
    write(tmp_path)
    assert not asked and first == 3, "what is there stays"


def test_a_cache_that_does_not_fit_is_refused(
    trained_run: RunConfig, teacher: GritModel, write: Callable[..., None], cache: Path, tmp_path: Path
) -> None:
    prefix = trained_run.data.generative[0]

    def refused(folder: Path, **knobs: Any) -> GritError:
        with pytest.raises(GritError) as caught:
            GritDataLoader(taught_run(trained_run, folder, **knobs), teacher.tokenizer)
        return caught.value

    missing = refused(tmp_path)
    assert isinstance(missing, ConfigError) and prefix in str(missing) and str(tmp_path) in str(missing)
    assert "temperature 2, and loss.teacher.temperature is 1" in str(refused(cache, temperature=1.0))
    for path in cache.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = tmp_path / f"{Path(prefix).name}.json"
    facts = json.loads(described.read_text())
    facts["data"]["bin_sha256"] = "0" * 64
    described.write_text(json.dumps(facts))
    foreign = str(refused(tmp_path))
    assert prefix in foreign and str(described) in foreign and "bin_sha256" in foreign
    facts = json.loads((cache / described.name).read_text())
    described.write_text(json.dumps(facts | {"vocab_size": 10_000}))
    assert "set model.vocab_size to 10000" in str(refused(tmp_path))
    described.write_text(json.dumps(facts))
    array = described.with_suffix(".npy")
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    assert isinstance(refused(tmp_path), DataError)
    with pytest.raises(ConfigError, match="more than the"):
        write(tmp_path / "x", top_k=100_000)
    with pytest.raises(ConfigError, match="one name"):
        write(tmp_path / "x", files=[prefix, prefix])
    with pytest.raises(DataError, match="a teacher reads generative ones"):
        write(tmp_path / "x", files=trained_run.data.embedding)


def test_a_teacher_that_reads_neighbors_is_refused(
    teacher: GritModel, write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache would be of the model without them."""
    monkeypatch.setattr(teacher.config.model.retro, "num_neighbors", 2)
    with pytest.raises(ConfigError, match="reads neighbors, which a cache of it would not have read"):
        write(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
