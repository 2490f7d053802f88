"""Export of a checkpoint: exactness, types, what is refused, and taking up again what was killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.hf_out import convert
from megatron_grit.convert.hf_out.convert import export_checkpoint, parse_size
from megatron_grit.convert.hf_out.reader import CheckpointReader
from megatron_grit.errors import CheckpointError, ConfigError, OutputError
from megatron_grit.store.digest import HashingFile
from megatron_grit.store.folder import OutputFolder
from tests.corpus import tiny_run
from tests.harness.command import fork_context


def make_checkpoint(directory: Path, *, step: int = 3, **sections: Any) -> tuple[Path, dict[str, Tensor]]:
    """A run's directory with one checkpoint of random weights, and its tensors by our names."""
    from megatron_grit.data.text.tokenizer import load_tokenizer
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint_save import save_checkpoint

    directory.mkdir(parents=True, exist_ok=True)
    config: RunConfig = tiny_run(directory, experts=sections.pop("experts", None), layers=4)
    config.model.init_std = 0.15
    for section, values in sections.items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    with parallel_job(config.parallel, 1) as context:
        model = build_model(config, tokenizer.vocab_size, context)
        save_checkpoint(config, context, model, None, tokenizer, step=step)
    return Path(config.output_dir), {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("export"), experts=2)[0]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_bf16_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Bit for bit, without the rows that pad the vocabulary; other types are rounded once."""
    run, ours = make_checkpoint(tmp_path, training={"precision": "bf16"})
    kept = weights_of(export_checkpoint(run, tmp_path / "kept"))
    embedding = ours["embedding.word_embeddings.weight"]
    assert embedding.shape[0] == 448 and embedding.dtype == torch.bfloat16
    assert torch.equal(kept["model.embed_tokens.weight"], embedding[:400])
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.values())
    assert torch.equal(kept["model.layers.3.mlp.down_proj.weight"], ours["decoder.layers.3.mlp.linear_fc2.weight"])
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in ("fp32", "fp16"):
        converted = weights_of(export_checkpoint(run, tmp_path / dtype, dtype=dtype))
        wanted = convert.DTYPES[dtype]
        assert all(torch.equal(tensor.to(wanted), converted[name]) for name, tensor in kept.items())


def test_fp16_does_not_overflow_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_checkpoint(tmp_path)
    read = CheckpointReader.read

    def enlarged(self: CheckpointReader, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensor * (1e7 if "final" in name else 1) for name, tensor in read(self, names).items()}

    monkeypatch.setattr(CheckpointReader, "read", enlarged)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has numbers above 65504, which fp16"):
        export_checkpoint(run, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), ("9", 9)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 parsecs", "GB", "1e9", "0.1B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size; give a number of B, KB, MB, GB"):
        parse_size(text)


def test_a_target_that_holds_something_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="out: already exists and is not empty; give another directory"):
        export_checkpoint(run, tmp_path / "out")
    assert digests(tmp_path).keys() == {"out/mine.txt"}
    (tmp_path / "empty").mkdir()
    assert (export_checkpoint(run, tmp_path / "empty") / "config.json").is_file()
    with pytest.raises(OutputError, match="empty: already exists"):
        export_checkpoint(run, tmp_path / "empty")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    """A changed byte is found before anything is read; a tensor of another shape is named."""
    run, _ = make_checkpoint(tmp_path)
    file = next(path for path in sorted((run / "checkpoints").rglob("*.distcp")) if path.stat().st_size > 1000)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.distcp: is damaged, its SHA-256 is not that of what was written"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = file.parent.parent
    (checkpoint / "manifest.json").unlink()
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(config.replace("ffn_hidden_size: 128", "ffn_hidden_size: 96"))
    with pytest.raises(
        CheckpointError, match=r"tensor decoder\.layers\.0\.mlp\.linear_fc. is|linear_fc.\.weight is part"
    ):
        export_checkpoint(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"normalization": "layernorm"},
            "has such a shape; in the nearest, MistralForCausalLM, model.normalization 'layernorm' would be 'rmsnorm'",
        ),
        ({"architecture": "LlamaForCausalLM", "qk_norm": True}, "LlamaForCausalLM, whose config.json cannot say"),
        ({"architecture": "FalconForCausalLM"}, "model.architecture is FalconForCausalLM; supported: Mistral"),
    ],
)
def test_a_shape_of_no_family_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    run, _ = make_checkpoint(tmp_path, model=model)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(run, tmp_path / "out")


def test_the_tokenizer_has_to_be_the_models(run: Path, tmp_path: Path) -> None:
    """Another one, or none, is refused; one that lies where the run found it is taken."""
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    other = train_sentencepiece(["quite other texts, of other words"] * 9, tmp_path / "other", 280)
    with pytest.raises(CheckpointError, match=r"other\.model: is not the tokenizer that .* was trained with"):
        export_checkpoint(run, tmp_path / "out", tokenizer=other)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (checkpoint,) = (copy / "checkpoints").iterdir()
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "manifest.json").unlink()
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace(f"{run.parent}/tokenizer.model", "nowhere.model"))
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.model or tokenizer\.json; give --tokenizer"):
        export_checkpoint(copy, tmp_path / "out")
    export_checkpoint(copy, tmp_path / "out", tokenizer=run.parent / "tokenizer.model")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_grit.cli.convert import main

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run: no checkpoint here" in error


def test_options_of_the_other_way_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_grit.cli.convert import main

    assert main(["--from", str(run), "--to", str(tmp_path / "out"), "--revision", "main"]) == 2
    assert "is a checkpoint, which is exported; --revision has no meaning here" in capsys.readouterr().err
    assert main(["--from", str(tmp_path), "--to", str(tmp_path / "out"), "--dtype", "bf16"]) == 2
    assert "holds no checkpoint of ours to export; --dtype has no meaning here" in capsys.readouterr().err
    assert main(["--from", str(run), "--to", str(tmp_path / "out"), "--max-shard-size", "many"]) == 2
    assert "max_shard_size 'many' is no size" in capsys.readouterr().err
    assert main(["--from", str(run), "--to", str(tmp_path / "out"), "--max-shard-size", "100KB"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"


def test_a_full_disk_is_told_and_taken_up_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are kept, and only those; the result is that of an undisturbed export."""
    expected = digests(export_checkpoint(run, tmp_path / "whole", max_shard_size="60KB"))
    write, written = HashingFile.write, [0]

    def fail(self: Any, content: Any) -> int:
        written[0] += 1
        if written[0] == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None)
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(HashingFile, "write", fail)
        with pytest.raises(OutputError, match=r"safetensors: cannot be written \(No space left on device\); the same"):
            export_checkpoint(run, tmp_path / "out", max_shard_size="60KB")
    partial = tmp_path / ".out.partial" / "files"
    kept = json.loads((partial.parent / "journal.json").read_text())["files"]
    assert 2 < len(kept) < len(list((tmp_path / "whole").glob("*.safetensors")))
    damaged = partial / sorted(kept)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    before = {name: (partial / name).stat().st_ino for name in kept}
    export_checkpoint(run, tmp_path / "out", max_shard_size="60KB")
    after = {name: (tmp_path / "out" / name).stat().st_ino for name in kept}
    assert {name for name in kept if before[name] != after[name]} == {damaged.name}
    assert digests(tmp_path / "out") == expected and not partial.parent.exists()


