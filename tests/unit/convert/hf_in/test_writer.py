"""Streaming conversion: the files are those of a model that was saved as a whole, and survive being killed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.families import gptj, mistral, mixtral
from megatron_grit.convert.families.registry import hf_state_dict_to_megatron, load_hf_config
from megatron_grit.convert.hf_in import writer
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_in.reader import SafetensorsFolder
from megatron_grit.convert.param_map import Family
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.errors import CheckpointError, OutputError
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.lock import locked_folder
from megatron_grit.training.checkpoint import load_weights, read_config, read_state
from megatron_grit.training.checkpoint_save import save_checkpoint
from tests.unit.convert.hf_in.test_reader import stack_experts, write_shards
from tests.unit.convert.test_param_map import DENSE, GPT, MIXTURE, random_hf

NUM_TOKENS = 300
PARTIAL = "step_00000000.partial"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"word{number} number {number * 7} of many" for number in range(300)]
    return train_sentencepiece(words, tmp_path_factory.mktemp("tokenizer") / "tiny", NUM_TOKENS)


def write_source(directory: Path, family: Family, model: ModelConfig, tensors: dict[str, Tensor] | None = None) -> Path:
    write_shards(directory, random_hf(family, model) if tensors is None else tensors)
    (directory / "config.json").write_text(json.dumps(family.hf_config(model)))
    return directory


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    config = read_config(checkpoint)
    config.parallel.device = "cpu"
    with parallel_job(config.parallel, 3) as context:
        model = build_model(config, int(read_state(checkpoint)["vocab_size"]), context)
        load_weights(checkpoint, model, context)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


MODELS = {
    "mistral": (mistral.FAMILY, replace(DENSE, vocab_size=NUM_TOKENS)),
    "mistral_tied": (mistral.FAMILY, replace(DENSE, tie_embeddings=True, vocab_size=NUM_TOKENS)),
    "mixtral": (mixtral.FAMILY, replace(MIXTURE, vocab_size=NUM_TOKENS)),
    "gptj": (
        gptj.FAMILY,
        replace(
            GPT,
            vocab_size=NUM_TOKENS,
            parallel_residual="one_norm",
            rotary_interleaved=True,
            rotary_percent=0.5,
            add_output_bias=True,
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_model_that_is_saved_as_a_whole(tmp_path: Path, tokenizer: Path, name: str) -> None:
    family, model = MODELS[name]
    dtype = torch.float32 if name == "mistral" else torch.bfloat16
    tensors = {key: tensor.to(dtype) for key, tensor in random_hf(family, model).items()}
    source = write_source(tmp_path / "hf", family, model, tensors)
    streamed = convert_checkpoint(source, tmp_path / "out", tokenizer)

    config = RunConfig(output_dir=str(tmp_path / "out"), model=load_hf_config(source))
    config.data.tokenizer, config.parallel.device = str(tokenizer), "cpu"
    config.training.precision = "bf16" if dtype is torch.bfloat16 else "fp32"
    streamed = streamed.rename(tmp_path / "streamed")
    with parallel_job(config.parallel, config.training.seed) as context, torch.no_grad():
        whole = build_model(config, NUM_TOKENS, context)
        expected = hf_state_dict_to_megatron(tensors, config.model)
        for key, parameter in whole.named_parameters():
            assert parameter.dtype is dtype
            parameter.copy_(expected[key])
        saved = save_checkpoint(config, context, whole, None, load_tokenizer(tokenizer), step=0)
    names = {file.name for file in saved.rglob("*") if file.is_file() and file.suffix != ".distcp"}
    assert names == {file.name for file in streamed.rglob("*") if file.is_file() and file.suffix != ".distcp"}
    for file in ("config.yaml", "tokenizer.model"):
        assert (saved / file).read_bytes() == (streamed / file).read_bytes()
    assert read_state(saved) == read_state(streamed)
    ours, theirs = (FileSystemReader(path / "weights").read_metadata() for path in (streamed, saved))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    found, expected = weights_of(streamed), weights_of(saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_stacked_experts(tmp_path: Path, tokenizer: Path) -> None:
    family, model = MODELS["mixtral"]
    tensors = random_hf(family, model)
    single = convert_checkpoint(write_source(tmp_path / "a", family, model, tensors), tmp_path / "one", tokenizer)
    tensors = stack_experts(tensors, model.num_layers, model.num_experts or 0)
    stacked = convert_checkpoint(write_source(tmp_path / "b", family, model, tensors), tmp_path / "two", tokenizer)
    expected, found = weights_of(single), weights_of(stacked)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_are_cut_at_the_sources_and_at_a_size(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = MODELS["mixtral"]
    tensors = random_hf(family, model)
    source = write_source(tmp_path / "hf", family, model, tensors)
    first = convert_checkpoint(source, tmp_path / "first", tokenizer)
    assert len(list(first.rglob("*.distcp"))) == 2  # as many as the source has
    monkeypatch.setattr(writer, "MAX_FILE_BYTES", 8_000)
    second = convert_checkpoint(source, tmp_path / "second", tokenizer)
    sizes = [file.stat().st_size for file in second.rglob("*.distcp")]
    assert len(sizes) > 5
    expected, found = weights_of(first), weights_of(second)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_more_than_a_tensor_is_in_memory(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the experts that share a tensor are read together."""
    family, model = MODELS["mixtral"]
    tensors = stack_experts(random_hf(family, model), model.num_layers, model.num_experts or 0)
    source = write_source(tmp_path / "hf", family, model, tensors)
    largest, original = 0, SafetensorsFolder.read

    def counted(self: SafetensorsFolder, name: str, slices: tuple[slice, ...]) -> Tensor:
        nonlocal largest
        part = original(self, name, slices)
        if "experts" in name:
            largest = max(largest, part.numel())
        return part

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    convert_checkpoint(source, tmp_path / "out", tokenizer)
    assert largest == model.ffn_hidden_size * model.hidden_size  # gate and up projection are read one after the other


