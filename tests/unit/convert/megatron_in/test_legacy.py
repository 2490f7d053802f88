"""Checkpoints of Megatron-LM's older layout, written here, against plain torch with the same weights.

Untried on published ones, which nobody here has.
"""

from __future__ import annotations

import argparse
import enum
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.convert.conversion import ConvertOptions, convert
from megatron_grit.convert.megatron_in.folder import FILE, find_legacy
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.tokenizer import train_sentencepiece
from megatron_grit.errors import CheckpointError, ConfigError, GritError
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.checkpoint import load_weights, read_config
from tests.distributed.plain_model import reference_step
from tests.neighbors import with_neighbors
from tests.rows import make_row
from tests.unit.convert.hf_in.test_reader import write_pickle

LAYERS, WIDTH, INNER, HEADS, TOKENS, ROWS, CHUNK = 9, 16, 24, 4, 290, 320, 8
READING, FIRST = (5, 8), 5
"""With at most 15 layers the sixth and every third from there, counted from 0."""


class ModelType(enum.Enum):
    """As megatron.core.enums has it: a class that a file's arguments refer to."""

    retro_decoder = 4


@dataclass(frozen=True)
class Written:
    """A run of Megatron-LM."""

    ranks: int
    arguments: dict[str, Any]
    norm: str = "norm"
    """How names of norms end."""
    gated: bool = False
    biases: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    """What its model section is here."""


Names = dict[str, tuple[str, tuple[int, ...], int | None]]

COMMON = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "ffn_hidden_size": INNER,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "kv_channels": WIDTH // HEADS,
    "pipeline_model_parallel_size": 1,
    "model_type": ModelType.retro_decoder,
    "params_dtype": torch.float32,
}
READS = {"retro_add_retriever": True, "retro_num_neighbors": 2, "retro_encoder_layers": 2, "retro_chunk_length": CHUNK}
MODERN = Written(
    ranks=2,
    arguments=COMMON
    | READS
    | {
        "swiglu": True,
        "add_bias_linear": False,
        "apply_layernorm_1p": True,
        "untie_embeddings_and_output_weights": True,
        "use_rotary_position_embeddings": True,
        "add_position_embedding": False,
        "rotary_percent": 0.5,
        "retro_attention_gate": 1,
        "norm_epsilon": 1e-3,
    },
    gated=True,
    biases=False,
    model={
        "normalization": "layernorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "swiglu",
        "rotary_percent": 0.5,
        "norm_epsilon": 1e-3,
    },
)
CLASSIC = Written(
    ranks=1,
    arguments=COMMON | READS | {"layernorm_epsilon": 1e-4},
    norm="layernorm",
    model={"activation": "gelu_tanh", "norm_epsilon": 1e-4},
)
GPT = Written(ranks=2, arguments=COMMON | {"bias_gelu_fusion": False}, model={"activation": "gelu"})
CASES = {"retro_8b": MODERN, "retro": CLASSIC, "gpt": GPT}


def layer_names(ours: str, theirs: str, reads: bool, written: Written) -> Names:
    """Ours of each tensor of a layer there, with its shape and the dimension along which ranks split it."""
    fc1 = (2 * INNER if written.gated else INNER, WIDTH)
    linears: dict[str, tuple[str, tuple[int, int], bool]] = {
        "self_attention.query_key_value": ("self_attention.linear_qkv", (3 * WIDTH, WIDTH), True),
        "self_attention.dense": ("self_attention.linear_proj", (WIDTH, WIDTH), False),
        "mlp.dense_h_to_4h": ("mlp.linear_fc1", fc1, True),
        "mlp.dense_4h_to_h": ("mlp.linear_fc2", (WIDTH, INNER), False),
    }
    norms = {"input": "self_attention.linear_qkv.layer_norm_", "post_attention": "mlp.linear_fc1.layer_norm_"}
    if reads:
        linears["inter_attention.query"] = ("cross_attention.linear_q", (WIDTH, WIDTH), True)
        linears["inter_attention.key_value"] = ("cross_attention.linear_kv", (2 * WIDTH, WIDTH), True)
        linears["inter_attention.dense"] = ("cross_attention.linear_proj", (WIDTH, WIDTH), False)
        norms["post_inter_attention"] = norms["post_attention"]
        norms["post_attention"] = "pre_cross_attn_layernorm."
    found: Names = {}
    for name, our in norms.items():
        for part in ("weight", "bias"):
            found[f"{theirs}{name}_{written.norm}.{part}"] = (f"{ours}{our}{part}", (WIDTH,), None)
    for name, (our, shape, is_column) in linears.items():
        found[f"{theirs}{name}.weight"] = (f"{ours}{our}.weight", shape, 0 if is_column else 1)
        if written.biases:
            found[f"{theirs}{name}.bias"] = (f"{ours}{our}.bias", shape[:1], 0 if is_column else None)
    return found