def test_files_of_another_export_are_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-finished export with another type, then one in this type: none of its files is taken."""

    def stop(*_: Any) -> None:
        raise CheckpointError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_files", stop)
        with pytest.raises(CheckpointError, match="stopped"):
            export_checkpoint(run, tmp_path / "out", dtype="bf16")
    assert (tmp_path / ".out.partial" / "files" / "model.safetensors").is_file()
    export_checkpoint(run, tmp_path / "out", dtype="fp32")
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path / "out").values())


def test_too_little_room_is_told_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"out: needs [\d,]+ more bytes and 1,000 are free, so [\d,]+ are"):
        export_checkpoint(run, tmp_path / "out")


def test_two_at_a_time_are_refused(run: Path, tmp_path: Path) -> None:
    with (
        OutputFolder(tmp_path / "out", None),
        pytest.raises(OutputError, match="out: another process is writing it"),
    ):
        export_checkpoint(run, tmp_path / "out")


def export_until_killed(run: Path, target: Path, moment: int) -> None:
    """Export, and be killed at this write; to the end at 0."""
    write, left = HashingFile.write, moment

    def counted(self: Any, content: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, content)

    with mock.patch.object(HashingFile, "write", counted):
        export_checkpoint(run, target, max_shard_size="30KB")


@pytest.mark.slow
def test_killed_at_any_moment(run: Path, tmp_path: Path) -> None:
    """Six kills, each at a random write, then an end: the very files of an undisturbed export, and never a half one."""
    expected = digests(export_checkpoint(run, tmp_path / "whole", max_shard_size="30KB"))
    target = tmp_path / "out"
    generator, kept, kills = random.Random(5), [], 0
    while not target.exists():
        moment = generator.randint(2, 12) if kills < 6 else 0
        process = fork_context().Process(target=export_until_killed, args=(run, target, moment))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moment else 0)
        kills += bool(moment)
        journal = tmp_path / ".out.partial" / "journal.json"
        kept.append(len(json.loads(journal.read_text())["files"]) if journal.exists() else 0)
        if target.exists():
            assert digests(target) == expected
    assert kills == 6 and kept[:-1] == sorted(kept[:-1]) and max(kept) > 1, kept
