"""Exported directories: the source's tensors bit for bit, transformers' logits, and our embeddings in
sentence-transformers, family by family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_grit.data.text.templates import embedding_prefix
from megatron_grit.inference.model import GritModel
from tests.corpus import sentences, tiny_run
from tests.harness.ranks import run_on_ranks
from tests.parity.test_hf_import import LENGTHS, MODELS, TOLERANCE, make_model, make_row, segments, write_tokenizer
from tests.unit.convert.hf_out.test_convert import make_checkpoint

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

SHARD_BYTES = 40_000
TEXTS = ["what does json.dumps do", "x", "the row has tokens and the model has layers " * 6, " two  lines\nhere "]
INSTRUCTIONS = ["", "Find the function", "  Which class holds\nthis : "]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 331 pieces that keeps newlines apart."""
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    # Few letters, so that there is room for pieces of several beside the 256 bytes.
    texts = [text for pair in sentences(200) for text in pair]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer", 331)


def qwen2_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of 331 tokens that cuts texts as Qwen2's does: transformers knows no other for Qwen2."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    pattern += r"\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=331, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator([text for pair in sentences(200) for text in pair], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=list(MODELS))
def exported(
    request: pytest.FixtureRequest, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any, Path, Path]]:
    """(name, transformers' model, its directory, the export of what was imported from it)."""
    from megatron_grit.convert.hf_in.convert import convert_checkpoint
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    theirs = make_model(request.param, 331)
    theirs.save_pretrained(directory / "hf")
    tokenizer = qwen2_tokenizer(directory / "tokenizer") if request.param == "qwen2" else tokenizer_file
    convert_checkpoint(directory / "hf", directory / "ours", tokenizer)
    export_checkpoint(directory / "ours", directory / "out", max_shard_size=f"{SHARD_BYTES}B")
    yield request.param, theirs, directory / "hf", directory / "out"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def test_tensors_are_the_source(exported: tuple[str, Any, Path, Path]) -> None:
    """Name for name and bit for bit, in several files of which an index tells."""
    _, _, source, out = exported
    expected, got = read_weights(source), read_weights(out)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    largest = max(tensor.nbytes for tensor in got.values())
    assert all(file.stat().st_size < SHARD_BYTES + 3 * largest + 4096 for file in files)


@torch.no_grad()
def test_generation_is_causal_and_equal(exported: tuple[str, Any, Path, Path]) -> None:
    """AutoModelForCausalLM gives the source's logits, alone and in a padded batch."""
    from megatron_grit.data.indexed.roles import RowKind

    _, theirs, _, out = exported
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation=theirs.config._attn_implementation
    ).eval()
    assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
    for ids in segments(make_row(RowKind.GENERATIVE).tokens_1T[0]):
        torch.testing.assert_close(
            loaded(input_ids=ids[None]).logits, theirs(input_ids=ids[None]).logits, rtol=0, atol=0
        )
    first, second = (ids[None] for ids in segments(make_row(RowKind.GENERATIVE).tokens_1T[0])[:2])
    short, long = LENGTHS[0], LENGTHS[1]
    batch = torch.cat([torch.nn.functional.pad(first, (0, long - short)), second])
    mask = (torch.arange(long) < torch.tensor([[short], [long]])).long()
    logits = loaded(input_ids=batch, attention_mask=mask).logits[0, :short]
    torch.testing.assert_close(logits, theirs(input_ids=first).logits[0], rtol=TOLERANCE, atol=5 * TOLERANCE)
    changed = second.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 331
    assert torch.equal(loaded(input_ids=changed).logits[0, :-1], loaded(input_ids=second).logits[0, :-1])


