"""Decoders without an output layer, as ``AutoModel`` and sentence-transformers save them, and tied models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_in.pretrained import resolve_pretrained
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import CheckpointError
from megatron_grit.training.checkpoint import read_config, resolve_checkpoint
from tests.parity.test_hf_import import (
    TOLERANCE,
    make_model,
    make_row,
    segments,
    states_of_theirs,
    write_tokenizer,
)
from tests.rows import TWO_PASSES

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

VOCAB = 331
FAMILIES = (
    *("mistral_window", "mixtral", "llama_biases", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "gpt_neox", "gptj", "gpt_neo"),
)
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def seen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, from information on."""
    monkeypatch.setattr(logging.getLogger("megatron_grit"), "propagate", True)
    caplog.set_level(logging.INFO, "megatron_grit")
    return caplog


def save(name: str, folder: Path, *, decoder_only: bool = True, **changes: Any) -> Any:
    """A tiny random model of transformers, saved whole or without its output layer; config.json with changes."""
    torch.manual_seed(5)
    model = make_model(name, VOCAB)
    (model.base_model if decoder_only else model).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return model


def imported(folder: Path, target: Path, tokenizer_file: Path) -> RunConfig:
    convert_checkpoint(folder, target, tokenizer_file)
    return read_config(resolve_checkpoint(target))


@torch.no_grad()
def outputs(target: Path) -> tuple[dict[RowKind, torch.Tensor], torch.Tensor]:
    """States of the row in both modes, and its logits, by the newest checkpoint."""
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    checkpoint = resolve_checkpoint(target)
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        model = build_model(read_config(checkpoint), VOCAB, context)
        load_weights(checkpoint, model, context)
        model.eval()
        states = {kind: model(make_row(kind), Output.HIDDEN).squeeze(1) for kind in TWO_PASSES}
        return states, model(make_row(RowKind.GENERATIVE), Output.LOGITS)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_alone(name: str, tokenizer_file: Path, tmp_path: Path, seen: pytest.LogCaptureFixture) -> None:
    """States of both modes are those of AutoModel; the output layer is the input embedding, and an export says so."""
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    whole = save(name, tmp_path / "hf")
    config = imported(tmp_path / "hf", tmp_path / "ours", tokenizer_file)
    assert config.model.tie_embeddings
    told = sum("the input embedding is the output layer (model.tie_embeddings)" in line for line in seen.messages)
    assert told == (name != "gpt_neo"), "once, unless config.json ties them"
    theirs = transformers.AutoModel.from_pretrained(
        tmp_path / "hf", attn_implementation=whole.config._attn_implementation
    ).eval()
    expected = {
        kind: states_of_theirs(theirs, make_row(kind), bidirectional=kind is RowKind.EMBEDDING) for kind in TWO_PASSES
    }
    states, logits = outputs(tmp_path / "ours")
    for kind in TWO_PASSES:
        close(states[kind], expected[kind])
    assert (expected[RowKind.EMBEDDING] - expected[RowKind.GENERATIVE]).abs().max() > 0.1
    close(logits, expected[RowKind.GENERATIVE] @ theirs.get_input_embeddings().weight.T)
    if name in ("llama_biases", "gptj"):  # a table of each kind, and the one with an output bias
        export_checkpoint(tmp_path / "ours", tmp_path / "out")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = segments(make_row(RowKind.GENERATIVE).tokens_1T[0])
        close(torch.cat([loaded(input_ids=each[None]).logits[0] for each in ids]), logits)


def test_names_decide_where_architectures_says_causal_lm(tokenizer_file: Path, tmp_path: Path) -> None:
    """gte-Qwen2 has the decoder's names and Qwen2ForCausalLM."""
    save("qwen2", tmp_path / "hf", architectures=["Qwen2ForCausalLM"])
    assert imported(tmp_path / "hf", tmp_path / "ours", tokenizer_file).model.tie_embeddings


