"""Models of transformers, converted through a checkpoint on disk, give the same numbers here, family by family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from tests.rows import TWO_PASSES

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

# 96 tokens are more than the window of the sliding models, and a third of a row that holds three segments.
LENGTHS, WINDOW = (41, 96, 23), 16
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "attn_implementation": "sdpa",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}
ROPE: dict[str, Any] = {"rope_theta": 500.0, "original_max_position_embeddings": 32}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Class of transformers, and its settings beside those of the shape.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": WINDOW}),
    "mistral_tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama": ("Llama", {}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR, "attention_bias": True, "tie_word_embeddings": True}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3_moe_biases": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "attention_bias": True}),
    "gpt_neox": ("GPTNeoX", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}}),
    "gpt_neox_serial": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False}),
    "gptj": ("GPTJ", {"rotary_dim": 4, "n_inner": 80}),
    "gpt_neo": ("GPTNeo", {"window_size": WINDOW}),
}
RENAMED = {
    "GPTJ": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    "GPTNeo": {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
}


def make_model(name: str, vocab_size: int, num_layers: int = 3) -> Any:
    """A tiny random model of transformers, with biases and norms that are not 0 and 1."""
    family, settings = MODELS[name]
    shape = {
        key: value for key, value in SHAPE.items() if key != "rope_parameters" or family[:4] not in ("GPTJ", "GPTN")
    }
    shape["num_hidden_layers"] = num_layers
    if family == "GPTNeo":
        shape["attention_types"] = [[["global", "local"], 1], [["local"], num_layers - 2]]
    for new, old in RENAMED.get(family, {}).items():
        shape[new] = shape.pop(old)
    if family.startswith("GPT") or family == "Qwen2Moe":
        shape.pop("head_dim")
    if family in RENAMED:
        shape["attn_implementation"] = "eager"
    config = getattr(transformers, f"{family}Config")(vocab_size=vocab_size, **(shape | settings))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few hundred pieces, a number that no padding divides."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_tokenizer(directory: Path) -> Path:
    import sentencepiece

    prefix = directory / "tokenizer"
    text = " ".join(p.read_text(encoding="utf-8") for p in Path(__file__).parents[2].glob("megatron_grit/m*/*.py"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(prefix), vocab_size=331, minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module", params=list(MODELS))
def models(
    request: pytest.FixtureRequest, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any, Path]]:
    """(transformers' model, ours, the converted directory): save_pretrained, convert_checkpoint, load_weights."""
    from megatron_grit.convert.hf_in.convert import convert_checkpoint
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, read_config, resolve_checkpoint

    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    theirs = make_model(request.param, 331)
    theirs.save_pretrained(directory / "hf")
    convert_checkpoint(directory / "hf", directory / "ours", tokenizer_file)
    checkpoint = resolve_checkpoint(directory / "ours")
    config: RunConfig = read_config(checkpoint)
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        ours = build_model(config, 331, context)
        load_weights(checkpoint, ours, context)
        yield theirs, ours.eval(), directory / "hf"


def make_row(kind: RowKind, padding: int = 0) -> PackedRow:
    """Three segments, labels everywhere but at each segment's end; then padding, a segment of its own."""
    lengths = [*LENGTHS, *[padding] * (padding > 0)]
    total, used = sum(lengths), sum(LENGTHS)
    tokens = torch.randint(0, 331, (1, used), generator=torch.Generator().manual_seed(1))
    tokens = torch.nn.functional.pad(tokens, (0, padding), value=3)
    ends, places = torch.tensor(lengths).cumsum(0), torch.arange(total)
    return PackedRow(
        embeds=kind is RowKind.EMBEDDING,
        tokens_1T=tokens,
        positions_1T=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        max_seqlen=max(lengths),
        padding_mask_1T=(places >= used)[None],
        labels_1T=tokens.roll(-1, 1),
        loss_mask_1T=torch.ones(total).index_fill(0, ends - 1, 0.0)[None] * (places < used),
    )


def segments(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(LENGTHS)


def states_of_theirs(theirs: Any, row: PackedRow, *, bidirectional: bool) -> Tensor:
    """Final states of each segment alone, one after another."""
    states = []
    for ids in segments(row.tokens_1T[0]):
        mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool) if bidirectional else None
        if mask is not None and theirs.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape)  # added to the scores
        with everything_seen(theirs) if bidirectional else contextlib.nullcontext():
            states.append(theirs.base_model(input_ids=ids[None], attention_mask=mask).last_hidden_state[0])
    return torch.cat(states)