def test_second_conversion_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = write_source(tmp_path / "hf", *MODELS["mistral"])
    convert_checkpoint(source, tmp_path / "out", tokenizer)
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        convert_checkpoint(source, tmp_path / "out", tokenizer)


def test_tokenizer_with_more_tokens(tmp_path: Path, tokenizer: Path) -> None:
    family, model = MODELS["mistral"]
    source = write_source(tmp_path / "hf", family, replace(model, vocab_size=280))
    with pytest.raises(CheckpointError, match=r"has 300 tokens, the model 280.*model\.vocab_size 300"):
        convert_checkpoint(source, tmp_path / "out", tokenizer)
    with pytest.raises(CheckpointError, match=r"has 280 tokens; model\.vocab_size 270 would cut some off"):
        convert_checkpoint(source, tmp_path / "out", tokenizer, vocab_size=270)
    assert not (tmp_path / "out").exists()


def test_added_tokens_start_at_the_mean(tmp_path: Path, tokenizer: Path) -> None:
    family, model = MODELS["gptj"]
    tensors = random_hf(family, replace(model, vocab_size=280))
    source = write_source(tmp_path / "hf", family, replace(model, vocab_size=280), tensors)
    checkpoint = convert_checkpoint(source, tmp_path / "out", tokenizer, vocab_size=300)
    assert read_state(checkpoint)["vocab_size"] == read_config(checkpoint).model.vocab_size == 300
    weights = weights_of(checkpoint)
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "transformer.wte.weight"),
        ("output_layer.weight", "lm_head.weight"),
        ("output_layer.bias", "lm_head.bias"),
    ):
        rows, old = weights[ours], tensors[theirs]
        assert len(rows) == 320
        assert torch.equal(rows[:280], old)
        torch.testing.assert_close(rows[280:300], old.mean(0).expand(rows[280:300].shape))
        assert not rows[300:].any()
    exported = dict(family.to_hf(weights, read_config(checkpoint).model))
    assert len(exported["lm_head.weight"]) == 300