def test_an_output_layer_that_is_missing_from_a_model_that_generates(tokenizer_file: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    save("mistral", tmp_path / "hf", decoder_only=False)
    tensors = load_file(tmp_path / "hf" / FILE)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, tmp_path / "hf" / FILE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing.*set tie_word_embeddings to true"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "ours", tokenizer_file)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    assert imported(tmp_path / "hf", tmp_path / "ours", tokenizer_file).model.tie_embeddings


@torch.no_grad()
@pytest.mark.parametrize("stored", ["equal", "other", "head alone"])
def test_tied_models_as_they_are_stored(
    stored: str, tokenizer_file: Path, tmp_path: Path, seen: pytest.LogCaptureFixture
) -> None:
    """transformers goes by the tensors: equal ones are tied, different ones are not, and one stands for both."""
    save("qwen2", tmp_path / "hf", decoder_only=False, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf" / FILE)
    assert not tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    if stored == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif stored == "head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf" / FILE, metadata={"format": "pt"})
    config = imported(tmp_path / "hf", tmp_path / "ours", tokenizer_file)
    assert config.model.tie_embeddings == (stored != "other")
    assert sum("differ: both are kept" in line for line in seen.messages) == (stored == "other")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = segments(make_row(RowKind.GENERATIVE).tokens_1T[0])
    close(
        outputs(tmp_path / "ours")[1],
        torch.cat([theirs(input_ids=each[None]).logits[0] for each in ids]),
    )


def sentence_transformer(folder: Path, pooling: dict[str, Any], place: str = "", **settings: Any) -> None:
    """Put the files of a sentence-transformers model around a decoder that is in ``folder / place``."""
    kinds = {place: "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48} | pooling))
    (folder / place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 200} | settings))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "find: "}}))
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w1"
    )
    tokenizer.save_pretrained(folder / place)


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "mode", "bidirectional"), [("", "lasttoken", False), ("0_Transformer", "mean_tokens", True)]
)
def test_sentence_transformers(
    place: str,
    mode: str,
    bidirectional: bool,
    tokenizer_file: Path,
    tmp_path: Path,
    seen: pytest.LogCaptureFixture,
) -> None:
    """Embeddings of an import are those of sentence-transformers, with pooling and attention from its modules."""
    from megatron_grit.inference.encode import encode_tokens
    from megatron_grit.inference.model_group import join_model_group
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    sentence_transformers = pytest.importorskip("sentence_transformers")
    save("qwen3", tmp_path / "hf" / place, is_causal=True)  # transformers changes only a key that is there
    change = {"config_args": {"is_causal": False}} if bidirectional else {}
    sentence_transformer(tmp_path / "hf", {f"pooling_mode_{mode}": True}, place, **change)
    config = imported(tmp_path / "hf", tmp_path / "ours", tokenizer_file)
    assert (config.embedding.pooling, config.embedding.causal) == (mode.removesuffix("_tokens"), not bidirectional)
    assert any(
        "its prompts are not put in front of texts" in line and "query 'find: '" in line for line in seen.messages
    )
    rows = [ids.tolist() for ids in segments(make_row(RowKind.EMBEDDING).tokens_1T[0])]
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "hf"), device="cpu").eval()
    alone = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in rows]
    expected = torch.cat([theirs(features)["sentence_embedding"] for features in alone])
    found = {}
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        for causal in (not bidirectional, bidirectional):
            config.embedding.causal = causal
            model = build_model(config, VOCAB, context)
            load_weights(resolve_checkpoint(tmp_path / "ours"), model, context)
            group = join_model_group(model, 1)
            vectors = encode_tokens([model], [([], ids) for ids in rows], group=group, batch_tokens=512, progress=False)
            found[causal] = torch.from_numpy(vectors)
    close(found[not bidirectional], expected)
    assert (found[bidirectional] - expected).abs().max() > 0.01, "attention does not matter"


def test_a_run_takes_what_it_does_not_say(tokenizer_file: Path, tmp_path: Path) -> None:
    """``model.pretrained`` of an embedder: its pooling and attention, unless the run gives its own."""
    save("qwen3", tmp_path / "hf" / "0_Transformer")
    sentence_transformer(tmp_path / "hf", {"pooling_mode": "lasttoken"}, "0_Transformer")
    for file in (tmp_path / "hf" / "0_Transformer").glob("*token*"):
        file.unlink()
    shutil.copyfile(tokenizer_file, tmp_path / "hf" / "0_Transformer" / "tokenizer.model")

    def resolved(*options: str) -> RunConfig:
        arguments = parse_train_arguments(["--model.pretrained", str(tmp_path / "hf"), *options])
        return resolve_pretrained(arguments.config, arguments.origins)

    run = resolved()
    assert (run.embedding.pooling, run.embedding.causal, run.embedding.normalize) == ("lasttoken", True, True)
    assert run.model.tie_embeddings and run.data.tokenizer == str(tmp_path / "hf" / "0_Transformer")
    run = resolved("--embedding.pooling", "mean", "--embedding.causal", "false")
    assert (run.embedding.pooling, run.embedding.causal) == ("mean", False)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_vectors_are_left_long_only_where_they_are_compared_so(similarity: str, tmp_path: Path) -> None:
    """Many models whose loss was the cosine have no Normalize."""
    from megatron_grit.convert.hf_in.embedder import embedder_defaults

    save("qwen3", tmp_path)
    sentence_transformer(tmp_path, {"pooling_mode": ["mean", "max"]})
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": similarity}))
    expected = {"causal": True} | ({"normalize": False} if similarity == "dot" else {})
    assert embedder_defaults(tmp_path) == expected
