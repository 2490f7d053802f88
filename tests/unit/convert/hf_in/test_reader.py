"""Directories of Hugging Face models: what is read of a file, what is refused and why."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_grit.convert.families import mistral, mixtral
from megatron_grit.convert.families.registry import hf_state_dict_to_megatron
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_in.reader import (
    PickleFolder,
    SafetensorsFolder,
    check_weights,
    open_weights,
)
from megatron_grit.convert.param_map import Family, Shard
from megatron_grit.errors import CheckpointError
from megatron_grit.store.hub import local_folder
from tests.unit.convert.test_param_map import DENSE, MIXTURE, random_hf

pytestmark = pytest.mark.engine

EMBEDDING = "model.embed_tokens.weight"


def write_pickle(file: Path, saved: object, *, old: bool = False) -> None:
    """For tests of readers of such files; nothing else writes them. ``old``: as torch before 1.6 did."""
    torch.save(saved, file, _use_new_zipfile_serialization=not old)


def write_shards(directory: Path, tensors: dict[str, Tensor], *, pickled: bool = False) -> Path:
    """Two files and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = directory / f"{stem}-0000{number}-of-00002.{suffix}"
        chosen = {name: tensors[name] for name in part}
        if pickled:
            torch.save(chosen, file)
        else:
            save_file(chosen, file)
        weight_map |= dict.fromkeys(part, file.name)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def edit_index(directory: Path, changes: dict[str, str]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_hf(mistral.FAMILY, DENSE)


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    directory = write_shards(tmp_path / "hf", tensors)
    (directory / "config.json").write_text(json.dumps(mistral.hf_config(DENSE)))
    return directory


@pytest.mark.parametrize("pickled", [False, True])
def test_parts_of_tensors(tmp_path: Path, tensors: dict[str, Tensor], pickled: bool) -> None:
    """A part is what indexing a tensor gives, has memory of its own, and is all that is counted as read."""
    with open_weights(write_shards(tmp_path, tensors, pickled=pickled), allow_pickle=True) as weights:
        assert isinstance(weights, PickleFolder if pickled else SafetensorsFolder)
        assert sorted(weights) == sorted(tensors)
        assert all(torch.equal(weights[name], tensors[name]) for name in tensors)
        stored, whole = weights.stored[EMBEDDING], tensors[EMBEDDING]
        assert stored.shape == whole.shape and stored.dtype == whole.dtype
        before = weights.bytes_read
        for index in ((slice(3, 9),), (slice(0, 7), slice(4, 10)), (slice(2, 2),), (slice(60, 10**9),), ()):
            part = stored[index]
            assert torch.equal(part, whole[index])
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        assert weights.bytes_read - before == whole.element_size() * (
            6 * 30 + 7 * 6 + (len(whole) - 60) * 30 + whole.numel()
        )


def test_weights_in_another_layout_beside_them(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """Mistral's own names, as its repositories have them besides."""
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"tok_embeddings.weight": tensors[EMBEDDING]}, tmp_path / "consolidated.safetensors")
    assert sorted(SafetensorsFolder(tmp_path)) == sorted(tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len(SafetensorsFolder(tmp_path)) == len(tensors) + 1


SHARDED_DIM = {"linear_proj.weight": 1, "linear_fc2.weight": 1, "layernorm": None, "router": None}


@pytest.mark.parametrize(
    ("family", "stacked"), [(mistral.FAMILY, False), (mixtral.FAMILY, False), (mixtral.FAMILY, True)]
)
def test_a_rank_reads_its_part(tmp_path: Path, family: Family, stacked: bool) -> None:
    """What two ranks make of their parts is the whole, and each reads half of what is split."""
    model = replace(MIXTURE if family is mixtral.FAMILY else DENSE, num_attention_heads=4, num_query_groups=2)
    tensors = random_hf(family, model)
    if stacked:
        tensors = stack_experts(tensors, model.num_layers, model.num_experts or 0)
    with open_weights(write_shards(tmp_path, tensors)) as weights:
        for conversion in family.plan(weights, model):
            dim = next((dim for key, dim in SHARDED_DIM.items() if key in conversion.megatron), 0)
            if dim is None:
                continue
            whole = conversion.make(weights.stored, model)
            before = weights.bytes_read
            parts = [conversion.make(weights.stored, model, Shard(dim, rank, 2)) for rank in range(2)]
            num_experts = model.num_experts or 1
            sizes = {name: 4 * weights.stored[name].shape.numel() for name in conversion.sources}
            one = [size // num_experts if stacked and "experts" in name else size for name, size in sizes.items()]
            assert weights.bytes_read - before == sum(one)
            if "fc1" in conversion.megatron:  # each rank holds a gate above an up projection
                halves = [part.chunk(2) for part in parts]
                joined = torch.cat([half[side] for side in range(2) for half in halves])
            else:
                joined = torch.cat(parts, dim=dim)
            assert torch.equal(joined[: len(whole)], whole), conversion.megatron
            assert not joined[len(whole) :].any()  # two ranks pad the vocabulary further


def stack_experts(tensors: dict[str, Tensor], num_layers: int, num_experts: int) -> dict[str, Tensor]:
    """All experts of a layer in one tensor."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(num_layers):
        old = f"model.layers.{layer}.block_sparse_moe.experts."
        gate_up = [torch.cat([tensors[f"{old}{e}.w{n}.weight"] for n in (1, 3)]) for e in range(num_experts)]
        down = [tensors[f"{old}{e}.w2.weight"] for e in range(num_experts)]
        new = f"model.layers.{layer}.mlp.experts."
        stacked |= {new + "gate_up_proj": torch.stack(gate_up), new + "down_proj": torch.stack(down)}
    return stacked


def test_stacked_experts_are_the_single_ones(tmp_path: Path) -> None:
    tensors = random_hf(mixtral.FAMILY, MIXTURE)
    expected = hf_state_dict_to_megatron(tensors, MIXTURE)
    stacked = stack_experts(tensors, MIXTURE.num_layers, MIXTURE.num_experts or 0)
    with open_weights(write_shards(tmp_path, stacked)) as weights:
        found = hf_state_dict_to_megatron(stacked, MIXTURE)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        lazily = {each.megatron: each.make(weights.stored, MIXTURE) for each in mixtral.FAMILY.plan(weights, MIXTURE)}
        assert all(torch.equal(lazily[name], expected[name]) for name in expected)


def refused(directory: Path, **options: Any) -> str:
    """What a conversion says of a directory: one line, and nothing is written."""
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(directory, directory.parent / "out", **options)
    assert not (directory.parent / "out").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shard_that_is_missing(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing, though model.safetensors.index.json names it" in refused(source)


@pytest.mark.parametrize("size", [-100, 4, 60, 0])
def test_shard_that_is_cut_short(source: Path, size: int) -> None:
    """In the data, in the length of the header, in the header, at once."""
    file = source / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert f"{file}: not a whole safetensors file" in refused(source)


def test_header_that_lies(source: Path) -> None:
    file = source / "model-00001-of-00002.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    assert f"{file}: not a whole safetensors file" in refused(source)


def test_index_names_a_tensor_that_its_file_lacks(source: Path) -> None:
    edit_index(source, {"model.extra.weight": "model-00001-of-00002.safetensors"})
    message = refused(source)
    assert "model-00001-of-00002.safetensors: has no tensor model.extra.weight, though" in message


def test_index_names_another_file(source: Path) -> None:
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][EMBEDDING]
    other = "model-00002-of-00002.safetensors" if "00001" in where else "model-00001-of-00002.safetensors"
    edit_index(source, {EMBEDDING: other})
    assert f"{other}: has no tensor {EMBEDDING}" in refused(source)
    assert f"it is in {where}" in refused(source)


def test_tensor_in_two_files(source: Path, tensors: dict[str, Tensor]) -> None:
    save_file({EMBEDDING: tensors[EMBEDDING]}, source / "model-extra.safetensors")
    edit_index(source, {"model.extra.weight": "model-extra.safetensors"})
    message = refused(source)
    assert f"tensor {EMBEDDING} is in two files" in message and "model-extra.safetensors" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}'])
def test_index_that_is_none(source: Path, content: str) -> None:
    (source / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: not an index of weights" in refused(source)


def test_shape_that_config_json_contradicts(source: Path) -> None:
    settings = mistral.hf_config(DENSE) | {"intermediate_size": DENSE.ffn_hidden_size + 4}
    (source / "config.json").write_text(json.dumps(settings))
    message = refused(source)
    assert "gate_proj.weight has shape [28, 30], but config.json makes it [32, 30]" in message
    assert "of-00002.safetensors: tensor model.layers.0.mlp." in message


def test_tensor_that_is_missing(source: Path) -> None:
    settings = mistral.hf_config(DENSE) | {"num_hidden_layers": DENSE.num_layers + 1}
    (source / "config.json").write_text(json.dumps(settings))
    message = refused(source)
    assert f"{source}: tensor model.layers.{DENSE.num_layers}." in message and "give all of its weights" in message


def test_unknown_architecture(source: Path) -> None:
    (source / "config.json").write_text(json.dumps(mistral.hf_config(DENSE) | {"architectures": ["MambaForCausalLM"]}))
    message = refused(source)
    assert "config.json: architectures is ['MambaForCausalLM']; supported: MistralForCausalLM, " in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_another_type(source: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    write_shards(source, tensors | {EMBEDDING: tensors[EMBEDDING].to(dtype)})
    assert f"tensor {EMBEDDING} has the type {str(dtype)[6:]}; only float32" in refused(source)


def test_types_of_tensors_that_are_not_read_do_not_matter(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0, dtype=torch.float64)}
    with open_weights(write_shards(tmp_path, tensors | extra)) as weights:
        assert check_weights(mistral.FAMILY.plan(weights, DENSE), weights) == "bf16"


@pytest.mark.parametrize(
    ("dtypes", "precision"),
    [
        ([torch.bfloat16], "bf16"),
        ([torch.float16], "fp32"),
        ([torch.float32], "fp32"),
        ([torch.bfloat16, torch.float32], "fp32"),
    ],
)
def test_precision_keeps_the_weights(
    tmp_path: Path, tensors: dict[str, Tensor], dtypes: list[torch.dtype], precision: str
) -> None:
    mixed = {name: tensor.to(dtypes[number % len(dtypes)]) for number, (name, tensor) in enumerate(tensors.items())}
    with open_weights(write_shards(tmp_path, mixed)) as weights:
        assert check_weights(mistral.FAMILY.plan(weights, DENSE), weights) == precision


class Payload:
    """What a pickle of it does when it is read by pickle itself."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


def test_pickle_is_refused_unless_allowed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    directory = write_shards(tmp_path / "hf", tensors, pickled=True)
    (directory / "config.json").write_text(json.dumps(mistral.hf_config(DENSE)))
    message = refused(directory)
    assert "no *.safetensors; pytorch_model-00001-of-00002.bin is pickle, which can run code" in message
    # With it, the weights are read, and the next thing that is missing is the tokenizer.
    with pytest.raises(Exception, match="no tokenizer"):
        convert_checkpoint(directory, tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_would_run_code(tmp_path: Path, tensors: dict[str, Tensor], legacy: bool) -> None:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(mistral.hf_config(DENSE)))
    file, ran = directory / "pytorch_model.bin", tmp_path / "ran"
    torch.save(tensors | {"x": Payload(ran)}, file, _use_new_zipfile_serialization=not legacy)
    message = refused(directory, allow_pickle=True)
    assert f"{file}: holds something else than tensors" in message
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the payload works where pickle is read as pickle"


@pytest.mark.parametrize(
    ("content", "message"), [(b"\x80\x04.", "pytorch_model.bin: "), (b"", "not a whole file of torch")]
)
def test_pickle_that_is_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(mistral.hf_config(DENSE)))
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(content)
    assert message in refused(tmp_path / "hf", allow_pickle=True)


def test_pickle_that_is_cut_short(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    directory = write_shards(tmp_path / "hf", tensors, pickled=True)
    (directory / "config.json").write_text(json.dumps(mistral.hf_config(DENSE)))
    file = directory / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-300])
    assert str(file) in refused(directory, allow_pickle=True)


def test_pickle_of_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a state dict"):
        PickleFolder(tmp_path)


def test_old_pickle_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with open_weights(tmp_path, allow_pickle=True) as weights:
        assert all(torch.equal(weights[name], tensors[name]) for name in tensors)


def test_pickles_of_the_hub_are_fetched_where_they_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[set[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(set(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for options in ({}, {"allow_pickle": True}, {"allow_pickle": True, "weights": False}):
        assert local_folder("org/name", **options) == tmp_path
    assert asked[1] - asked[0] == {"pytorch_model*.bin", "pytorch_model.bin.index.json"}
    assert not any(pattern.startswith("pytorch_model") for pattern in asked[0] | asked[2])