def test_what_keeps_a_conversion_from_writing_is_one_line(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "hf", *MODELS["gptj"])
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="link: is the model that is read; give another directory to write"):
        convert_checkpoint(source, tmp_path / "link", tokenizer)
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(OutputError, match="out: another process is writing it"),
    ):
        convert_checkpoint(source, tmp_path / "out", tokenizer)

    def full(request: Any, bucket: Any, number: int) -> list[Any]:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 320 vs 214\nframe #0")

    with monkeypatch.context() as patch:  # what torch says of a full disk
        patch.setattr(writer.compat, "write_sharded_file", full)
        with pytest.raises(OutputError, match=r"__0_0\.distcp: cannot be written \(\[enforce fail .* vs 214\)"):
            convert_checkpoint(source, tmp_path / "out", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match="step_00000000: needs [0-9,]+ more bytes and 1,000 are free"):
            convert_checkpoint(source, tmp_path / "out", tokenizer)
    assert convert_checkpoint(source, tmp_path / "out", tokenizer).is_dir()


def test_full_disk_is_told_and_the_next_start_goes_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "hf", *MODELS["mixtral"])
    monkeypatch.setattr(writer, "MAX_FILE_BYTES", 8_000)
    write, written = writer.compat.write_sharded_file, []

    def full(request: Any, bucket: Any, number: int) -> list[Any]:
        if number == 3:
            raise OSError(28, "No space left on device", bucket[0])
        written.append(number)
        return write(request, bucket, number)

    monkeypatch.setattr(writer.compat, "write_sharded_file", full)
    with pytest.raises(OutputError, match=r"__0_3\.distcp: cannot be written \(No space left on device\)"):
        convert_checkpoint(source, tmp_path / "out", tokenizer)
    assert written == [0, 1, 2]
    assert not list((tmp_path / "out" / "checkpoints").glob("step_00000000"))

    def counted(request: Any, bucket: Any, number: int) -> list[Any]:
        written.append(number)
        return write(request, bucket, number)

    monkeypatch.setattr(writer.compat, "write_sharded_file", counted)
    checkpoint = convert_checkpoint(source, tmp_path / "out", tokenizer)
    assert written == list(range(len(list(checkpoint.rglob("*.distcp")))))


BIG = ModelConfig(
    num_layers=6,
    hidden_size=128,
    ffn_hidden_size=448,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=NUM_TOKENS,
    num_experts=4,
)


def convert_in_child(source: Path, target: Path, tokenizer: Path, max_bytes: int) -> None:
    writer.MAX_FILE_BYTES = max_bytes
    torch.set_num_threads(1)
    convert_checkpoint(source, target, tokenizer)


def content(checkpoint: Path) -> dict[str, bytes]:
    """All files whose bytes depend on nothing but the conversion: the engine puts a random number into .metadata."""
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    assert ".metadata" in {path.name for path in files.values()}
    return {name: path.read_bytes() for name, path in files.items() if path.name not in (".metadata", "manifest.json")}