def all_names(written: Written) -> Names:
    """As :func:`layer_names`, of the whole language model."""
    words = "embedding.word_embeddings.weight"
    names: Names = {words: (words, (ROWS, WIDTH), 0)}
    if written.gated:
        names["output_layer.weight"] = ("output_layer.weight", (ROWS, WIDTH), 0)
    else:
        positions = "embedding.position_embeddings.weight"
        names[positions] = (positions, (64, WIDTH), None)
    for part in ("weight", "bias"):
        names[f"encoder.final_{written.norm}.{part}"] = (f"decoder.final_layernorm.{part}", (WIDTH,), None)
    reads = "retro_add_retriever" in written.arguments
    for layer in range(LAYERS):
        ours, theirs = f"decoder.layers.{layer}.", f"encoder.layers.{layer}."
        names |= layer_names(ours, theirs, reads and layer in READING, written)
        for number in range(2 if reads and layer == FIRST else 0):
            encoder = f"{ours}encoder.layers.{number}.", f"{theirs}retriever.layers.{number}."
            names |= layer_names(*encoder, number == 0, written)
    return names


def shard(tensor: Tensor, dim: int | None, rank: int, written: Written, name: str) -> Tensor:
    if dim is None:
        return tensor
    if written.gated and "dense_h_to_4h" in name:
        return torch.cat([half.chunk(written.ranks)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(written.ranks, dim)[rank].clone()


def write(folder: Path, written: Written, **changed: Any) -> dict[str, Tensor]:
    """Write the checkpoint. Returns the weights by our names on disk, whole."""
    generator = torch.Generator().manual_seed(3)
    names, weights = all_names(written), {}
    ranks: list[dict[str, Any]] = [{"embedding": {}, "encoder": {}} for _ in range(written.ranks)]
    for name, (ours, shape, dim) in names.items():
        tensor = 0.2 * torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight") and not written.gated:
            tensor += 1
        weights[ours] = tensor[:TOKENS] if shape[0] == ROWS else tensor
        *path, last = name.split(".", 2) if name.startswith("embedding") else name.split(".", 1)
        for rank, state in enumerate(ranks):
            place = state
            for part in path:
                place = place.setdefault(part, {})
            place[last] = shard(tensor, dim, rank, written, name)
    iteration = folder / "iter_0000100"
    version = changed.pop("checkpoint_version", 3.0)
    for rank, state in enumerate(ranks):
        saved = {
            "args": argparse.Namespace(**(written.arguments | changed)),
            "checkpoint_version": version,
            "iteration": 100,
            "model": {"language_model": state},
            "rng_state": [{"np_rng_state": np.random.get_state(), "random_rng_state": (3, (1, 2), None)}],
        }
        (iteration / f"mp_rank_{rank:02d}").mkdir(parents=True)
        write_pickle(iteration / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", saved)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return weights


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"word{number} number {number * 7} of many" for number in range(300)]
    return train_sentencepiece(words, tmp_path_factory.mktemp("tokenizer") / "tiny", TOKENS)


def convert_to(source: Path, target: Path, tokenizer: Path) -> Path:
    return convert(ConvertOptions(source=str(source), target=str(target), tokenizer=str(tokenizer)))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_plain_torch_computes(tmp_path: Path, tokenizer: Path, name: str) -> None:
    written = CASES[name]
    weights = write(tmp_path / "theirs", written)
    checkpoint = convert_to(tmp_path / "theirs", tmp_path / "ours", tokenizer)
    config = read_config(checkpoint)
    for key, value in written.model.items():
        assert getattr(config.model, key) == value
    row = make_row(RowKind.GENERATIVE, [19, 9], 32)
    row.tokens_1T.remainder_(TOKENS)
    assert row.labels_1T is not None and row.loss_mask_1T is not None
    row.labels_1T.remainder_(TOKENS)
    if name != "gpt":
        assert config.model.retro.num_neighbors == 2 and not config.model.retro.encoder_rope
        row = with_neighbors(row, CHUNK)
        assert row.neighbors is not None
        row.neighbors.tokens_1N.remainder_(TOKENS)
    else:  # layers that are all alike are stacked in plain torch
        parts = {key.partition(f"layers.{layer}.")[2] for layer in range(LAYERS) for key in weights} - {""}
        for part in parts:
            each = [weights.pop(f"decoder.layers.{layer}.{part}") for layer in range(LAYERS)]
            weights[f"decoder.layers.{part}"] = torch.stack(each)
    expected = reference_step(config, weights, [row], 0, 0).metrics["loss_gen"]
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        model = build_model(config, TOKENS, context).eval()
        load_weights(checkpoint, model, context)
        with torch.no_grad():
            loss = model(row, Output.TOKEN_LOSSES).sum() / row.loss_mask_1T.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 32}, r"word_embeddings.weight has shape \[160, 16\], but args makes it"),
        ({"num_layers": 8}, "has no place in a model of its args"),
        ({"num_layers": 12}, "encoder.layers.9.input_norm.weight is missing"),
        ({"rotary_interleaved": True}, "args.rotary_interleaved is True, .*; only checkpoints with False can be"),
        ({"num_experts": 4}, "args.num_experts is 4, .*; experts are read from torch_dist checkpoints: save it with"),
        (
            {"pipeline_model_parallel_size": 2},
            "size is 2, .*; convert the checkpoint with Megatron-LM's tools",
        ),
        ({"normalization": "other"}, "is 'other', .* only checkpoints with LayerNorm or RMSNorm can be converted"),
        ({"checkpoint_version": 1.0}, "has checkpoint_version 1, .*; load and save it once with a newer Megatron-LM"),
        ({"ffn_hidden_size": None}, "args has no ffn_hidden_size"),
        ({"swiglu": False}, "dense_h_to_4h.weight has shape"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, tokenizer: Path, changed: dict[str, Any], message: str) -> None:
    write(tmp_path / "theirs", MODERN, **changed)
    with pytest.raises(CheckpointError, match=message):
        convert_to(tmp_path / "theirs", tmp_path / "ours", tokenizer)
    assert not (tmp_path / "ours").exists()