def test_configuration_reads_back(exported: tuple[str, Any, Path, Path]) -> None:
    """Our shape of the exported config.json is that of the source's; transformers' is, too, key for key."""
    from megatron_grit.convert.families.registry import load_hf_config

    _, theirs, source, out = exported
    expected = vars(load_hf_config(source))
    for key, value in vars(load_hf_config(out)).items():
        assert value == (pytest.approx(expected[key]) if isinstance(value, float) else expected[key]), key
    # Two ways to say that no layer, or which layers, have experts or a window.
    ways = {"max_window_layers", "mlp_only_layers", "decoder_sparse_step", "attention_types"}
    ways |= {"use_cache", "bos_token_id", "eos_token_id"}
    got, wanted = transformers.AutoConfig.from_pretrained(out).to_dict(), theirs.config.to_dict()
    for key in json.loads((out / "config.json").read_text()).keys() & wanted.keys() - ways:
        value = wanted[key]
        if isinstance(value, dict):  # defaults are spelled out
            assert value.items() <= got[key].items()
            continue
        assert value is None or got[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    generation = transformers.GenerationConfig.from_pretrained(out)
    expected_ids = (0, 1) if "qwen2" == exported[0] else (1, 2)
    assert (generation.bos_token_id, generation.eos_token_id) == expected_ids


def test_embeddings_of_sentence_transformers(exported: tuple[str, Any, Path, Path]) -> None:
    """Queries and passages of several lengths in one padded batch, with an instruction and without."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    name, _, _, out = exported
    if name == "gpt_neo":
        assert not (out / "modules.json").exists() and "GPT-Neo attends causally" in (out / "README.md").read_text()
        return
    ours = GritModel.load(out.parent / "ours", device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    for instruction in INSTRUCTIONS:
        expected = ours.encode(TEXTS, instruction=instruction)
        got = theirs.encode(TEXTS, prompt=embedding_prefix(instruction), batch_size=len(TEXTS))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    plain = ours.encode(TEXTS)
    np.testing.assert_allclose(theirs.encode(TEXTS), plain, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), plain, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), plain, atol=1e-5)


@pytest.mark.parametrize("exported", ["mistral", "mistral_window", "qwen2"], indirect=True)
def test_causal_attention_would_be_seen(exported: tuple[str, Any, Path, Path], tmp_path: Path) -> None:
    """The comparison above fails where is_causal or a window is left as it is for generation."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    name, _, _, out = exported
    settings = json.loads((out / "sentence_bert_config.json").read_text())["config_args"]
    expected = GritModel.load(out.parent / "ours", device="cpu").encode(TEXTS)
    variants = [{key: value for key, value in settings.items() if key != "is_causal"}, {"is_causal": False}]
    assert (variants[1] == settings) is (name == "mistral")
    for number, variant in enumerate(variants if name != "mistral" else variants[:1]):
        copy = tmp_path / str(number)
        shutil.copytree(out, copy)
        (copy / "sentence_bert_config.json").write_text(json.dumps({"config_args": variant}))
        got = sentence_transformers.SentenceTransformer(str(copy), device="cpu").encode(TEXTS)
        assert np.abs(got - expected).max() > 1e-3, variant


OPTIONS: dict[str, dict[str, Any]] = {
    "projection": {"projection_dim": 24},
    "lasttoken": {"pooling": "lasttoken", "normalize": False},
    "cls_causal": {"pooling": "cls", "causal": True, "projection_dim": 8},
    "max_gelu": {"pooling": "max", "num_linear_layers": 2, "linear_activation": "gelu", "projection_dim": 20},
    "sgpt_after": {
        "pooling": "weightedmean_sgpt",
        "num_linear_layers": 1,
        "linear_place": "after_pooling",
        "linear_activation": "tanh",
        "linear_bias": False,
    },
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_pooling_and_linear_layers(name: str, tmp_path: Path) -> None:
    """Each pooling and place of linear layers that sentence-transformers has modules for."""
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    sentence_transformers = pytest.importorskip("sentence_transformers")
    run, _ = make_checkpoint(tmp_path, embedding=OPTIONS[name])
    out = export_checkpoint(run, tmp_path / "out")
    ours = GritModel.load(run, device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    for instruction in INSTRUCTIONS:
        expected = ours.encode(TEXTS, instruction=instruction)
        got = theirs.encode(TEXTS, prompt=embedding_prefix(instruction), batch_size=len(TEXTS))
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pooling": "weightedmean"}, "its Pooling has nothing like weightedmean"),
        ({"projection_dim": 8, "asymmetric": "heads"}, "queries and passages pass through linear layers of their own"),
        ({"brackets": "specb"}, "it puts no ids around a text"),
    ],
)
def test_no_modules_where_they_would_be_wrong(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    """The card says why; the model still generates."""
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    run, _ = make_checkpoint(tmp_path, embedding=options)
    out = export_checkpoint(run, tmp_path / "out")
    assert not (out / "modules.json").exists() and not (out / "vllm_embed.json").exists()
    assert f"sentence-transformers cannot do this: {why}" in (out / "README.md").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_a_tokenizer_that_merges_prompts_and_texts(tmp_path: Path) -> None:
    """Newlines are spaces to it, so the end of an instruction is one token with the text."""
    from megatron_grit.config.schema import EmbeddingConfig
    from megatron_grit.convert.families import mistral
    from megatron_grit.convert.hf_out.embedding import why_not_sentence_transformers
    from megatron_grit.data.text.tokenizer import load_tokenizer

    merging = load_tokenizer(write_tokenizer(tmp_path))
    why = why_not_sentence_transformers(EmbeddingConfig(), mistral.FAMILY, merging)
    assert why is not None and "merges the end of an instruction with the text" in why


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tensor": 2, "sequence_parallel": True, "pipeline": 2},
    "tp2_ep2": {"tensor": 2, "sequence_parallel": True, "expert": 2},
}


def save_at_layout(directory: str, layout: str) -> None:
    """A checkpoint of a mixture, written by all ranks of a mesh."""
    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.data.text.tokenizer import load_tokenizer
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint_save import save_checkpoint

    config = tiny_run(Path(directory), experts=2)
    config.embedding.projection_dim = 24
    config.parallel = ParallelConfig(device="cpu", **LAYOUTS[layout])
    config.output_dir = str(Path(directory) / layout)
    tokenizer = load_tokenizer(str(config.data.tokenizer))
    with parallel_job(config.parallel, seed=3) as context:
        model = build_model(config, tokenizer.vocab_size, context)
        save_checkpoint(config, context, model, None, tokenizer, step=1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_checkpoints_of_any_layout(layout: str, tmp_path: Path) -> None:
    """What four ranks wrote is exported as the engine loads it into one process."""
    from megatron_grit.convert.families.registry import family_of_model
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    tiny_run(tmp_path, experts=2)
    run_on_ranks(save_at_layout, 4, tmp_path, str(tmp_path), layout)
    exported = read_weights(export_checkpoint(tmp_path / layout, tmp_path / "out", max_shard_size="100KB"))
    ours = GritModel.load(tmp_path / layout, device="cpu")
    weights = {name: parameter.detach() for name, parameter in ours.model.named_parameters()}
    ours.config.model.vocab_size = 400
    expected = dict(family_of_model(ours.config.model).to_hf(weights, ours.config.model))
    assert exported.keys() - {"linear.weight", "linear.bias"} == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    head = read_weights(tmp_path / "out" / "2_Dense")
    assert torch.equal(head["linear.weight"], weights["embedding_head.weight"])