def big_source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "hf", mixtral.FAMILY, BIG)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, tokenizer: Path) -> None:
    """kill -9 at random moments: the next start keeps what is whole, and the result is that of an undisturbed one."""
    source, target, max_bytes = big_source(tmp_path), tmp_path / "out", 300_000
    # Forked from a process that has imported the engine and done nothing else.
    context = get_context("forkserver")
    context.set_forkserver_preload([writer.__name__])
    start = functools.partial(context.Process, target=convert_in_child, args=(source, target, tokenizer, max_bytes))
    assert finish(start()) == 0
    target.rename(tmp_path / "expected")
    expected = content(tmp_path / "expected" / "checkpoints" / "step_00000000")
    num_files = len([name for name in expected if name.endswith(".distcp")])
    assert num_files > 30

    draw, kept = random.Random(int(time.time())), 0
    moments = [0, *sorted(draw.uniform(0, num_files) for _ in range(5)), num_files]
    for moment in moments:
        before = inodes(target)
        process = start()
        process.start()
        while num_noted(target) < moment and process.is_alive():
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.05))
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        kept += len(before)
        if (target / "checkpoints" / "step_00000000").is_dir():
            break  # the moment was past the end of writing
        # What was noted as whole is there still, the very same file.
        assert before.items() <= inodes(target).items()
    if not (target / "checkpoints" / "step_00000000").is_dir():
        assert finish(start()) == 0
    assert kept, "no start found what an earlier one had written"
    found = content(target / "checkpoints" / "step_00000000")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected)
    left = {path.name for path in (target / "checkpoints").iterdir()} - {"step_00000000"}
    # A kill right after the checkpoint got its name leaves the journal behind.
    assert not left or (
        process.exitcode and left == {PARTIAL} and not (target / "checkpoints" / PARTIAL / "files").exists()
    )
    ours, theirs = (
        FileSystemReader(path / "checkpoints" / "step_00000000" / "weights").read_metadata()
        for path in (target, tmp_path / "expected")
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data


def finish(process: Any) -> int | None:
    process.start()
    process.join(60)
    code: int | None = process.exitcode
    return code


def num_noted(target: Path) -> int:
    """Files that are noted as whole."""
    return len(noted(target))


def noted(target: Path) -> dict[str, Any]:
    """The journal's entries."""
    with contextlib.suppress(FileNotFoundError):
        files: dict[str, Any] = json.loads((target / "checkpoints" / PARTIAL / "journal.json").read_text())["files"]
        return files
    return {}


def inodes(target: Path) -> dict[str, int]:
    """The files that are noted as whole, of a conversion that does not run."""
    folder = target / "checkpoints" / PARTIAL / "files"
    return {name: (folder / name).stat().st_ino for name in noted(target) if (folder / name).is_file()}


@pytest.mark.parametrize("damage", ["byte", "short", "note", "source"])
def test_what_is_not_whole_is_written_anew(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source, target = write_source(tmp_path / "hf", *MODELS["mixtral"]), tmp_path / "out"
    monkeypatch.setattr(writer, "MAX_FILE_BYTES", 8_000)
    convert_checkpoint(source, target, tokenizer)
    target.rename(tmp_path / "expected")
    write, written = writer.compat.write_sharded_file, []

    def failing(request: Any, bucket: Any, number: int) -> list[Any]:
        if number == 4:
            raise OSError(28, "full", bucket[0])
        return write(request, bucket, number)

    monkeypatch.setattr(writer.compat, "write_sharded_file", failing)
    with pytest.raises(OutputError, match="full"):
        convert_checkpoint(source, target, tokenizer)
    folder = target / "checkpoints" / PARTIAL
    file = folder / "files" / "weights" / "__0_2.distcp"
    if damage == "byte":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "note":
        journal = json.loads((folder / "journal.json").read_text())
        journal["files"].pop("weights/__0_2.distcp")
        (folder / "journal.json").write_text(json.dumps(journal))
    else:
        os.utime(source / "model-00001-of-00002.safetensors", (1, 1))

    def counted(request: Any, bucket: Any, number: int) -> list[Any]:
        written.append(number)
        return write(request, bucket, number)

    monkeypatch.setattr(writer.compat, "write_sharded_file", counted)
    checkpoint = convert_checkpoint(source, target, tokenizer)
    total = len(list(checkpoint.rglob("*.distcp")))
    assert written == (list(range(total)) if damage == "source" else [2, *range(4, total)])
    expected = content(tmp_path / "expected" / "checkpoints" / "step_00000000")
    assert content(checkpoint) == expected


def test_the_source_is_looked_at_before_anything_is_written(tmp_path: Path, tokenizer: Path) -> None:
    family, model = MODELS["mistral"]
    tensors = random_hf(family, model)
    tensors["model.norm.weight"] = torch.zeros(7)
    source = tmp_path / "hf"
    write_source(source, family, model, tensors)
    save_file({"x": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    with pytest.raises(CheckpointError, match=r"safetensors: tensor model\.norm\.weight has shape \[7\]"):
        convert_checkpoint(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