def test_missing_ranks_stages_and_options(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "theirs"
    write(source, MODERN)
    options = ConvertOptions(source=str(source), target=str(tmp_path / "ours"), revision="main")
    with pytest.raises(ConfigError, match="it takes --tokenizer and no other option"):
        convert(options)
    last = source / "iter_0000100" / "mp_rank_01"
    assert {find_legacy(path) for path in (source, last.parent, last, last / FILE)} == {last.parent}
    assert find_legacy(tmp_path) is None
    (last / "model_optim_rng.pt").rename(last / "elsewhere")
    with pytest.raises(CheckpointError, match=r"mp_rank_01.* is missing"):
        convert_to(source, tmp_path / "ours", tokenizer)
    last.rename(last.with_name("mp_rank_00_001"))
    with pytest.raises(CheckpointError, match="several pipeline stages"):
        convert_to(source, tmp_path / "ours", tokenizer)


class Payload:
    """Writes a file where pickle makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_of_a_file_runs(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "theirs"
    write(source, MODERN, harmful=Payload(tmp_path / "ran"), module=sys.modules[__name__].ModelType)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        convert_to(source, tmp_path / "ours", tokenizer)
    assert not (tmp_path / "ran").exists()
    file = source / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(GritError, match="not a whole file of torch"):
        convert_to(source, tmp_path / "again", tokenizer)


def test_files_of_an_old_torch_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "theirs"
    write(source, CLASSIC)
    file = source / "iter_0000100" / "mp_rank_00" / FILE
    saved = {"args": argparse.Namespace(), "model": {}, "harmful": Payload(tmp_path / "ran")}
    write_pickle(file, saved, old=True)
    with pytest.raises(CheckpointError, match=r"is of torch before 1\.6, .*; load and save it once with a newer torch"):
        convert_to(source, tmp_path / "ours", tokenizer)
    assert not (tmp_path / "ran").exists()