def padded_states_of_theirs(theirs: Any, row: PackedRow, *, bidirectional: bool) -> Tensor:
    """Final states of the segments as a batch that is padded on the right, padding left out; one after another."""
    width = max(LENGTHS) + 5
    parts = segments(row.tokens_1T[0, : sum(LENGTHS)])
    ids = torch.stack([torch.nn.functional.pad(part, (0, width - len(part)), value=3) for part in parts])
    is_real = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask: Tensor = is_real.long()
    if bidirectional:
        mask = is_real[:, None, None, :].expand(-1, 1, width, width)
        if theirs.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)  # added to the scores
    with everything_seen(theirs) if bidirectional else contextlib.nullcontext():
        states: Tensor = theirs.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states[is_real]


@contextlib.contextmanager
def everything_seen(theirs: Any) -> Iterator[None]:
    """GPT-Neo has its mask in a buffer."""
    masks = {name: mask for name, mask in theirs.named_buffers() if name.endswith("attention.bias")}
    kept = {name: mask.clone() for name, mask in masks.items()}
    for mask in masks.values():
        mask.fill_(True)
    yield
    for name, mask in masks.items():
        mask.copy_(kept[name])


@torch.no_grad()
def test_states_of_both_modes(models: tuple[Any, Any, Path]) -> None:
    """A packed row's states are those of its segments alone; the two modes differ."""
    from megatron_grit.models.decoder import Output

    theirs, ours, _ = models
    expected = {}
    for kind in TWO_PASSES:
        row = make_row(kind)
        expected[kind] = states_of_theirs(theirs, row, bidirectional=kind is RowKind.EMBEDDING)
        got = ours(row, Output.HIDDEN).squeeze(1)
        torch.testing.assert_close(got, expected[kind], rtol=TOLERANCE, atol=TOLERANCE)
    assert (expected[RowKind.EMBEDDING] - expected[RowKind.GENERATIVE]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_states_with_padding(models: tuple[Any, Any, Path], kind: RowKind) -> None:
    """A packed row that ends in padding, against a batch that is padded to one length."""
    from megatron_grit.models.decoder import Output

    theirs, ours, _ = models
    row = make_row(kind, padding=13)
    expected = padded_states_of_theirs(theirs, row, bidirectional=kind is RowKind.EMBEDDING)
    got = ours(row, Output.HIDDEN).squeeze(1)[: sum(LENGTHS)]
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_logits_and_losses(models: tuple[Any, Any, Path]) -> None:
    """Logits, and each position's loss."""
    from megatron_grit.models.decoder import Output

    theirs, ours, _ = models
    row = make_row(RowKind.GENERATIVE)
    expected = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in segments(row.tokens_1T[0])])
    torch.testing.assert_close(ours(row, Output.LOGITS), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert row.labels_1T is not None and row.loss_mask_1T is not None
    losses = torch.nn.functional.cross_entropy(expected, row.labels_1T[0], reduction="none") * row.loss_mask_1T[0]
    torch.testing.assert_close(ours(row, Output.TOKEN_LOSSES), losses, rtol=TOLERANCE, atol=TOLERANCE)


def test_export_is_the_source(models: tuple[Any, Any, Path]) -> None:
    """The way back gives the files that were converted, name for name and bit for bit."""
    from megatron_grit.convert.families.registry import family_of_model, load_hf_config
    from megatron_grit.convert.hf_in.reader import SafetensorsFolder

    _, ours, source = models
    config = load_hf_config(source)
    weights = {name: tensor for name, tensor in ours.state_dict().items() if isinstance(tensor, Tensor)}
    exported = dict(family_of_model(config).to_hf(weights, config))
    with SafetensorsFolder(source) as expected:
        assert exported.keys() == set(expected)
        assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_balancing_coefficient() -> None:
    """One layer: transformers' balancing loss times its coefficient is ours times the imported one."""
    from megatron_grit import compat
    from megatron_grit.convert.families import mixtral
    from megatron_grit.convert.families.registry import hf_state_dict_to_megatron
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job

    torch.manual_seed(6)
    theirs = make_model("mixtral", 331)
    theirs.config.num_hidden_layers = 1
    theirs.model.layers = theirs.model.layers[:1]
    settings = theirs.config.to_dict() | {"router_aux_loss_coef": 0.3}
    config = RunConfig(model=mixtral.model_config(settings))
    config.training.precision = "fp32"
    row = make_row(RowKind.GENERATIVE)
    routed = [
        theirs(input_ids=ids[None], output_router_logits=True).router_logits[0] for ids in segments(row.tokens_1T[0])
    ]
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    expected = 0.3 * load_balancing_loss_func((torch.cat(routed),), 4, 2)
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        ours = build_model(config, 331, context)
        ours.load_state_dict(hf_state_dict_to_megatron(theirs.state_dict(), config.model), strict=False)
        compat.take_balancing_loss()
        ours.train()(row, Output.TOKEN_LOSSES)
        logged = compat.take_balancing_loss()
    assert logged is not None
    assert float(logged.sum()) * config.model.moe_aux_loss_coeff == pytest.approx(float(expected), rel=1e-5)
